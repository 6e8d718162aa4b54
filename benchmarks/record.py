"""What recording costs: ratios within one run, at FLUX.1-dev's width.

    uv run python benchmarks/record.py [--device cpu] [--dtype bfloat16] [--repeats 15]

Runs one double and one single block (hidden 3072, 1024 image + 256 text tokens, random weights) plainly, recorded,
counted as the original pack counted: `(h > 0).sum((0, 1)).cpu()` on every MLP of every block, with the strongest places kept
for the atlas, without and with maps, and with 2 % of the neurons poked. They take turns (`turns.py`), on a CPU with one thread.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from figures import figure
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.layout import Layout, Site
from flux_poke.flux.model import DoubleBlock, Flux, SingleBlock
from flux_poke.poking.neurons import Neurons
from flux_poke.poking.poke import Moment, Poke, poking
from flux_poke.recording.call import Call
from flux_poke.recording.neurons import InternalsRecorder
from flux_poke.recording.places import PlacesRecorder
from torch import nn
from turns import in_turns, ratio

HIDDEN, IMAGE, TEXT = 3072, 1024, 256
#: FLUX.1-dev with one block of each kind.
LAYOUT = Layout.of("flux1", HIDDEN, 1, 1, guidance=True)


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
def counted_as_the_original(model: Blocks, sites: Sequence[Site]) -> Iterator[None]:
    """Counts on the CPU after every MLP, which waits for the device each time."""
    counts: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for site in sites:

            def hook(module, inputs, site=site):
                fired = (inputs[0][..., site.down_column :] > 0).sum((0, 1)).cpu()
                counts[site.name] = counts.get(site.name, 0) + fired

            hooks.callback(model.get_submodule(site.down).register_forward_pre_hook(hook).remove)
        yield


def block_calls(blocks: Blocks, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A call of each block on random tokens, by its kind."""
    img, txt = (torch.randn(1, count, HIDDEN, device=device, dtype=dtype) for count in (IMAGE, TEXT))
    vec, both = torch.randn(1, HIDDEN, device=device, dtype=dtype), torch.cat((txt, img), dim=1)
    with torch.device("meta"):
        whole = Flux(LAYOUT)
    pe = whole.positions(TEXT, [(32, IMAGE // 32)], device)
    return {
        "double": lambda: blocks.double_blocks[0](img=img, txt=txt, vec=vec, pe=pe),
        "single": lambda: blocks.single_blocks[0](both, vec=vec, pe=pe),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)

    torch.manual_seed(0)
    blocks = Blocks(LAYOUT).to(device, dtype).requires_grad_(False)
    fingerprint = Fingerprint.of_tensors(blocks.state_dict())
    call = Call.at(torch.zeros(1, 16, 64, 64), torch.ones(1), (1.0, 0.0), context=torch.zeros(1, TEXT, 1))
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {given.dtype}, torch {torch.__version__}")
    for kind, run in block_calls(blocks, device, dtype).items():
        sites = [site for site in LAYOUT.sites if site.name.startswith(kind)]
        only, recorder = Only(blocks, kind), InternalsRecorder(sites)

        def recorded(run=run, only=only, recorder=recorder) -> None:
            with recorder.watching(only, call):
                run()

        def counted(run=run, sites=sites) -> None:
            with counted_as_the_original(blocks, sites):
                run()

        def kept(places: PlacesRecorder, run=run, only=only) -> None:
            with places.watching(only, call):
                run()

        few = {site.name: torch.arange(0, site.width, 50) for site in sites}
        poke = Poke(Neurons.of(LAYOUT, fingerprint, few, "every fiftieth"), factor=-1.0)

        def turned(run=run, only=only, poke=poke) -> None:
            with poking(only, LAYOUT, [poke], Moment.at(LAYOUT, call.x, call.sigma, torch.zeros(1, TEXT, 1))):
                run()

        ways = {"plain": run, "recorded": recorded, "original's way": counted, "poked": turned}
        for way, maps in (("atlas", False), ("atlas with maps", True)):
            ways[way] = partial(kept, PlacesRecorder(LAYOUT, sites, maps))
        seconds = in_turns(ways, given.repeats, device, warm_up=2)
        plain = 1000 * statistics.median(seconds["plain"])
        figure(f"{kind} block: {plain:.1f} ms plain", block=kind, plain_ms=plain)
        for way in [*ways][1:]:
            added = ratio(seconds[way], seconds["plain"]) - 1
            figure(f"  {way:<15} {added:+7.2%}", block=kind, way=way, added=added)


if __name__ == "__main__":
    main()
