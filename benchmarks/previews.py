"""What tapping every block costs in one sampling step, beside the part that cannot be saved.

    uv run python benchmarks/previews.py                       # a FLUX.1 of fewer, narrower blocks, on a CPU
    uv run python benchmarks/previews.py --device cuda --full  # FLUX.1-dev's own sizes: 57 blocks, 4,096 tokens, bfloat16

Weights are random; only times matter. The floor is, for every block, one copy of its image tokens and one call of the final
layer, and the transfer of all velocities to the CPU. What tapping adds is small beside a step and lost in its noise, so it
is measured on a model whose blocks return their inputs, at the same sizes: there, a tapped step less a plain one is the
tapping. All take turns (`turns.py`), on a CPU with one thread; printed are medians of one run. The ratio to look at is
added / floor.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from figures import figure
from flux_poke.analysis.taps import BlockTaps, TapRecorder
from flux_poke.flux.blocks import blocks_of, choose_blocks
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.recording.call import Call
from torch import nn
from turns import in_turns


class Through(nn.Module):
    """A block that does nothing."""

    def forward(self, *args, img=None, txt=None, **_):
        return args[0] if args else (img, txt)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="FLUX.1-dev's sizes; 24 GB")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, depth, depth_single, side, words = (3072, 19, 38, 128, 512) if options.full else (512, 4, 8, 64, 128)

    layout = Layout.of("flux1", hidden, depth, depth_single, guidance=True)
    torch.set_default_dtype(dtype)
    with device:
        flux = Flux(layout).eval().requires_grad_(False)
        x, sigma, sigmas = torch.randn(1, 16, side, side), torch.full((1,), 0.5), torch.tensor([0.5, 0.0])
        given = torch.randn(1, words, 4096), torch.randn(1, 768), torch.ones(1)
        tokens, vec = torch.randn(1, words + side * side // 4, hidden), torch.randn(1, hidden)
    recorder = TapRecorder(layout, choose_blocks("all", layout))
    count = len(blocks_of(layout))

    with torch.device("meta"):
        hollow = Flux(layout)
    hollow.double_blocks = nn.ModuleList(Through() for _ in range(depth))
    hollow.single_blocks = nn.ModuleList(Through() for _ in range(depth_single))
    for name in ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer"):
        setattr(hollow, name, getattr(flux, name))

    def tap(model: Flux) -> None:
        with recorder.watching(model, Call.at(x, sigma, sigmas), BlockTaps()):
            model(x, sigma, *given)

    def floor() -> None:
        copies = [tokens[:, words:].clone() for _ in range(count)]
        torch.stack([flux.final_layer(copy, vec) for copy in copies]).cpu()

    jobs = {"plain": lambda: hollow(x, sigma, *given), "tapped": lambda: tap(hollow), "floor": floor}
    short = in_turns(jobs, 5 * options.repeats, device, warm_up=2)
    long = in_turns({"plain": lambda: flux(x, sigma, *given), "tapped": lambda: tap(flux)}, options.repeats, device, warm_up=2)
    step, tapped_step = (statistics.median(long[name]) for name in ("plain", "tapped"))
    plain, tapped, least = (statistics.median(short[name]) for name in ("plain", "tapped", "floor"))
    print(f"{count} blocks of width {hidden}, {side**2 // 4} image tokens, {dtype}, {device}")
    rows = {"step": step, "tapped step": tapped_step, "floor: copies and calls": least, "added by tapping": tapped - plain}
    for name, seconds in rows.items():
        figure(f"{name:<24}{1000 * seconds:10.2f} ms   {seconds / step:8.4f} of a step", what=name, ms=1000 * seconds)
    added = (tapped - plain) / least
    figure(f"{'added / floor':<24}{added:10.2f}", added_to_floor=added)


if __name__ == "__main__":
    main()
