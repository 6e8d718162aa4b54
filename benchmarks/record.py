"""What recording costs: ratios within one run, at FLUX.1-dev's width.

    uv run python benchmarks/record.py [--device cpu] [--dtype bfloat16] [--repeats 15]

Runs one double and one single block (hidden 3072, 1024 image + 256 text tokens, random weights) plainly, recorded,
and counted as the original pack counted: `(h > 0).sum((0, 1)).cpu()` on every MLP of every block. The three take turns,
so that a busy machine slows all of them; a ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from flux_poke.flux.layout import Layout, Site
from flux_poke.flux.model import DoubleBlock, Flux, SingleBlock
from flux_poke.recording.call import Call
from flux_poke.recording.neurons import InternalsRecorder
from torch import nn

HIDDEN, IMAGE, TEXT = 3072, 1024, 256


class Blocks(nn.Module):
    """One block of each kind, under the names a whole model gives them."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.double_blocks = nn.ModuleList([DoubleBlock(layout, layout.site("double-img-0"), layout.site("double-txt-0"))])
        self.single_blocks = nn.ModuleList([SingleBlock(layout, layout.site("single-0"))])


class Only(nn.Module):
    """The blocks of one kind alone, as a whole model."""

    def __init__(self, blocks: Blocks, kind: str):
        super().__init__()
        self.double_blocks = blocks.double_blocks if kind == "double" else nn.ModuleList()
        self.single_blocks = blocks.single_blocks if kind == "single" else nn.ModuleList()


@contextmanager
def counted_as_the_original(model: Blocks, sites: tuple[Site, ...]):
    """Counts on the CPU after every MLP, which waits for the device each time."""
    counts: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for site in sites:

            def hook(module, inputs, site=site):
                fired = (inputs[0][..., site.down_column :] > 0).sum((0, 1)).cpu()
                counts[site.name] = counts.get(site.name, 0) + fired

            hooks.callback(model.get_submodule(site.down).register_forward_pre_hook(hook).remove)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)

    torch.manual_seed(0)
    layout = Layout.of("flux1", HIDDEN, 1, 1, guidance=True)
    blocks = Blocks(layout).to(device, dtype).requires_grad_(False)
    with torch.device("meta"):
        whole = Flux(layout)
    pe = whole.positions(TEXT, 32, IMAGE // 32, device)
    img, txt = (torch.randn(1, n, HIDDEN, device=device, dtype=dtype) for n in (IMAGE, TEXT))
    vec = torch.randn(1, HIDDEN, device=device, dtype=dtype)
    both = torch.cat((txt, img), dim=1)

    runs: dict[str, Callable[[], object]] = {
        "double": lambda: blocks.double_blocks[0](img=img, txt=txt, vec=vec, pe=pe),
        "single": lambda: blocks.single_blocks[0](both, vec=vec, pe=pe),
    }
    call = Call.at(torch.zeros(1, 1), torch.ones(1), (1.0, 0.0))

    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {given.dtype}, torch {torch.__version__}")
    for kind, run in runs.items():
        only, recorder = Only(blocks, kind), InternalsRecorder([s for s in layout.sites if s.name.startswith(kind)])
        ways: dict[str, Callable] = {
            "plain": lambda: ExitStack(),
            "recorded": lambda recorder=recorder, only=only: recorder.watching(only, call),
            "original's way": lambda: counted_as_the_original(blocks, layout.sites),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(given.repeats + 2):
            for way, watching in ways.items():
                with watching():
                    took = timed(run, device)
                if repeat >= 2:  # the first two warm up
                    seconds[way].append(took)
        plain = statistics.median(seconds["plain"])
        print(f"{kind} block: {1000 * plain:.1f} ms plain")
        for way in ("recorded", "original's way"):
            ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["plain"], strict=True))
            print(f"  {way:<15} {ratio - 1:+7.2%}")


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
