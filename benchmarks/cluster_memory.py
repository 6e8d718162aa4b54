"""The most memory that ranking and repairing one MLP hold, and retraining it on rows, against what a cluster sets aside for it
(`cluster/memory.py`). On Linux.

    uv run python benchmarks/cluster_memory.py [--hidden 384 768 1536]

FLUX.1's proportions, one double and one single block, random weights in bfloat16, 1.25 random rows for each value that the down
projection of the single block reads, half of the MLP cut. Each is a Python of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from figures import figure
from flux_poke.cluster.memory import ranking_bytes, retraining_bytes
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.recording.recording import Recording
from flux_poke.recording.store import HiddenStates
from safetensors.torch import save_file

IMAGES = 10
#: Does one thing to one MLP, and prints the kB of main memory it has held at most, and its processor time.
CHILD = r"""
import re, sys, time
from pathlib import Path
import torch
what, checkpoint, folder, name = sys.argv[1:]
torch.set_num_threads(1)
from flux_poke.cluster.sites import Source
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.scores import rank
from flux_poke.retrain.layers import Layerwise, open_data
from flux_poke.retrain.options import Options
source = Source(checkpoint, folder)
dense, recording = source.dense(), source.recorded()
if what == "rank":
    rank("obs", dense, recording, [dense.layout.site(name)])
elif what != "nothing":
    plan = PruningPlan.load(f"{folder}/{name}.plan.safetensors")
    if what == "repair":
        Repairs(dense, plan, "affine", recording).work_out(name)
    else:
        work = Layerwise(dense, plan, open_data(recording, "rows"), "all", f"{folder}/{name}", Options(steps=2, eval_every=2))
        for group in work.groups:
            work.train(group)
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1], time.process_time())
"""


def peak(*arguments: object) -> tuple[float, float]:
    """GB that a Python of its own has held at most, and its seconds of processor time."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # nosec B603 # ourselves
    kilobytes, seconds = done.stdout.split()[-2:]
    return int(kilobytes) * 1024 / 1e9, float(seconds)


def write(folder: Path, hidden: int) -> tuple[Path, Recording]:
    """A checkpoint, rows of its MLPs, and for each a plan that cuts half of its neurons."""
    checkpoint, recording = folder / "flux.safetensors", Recording.at(folder / "recording")
    with torch.device("meta"):
        shapes = Flux(Layout.of("flux1", hidden, 1, 1, guidance=True)).state_dict()
    save_file({key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02 for key, tensor in shapes.items()}, checkpoint)
    dense = Dense.open(checkpoint)
    store = HiddenStates.for_model(recording.states_folder, dense.layout.family, dense.fingerprint)
    count = 5 * max(site.regressors for site in dense.layout.sites) // 4
    found = {}
    for site in dense.layout.sites:
        found[f"{site.name}.x"] = torch.randn(count, hidden).bfloat16()
        if site.down_column:
            found[f"{site.name}.attn"] = torch.randn(count, hidden).bfloat16()
        found[f"{site.name}.sigma"] = torch.rand(count)
        found[f"{site.name}.image"] = (torch.arange(count) % IMAGES).int()
        found[f"{site.name}.step"] = torch.zeros(count, dtype=torch.int32)
        kept = {site.name: torch.arange(0, site.width, 2)}
        plan = replace(PruningPlan.keeping_all(dense), kept=kept, recording=str(recording.folder))
        plan.save(recording.folder / f"{site.name}.plan.safetensors")
    store.append("rows", found)
    return checkpoint, recording


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[384, 768, 1536])
    given = parser.parse_args()
    print("hidden  MLP            values read   what      peak GB   set aside   seconds of processor time")
    for hidden in given.hidden:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, recording = write(Path(folder), hidden)
            dense, data = Dense.open(checkpoint), recording.states()
            opened, _ = peak("nothing", checkpoint, recording.folder, "-")
            print(f"{hidden:>6}  Python with torch, the files opened: {opened:.2f} GB", flush=True)
            for index, name in ((0, "double-img-0"), (1, "single-0")):
                site = dense.layout.site(name)
                for what in ("rank", "repair", "retrain"):
                    aside = ranking_bytes(site, hidden) if what != "retrain" else retraining_bytes(dense, [index], data)
                    found, seconds = peak(what, checkpoint, recording.folder, name)
                    line = f"{hidden:>6}  {name:<15}{site.regressors:>11,}   {what:<8}{found:>9.2f}{aside / 1e9:>12.2f}"
                    line += f"{seconds:>10.0f}"
                    figure(line, hidden=hidden, mlp=name, read=site.regressors, what=what, peak_gb=found, aside_gb=aside / 1e9)


if __name__ == "__main__":
    main()
