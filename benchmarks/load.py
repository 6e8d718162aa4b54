"""Loading a pruned file into ComfyUI, against ComfyUI's stock loader on a dense file: seconds a gigabyte, in turns.

    uv run python benchmarks/load.py [--comfyui ~/comfy/ComfyUI] [--repeats 5]

FLUX.1-dev's width, one double and two single blocks of random weights in bfloat16; the pruned file keeps half of every MLP.
Both files are read once before, so that they come from memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    # The repository's own folder `nodes` would hide ComfyUI's nodes.py.
    sys.path[:0] = [str(given.comfyui.expanduser())]
    sys.argv = sys.argv[:1]
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.ldm.flux.model
    import comfy.ops
    import comfy.sd
    from flux_poke.nodes import loading
    from flux_poke.pruning.checkpoint import Pruned, save_pruned
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.plan import PruningPlan
    from flux_poke.pruning.surgery import Cut
    from safetensors.torch import save_file

    with torch.device("meta"):
        shapes = comfy.ldm.flux.model.Flux(
            dtype=torch.bfloat16, operations=comfy.ops.manual_cast, in_channels=16, out_channels=16, vec_in_dim=768,
            context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=2,
            axes_dim=[16, 56, 56], theta=10_000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
        ).state_dict()  # fmt: skip
    weights = {key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02 for key, tensor in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        dense_file, pruned_file = Path(folder) / "dense.safetensors", Path(folder) / "pruned.safetensors"
        save_file(weights, dense_file)
        dense = Dense.open(dense_file)
        widths = {site.name: site.width for site in dense.layout.sites}
        kept = {name: torch.arange(0, width, 2) for name, width in widths.items()}
        save_pruned(pruned_file, Cut(dense, PruningPlan("flux1", dense.fingerprint, kept, widths, "none", "every other")))

        def load_pruned() -> object:
            pruned = Pruned.open(pruned_file)
            return loading.load_flux(pruned.tensors, "default", pruned.metadata)

        ways = {
            dense_file: lambda: comfy.sd.load_diffusion_model(str(dense_file)),
            pruned_file: load_pruned,
        }
        rates: dict[Path, list[float]] = {path: [] for path in ways}
        for repeat in range(given.repeats + 1):
            for path, load in ways.items():
                start = time.perf_counter()
                load()
                if repeat:
                    rates[path].append((time.perf_counter() - start) / (path.stat().st_size / 1e9))
        for path, found in rates.items():
            print(f"{path.stem}: {path.stat().st_size / 1e9:.2f} GB, {statistics.median(found):.2f} s a GB")
        ratio = statistics.median(a / b for a, b in zip(rates[pruned_file], rates[dense_file], strict=True))
        print(f"pruned / stock loader, a GB: {ratio:.2f}")


if __name__ == "__main__":
    main()
