"""Loading a pruned file into ComfyUI, against ComfyUI's stock loader on a dense file of the same size, in turns.

    OMP_NUM_THREADS=1 uv run python benchmarks/load.py [--comfyui ~/comfy/ComfyUI] [--repeats 15]

FLUX.1-dev's width, random weights in bfloat16. Both files hold one double block; the pruned one two single blocks where the
dense one has one, and of its MLPs 17 neurons in 32, which comes to the same number of bytes. Both are copied before they are
loaded, so that both are in the system's file cache, laid out alike; files of different writers are not. Processor time is
given beside the clock's; it depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from figures import figure
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")))
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    # The repository's own folder `nodes` would hide ComfyUI's nodes.py.
    sys.path[:0] = [str(given.comfyui.expanduser())]
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.sd
    from flux_poke.nodes import loading

    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense.safetensors", Path(folder) / "pruned.safetensors"
        write_dense(dense, single_blocks=1)
        write_pruned(pruned, write_dense(Path(folder) / "whole.safetensors", single_blocks=2))
        ways: dict[Path, Callable[[], object]] = {
            dense: lambda: comfy.sd.load_diffusion_model(str(dense)),
            pruned: lambda: loading.load_pruned(Pruned.open(pruned), "default"),
        }
        for path in ways:
            shutil.move(shutil.copyfile(path, Path(folder) / "copy"), path)
        seconds: dict[Path, list[tuple[float, float]]] = {path: [] for path in ways}
        for repeat in range(given.repeats + 1):
            for path, load in ways.items():
                wall, processor = time.perf_counter(), time.process_time()
                load()
                if repeat:
                    seconds[path].append((time.perf_counter() - wall, time.process_time() - processor))
        for path, found in seconds.items():
            wall, processor = (statistics.median(times) for times in zip(*found, strict=True))
            size = path.stat().st_size / 1e9
            line = f"{path.stem}: {size:.3f} GB, {wall:.3f} s, processor {processor:.3f} s"
            figure(line, file=path.stem, gb=size, clock_s=wall, processor_s=processor)
        pairs = zip(seconds[pruned], seconds[dense], strict=True)
        ratios = zip(*([a / b for a, b in zip(ours, stock, strict=True)] for ours, stock in pairs), strict=True)
        clock, processor = map(statistics.median, ratios)
        line = f"pruned / stock loader: {clock:.3f}, processor {processor:.3f}"
        figure(line, pruned_to_stock=clock, pruned_to_stock_processor=processor)


def write_dense(path: Path, single_blocks: int) -> Dense:
    """A FLUX.1 of full width with one double block and random weights."""
    with torch.device("meta"):
        shapes = Flux(Layout.of("flux1", 3072, 1, single_blocks, guidance=True)).state_dict()
    save_file({key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02 for key, tensor in shapes.items()}, path)
    return Dense.open(path)


def write_pruned(path: Path, dense: Dense) -> None:
    """Of every 32 neurons of `dense`, 17."""
    whole = PruningPlan.keeping_all(dense)
    kept = {name: torch.arange(width)[torch.arange(width) % 32 < 17] for name, width in whole.widths.items()}
    save_pruned(path, Cut(dense, replace(whole, kept=kept)))


if __name__ == "__main__":
    main()
