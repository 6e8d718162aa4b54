"""What pruning saves and what it costs, at FLUX.1-dev's width: ratios within one run.

    uv run python benchmarks/prune.py [--device cpu] [--dtype float32] [--repeats 9] [--rows 4096] [--only blocks|site|load]

blocks  one double and one single block (hidden 3072, 1024 image + 256 text tokens, random weights), cut by 25, 50 and 75 %,
        against dense ones. They take turns (`turns.py`), on a CPU with one thread. The ideal ratio is that of the operations
        of all products (torch's FlopCounterMode), those of attention included.
site    seconds by the clock and of the processor to rank, measure, repair and load one single block's MLP of 12,288 neurons,
        from `--rows` rows of random features, a fifth of them held out, and the memory it took (repair does best with 5 times
        as many rows as neurons; only the moments take longer with more rows).
load    a pruned file read through this package, against a dense file of the same size read by safetensors alone.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from figures import figure
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import SiteWeights
from flux_poke.pruning.checkpoint import Pruned, save_pruned
from flux_poke.pruning.curves import GRID, measure_affine, ridge_for
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.moments import gather
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.refit import affine, choose
from flux_poke.pruning.scores import obs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.store import Rows
from record import HIDDEN, LAYOUT, Blocks, block_calls
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turns, ratio

CUTS = (0.25, 0.5, 0.75)


def narrowed(layout: Layout, cut: float) -> Layout:
    return replace(layout, sites=tuple(replace(site, width=round(site.width * (1 - cut))) for site in layout.sites))


@torch.no_grad()
def measure_blocks(device: torch.device, dtype: torch.dtype, repeats: int) -> None:
    blocks = {cut: Blocks(narrowed(LAYOUT, cut)).to(device, dtype) for cut in (0.0, *CUTS)}
    calls = {cut: block_calls(pair, device, dtype) for cut, pair in blocks.items()}
    print("block    cut   time ratio   ideal   share of ideal saving   memory ratio")
    for kind in ("double", "single"):
        operations, memory = {}, {}
        for cut, pair in blocks.items():
            with FlopCounterMode(display=False) as counter:
                calls[cut][kind]()
            operations[cut] = counter.get_total_flops()
            memory[cut] = sum(weight.numel() for weight in pair.get_submodule(f"{kind}_blocks").parameters())
        seconds = in_turns({cut: calls[cut][kind] for cut in blocks}, repeats, device)
        for cut in CUTS:
            found, ideal = ratio(seconds[cut], seconds[0.0]), operations[cut] / operations[0.0]
            share, saved = (1 - found) / (1 - ideal), memory[cut] / memory[0.0]
            figure(
                f"{kind:<8}{cut:>4.0%}{found:>13.3f}{ideal:>8.3f}{share:>24.1%}{saved:>15.3f}",
                block=kind, cut=cut, time=found, ideal=ideal, share_of_saving=share, memory=saved,
            )  # fmt: skip


@contextmanager
def timed(what: str):
    wall, processor = time.perf_counter(), time.process_time()
    yield
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    line = f"{what:<56}{wall:>9.1f} s{processor:>9.1f} s{peak_memory():>9.1f} GB"
    figure(line, step=what, clock_s=wall, processor_s=processor, peak_gb=peak_memory())


def peak_memory() -> float:
    """The most main memory this process has held, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_site(device: torch.device, rows: int) -> None:
    site = LAYOUT.site("single-0")
    width = site.width
    up, down = 3 * HIDDEN + width, HIDDEN + width
    tensors = {
        f"{site.up}.weight": torch.randn(up, HIDDEN).mul_(0.02),
        f"{site.up}.bias": torch.zeros(up),
        f"{site.down}.weight": torch.randn(HIDDEN, down).mul_(0.01),
        f"{site.down}.bias": torch.zeros(HIDDEN),
    }
    weights = SiteWeights.read(tensors, site, device)
    features = torch.randn(600, HIDDEN)

    def some(count: int) -> Iterator[Rows]:
        for start in range(0, count, 2048):
            n = min(2048, count - start)
            x = (torch.randn(n, 600) @ features / 24).bfloat16()
            yield Rows(x, torch.randn(n, HIDDEN).bfloat16(), *torch.zeros(3, n))

    count = rows // 5
    print(f"one site: {width:,} neurons, {HIDDEN:,} attention channels, {rows:,} rows, {count:,} of them held out")
    print(f"{'':<61}wall  processor   peak memory")
    with timed("plan and repair: moments of the rows to fit on"):
        moments = gather(weights, some(rows - count))
    with timed("plan: order of all neurons by greedy OBS"):
        ranking = obs(moments, weights.down)
    with timed("plan and repair: moments of the rows held out"):
        held_out = gather(weights, some(count))
    with timed(f"plan: errors on held-out rows at {len(GRID)} widths"):
        measure_affine(ranking, weights, moments, held_out, ridge_for(width, moments.rows))
    kept = ranking.order[width // 2 :].sort().values
    with timed("repair: choice of the ridge, half of the neurons cut"):
        report = choose(weights, kept, moments, held_out)
    with timed("repair: affine, from all rows"):
        moments = moments.merge(held_out)
        del held_out
        repaired = affine(weights, kept, moments, report.ridge or 1e-2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "single-0.safetensors"
        with timed("repair: write"):
            save_file({"down": repaired.down.bfloat16()}, file)
        with timed("load"):
            load_file(file)


def measure_load(repeats: int) -> None:
    """A FLUX.1-shaped file of about 1.6 GB, cut by half, and a dense one as large."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Flux(LAYOUT).state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        dense = Dense.of({key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in shapes.items()})
        kept = {site.name: torch.arange(0, site.width, 2) for site in LAYOUT.sites}
        plan = replace(PruningPlan.keeping_all(dense), kept=kept)
        pruned, same = Path(folder) / "pruned.safetensors", Path(folder) / "same.safetensors"
        save_pruned(pruned, Cut(dense, plan))
        save_file({key: tensor.clone() for key, tensor in Pruned.open(pruned).tensors.items()}, same)

        def read_pruned() -> list[Tensor]:
            return [tensor.clone() for tensor in Pruned.open(pruned).tensors.values()]

        def read_dense() -> list[Tensor]:
            with safe_open(same, framework="pt") as file:
                return [file.get_tensor(key).clone() for key in file.keys()]

        seconds = in_turns({"pruned": read_pruned, "dense": read_dense}, repeats, torch.device("cpu"))
        found = ratio(seconds["pruned"], seconds["dense"])
        size = pruned.stat().st_size / 1e6
        figure(f"loading {size:,.0f} MB: pruned / dense of the same size {found:.3f}", megabytes=size, pruned_to_dense=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU, as ComfyUI has it")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--only", choices=("blocks", "site", "load"))
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    print(f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads")
    if given.only in (None, "blocks"):
        measure_blocks(device, getattr(torch, dtype), given.repeats)
    if given.only in (None, "site"):
        measure_site(device, given.rows)
    if given.only in (None, "load"):
        measure_load(given.repeats)


if __name__ == "__main__":
    main()
