"""Loading a pruned file into ComfyUI, against ComfyUI's stock loader on a dense file of the same size, in turns.

    OMP_NUM_THREADS=1 uv run python benchmarks/load.py [--comfyui ~/comfy/ComfyUI] [--repeats 15]

FLUX.1-dev's width, random weights in bfloat16. Both files hold one double block; the pruned one two single blocks where the
dense one has one, and of its MLPs 17 neurons in 32, which comes to the same number of bytes. Both are copied before they are
loaded: they come from memory, and lie there alike, which files of different writers do not. Processor time is given beside
wall time; it depends less on what else the machine does.
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
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")))
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    # The repository's own folder `nodes` would hide ComfyUI's nodes.py.
    sys.path[:0] = [str(given.comfyui.expanduser())]
    sys.argv = sys.argv[:1]
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.sd
    from flux_poke.nodes import loading
    from flux_poke.pruning.checkpoint import Pruned

    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense.safetensors", Path(folder) / "pruned.safetensors"
        write_dense(dense, single_blocks=1)
        write_pruned(pruned, Path(folder))
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
            print(f"{path.stem}: {path.stat().st_size / 1e9:.3f} GB, {wall:.3f} s, processor {processor:.3f} s")
        pairs = zip(seconds[pruned], seconds[dense], strict=True)
        ratios = zip(*([a / b for a, b in zip(ours, stock, strict=True)] for ours, stock in pairs), strict=True)
        print("pruned / stock loader: {:.3f}, processor {:.3f}".format(*map(statistics.median, ratios)))


def write_dense(path: Path, single_blocks: int) -> None:
    """A FLUX.1 of full width with one double block and random weights."""
    import comfy.ldm.flux.model
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        shapes = comfy.ldm.flux.model.Flux(
            dtype=torch.bfloat16, operations=comfy.ops.manual_cast, in_channels=16, out_channels=16, vec_in_dim=768,
            context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=single_blocks,
            axes_dim=[16, 56, 56], theta=10_000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
        ).state_dict()  # fmt: skip
    save_file({key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02 for key, tensor in shapes.items()}, path)


def write_pruned(path: Path, folder: Path) -> None:
    """The same with two single blocks, and of every 32 neurons 17."""
    import torch
    from flux_poke.pruning.checkpoint import save_pruned
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.plan import PruningPlan
    from flux_poke.pruning.surgery import Cut

    write_dense(folder / "whole.safetensors", single_blocks=2)
    dense = Dense.open(folder / "whole.safetensors")
    widths = {site.name: site.width for site in dense.layout.sites}
    kept = {name: torch.arange(width)[torch.arange(width) % 32 < 17] for name, width in widths.items()}
    save_pruned(path, Cut(dense, PruningPlan("flux1", dense.fingerprint, kept, widths, "none", "17 of 32")))


if __name__ == "__main__":
    main()
