"""Consecutive blocks of a FLUX by themselves, and their training on block states.

    chain = Chain.load(cut, range(3, 5))             # double blocks 3 and 4, at whatever widths `cut` has
    img, txt = chain(states.batch(samples, 3))
    problem = BlockProblem("3 and 4", chain, states, options)    # against the states at 5, which the dense model left

Indices of blocks are those of block states: single blocks count on from the double ones. What is compared is the state after
the *last* block of the chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import blocks_of, sites_at
from ..flux.layout import Layout, Site, read_layout
from ..flux.model import DoubleBlock, Modulation, SingleBlock, run_blocks
from ..flux.weights import full_precision
from ..progress import Progress, silent
from ..pruning.surgery import shape_of
from ..recording.block_states import BlockStates, State
from ..recording.split import held_out
from ..recording.store import Rows
from .options import Options
from .problem import samples_of, seeded, squared


class Chain(nn.Module):
    """The blocks of the indices `span`, under their names in the checkpoint, with the modulations that FLUX.2 shares."""

    def __init__(self, layout: Layout, span: range):
        super().__init__()
        if layout.family == "chroma":
            raise UserError("Chroma's blocks get their modulation from outside: retrain its MLPs on rows.")
        self.layout, self.span = layout, span
        self.double_blocks, self.single_blocks = nn.ModuleDict(), nn.ModuleDict()
        for block in blocks_of(layout)[span.start : span.stop]:
            if block.kind == "double":
                sites = (layout.site(f"double-{stream}-{block.index}") for stream in ("img", "txt"))
                self.double_blocks[str(block.index)] = DoubleBlock(layout, *sites)
            else:
                self.single_blocks[str(block.index)] = SingleBlock(layout, layout.site(block.name))
        if layout.family == "flux2":
            if self.double_blocks:
                self.double_stream_modulation_img = Modulation(layout.hidden, 6, bias=False)
                self.double_stream_modulation_txt = Modulation(layout.hidden, 6, bias=False)
            if self.single_blocks:
                self.single_stream_modulation = Modulation(layout.hidden, 3, bias=False)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], span: range, device: torch.device | str = "cpu") -> Chain:
        """The blocks of a checkpoint (canonical keys), float32; no other tensor of it is read."""
        layout = read_layout({key: shape_of(tensors, key) for key in tensors})
        with torch.device("meta"):
            chain = cls(layout, span)
        chain.load_state_dict({key: in_float32(tensors, key, device) for key in chain.state_dict()}, assign=True)
        return chain.eval().requires_grad_(False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The MLPs in here, in the order they run."""
        return tuple(site for index in self.span for site in sites_at(self.layout, index))

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """img and txt after the last block."""
        return run_blocks(self, state.img, state.txt, state.vec, state.pe)

    @torch.no_grad()
    def rows(self, states: Iterable[tuple[Tensor, State]], each: int) -> dict[str, Rows]:
        """What every MLP in here reads, by site, bfloat16: at most `each` tokens of every sample, drawn by its index."""
        found: dict[str, list[Tensor]] = {}
        with ExitStack() as hooks:
            seen: dict[str, Tensor] = {}
            for site in self.sites:
                for path in (site.up, site.down):
                    hooks.callback(_seeing(self, path, seen).remove)
            for samples, state in states:
                self(state)
                for site in self.sites:
                    tokens = _draw(samples, seen[site.up].shape[1], each).to(seen[site.up].device)
                    found.setdefault(f"{site.name}.x", []).append(_taken(seen[site.up], tokens))
                    if site.down_column:
                        attended = seen[site.down][..., : site.down_column]
                        found.setdefault(f"{site.name}.attn", []).append(_taken(attended, tokens))
        whole = {name: torch.cat(parts) for name, parts in found.items()}
        nothing = torch.zeros(0)  # whose rows they are is known by whoever chose the samples
        return {
            site.name: Rows(whole[f"{site.name}.x"], whole.get(f"{site.name}.attn"), nothing, nothing, nothing)
            for site in self.sites
        }


class BlockProblem:
    """A chain against the states after it, only its MLPs trainable, split by image; a `Problem`.

    `before` are blocks that the states go through first, from `first` on: to train on what retrained layers give.
    """

    def __init__(self, name: str, chain: Chain, states: BlockStates, options: Options, before: Sequence[Chain] = ()):
        self.name, self.module, self.states, self.options, self.before = name, chain, states, options, tuple(before)
        self.first = before[0].span.start if before else chain.span.start
        self.images = held_out(states.image, options.eval_share, options.seed)
        self.train, self.held_out = (samples_of(images, states.image, states.groups) for images in self.images)

    def errors(self, samples: Tensor) -> Tensor:
        expected = self.states.tokens(samples, self.module.span.stop, self.options.device)
        found = self.module(self.state(samples))
        return torch.stack([squared(f, e) for f, e in zip(found, expected, strict=True)])

    @torch.no_grad()
    def state(self, samples: Tensor) -> State:
        """What enters the chain."""
        state = self.states.batch(samples, self.first, self.options.device)
        for chain in self.before:
            img, txt = chain(state)
            state = State(img, txt, state.vec, state.pe)
        return state

    def inputs(self, groups: Sequence[Tensor], progress: Progress = silent) -> Iterator[tuple[Tensor, State]]:
        """Samples and what enters the chain, batch by batch."""
        batches = [samples for group in groups for samples in group.split(2 * self.options.batch)]
        for done, samples in enumerate(batches):
            progress(f"{self.name}: running the dense blocks", done, len(batches))
            yield samples, self.state(samples)


def in_float32(tensors: Mapping[str, Tensor], key: str, device: torch.device | str) -> Tensor:
    """A tensor in float32 that no one else holds, its scale undone."""
    if key.endswith(".weight"):
        return full_precision(tensors, key, device).clone()
    return tensors[key].to(device, torch.float32, copy=True)


def mlp_parameters(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Names of the MLPs' parameters, which from now on are the only ones of `model` to require gradients.

    The MLPs alone are trained: both projections in a double block; in a single block the MLP's rows of linear1, and linear2
    whole, since the attention's half of it takes part in making up for cut neurons (as in repair).
    """
    model.requires_grad_(False)
    keys = []
    for site in sites:
        for path in (site.up, site.down):
            for name, weight in model.get_submodule(path).named_parameters():
                weight.requires_grad_(True)
                keys.append(f"{path}.{name}")
                if path == site.up and site.up_row:
                    weight.register_hook(_only_rows_from(site.up_row))
    return keys


def _only_rows_from(first: int):
    """A gradient without the rows before `first`, which make q, k and v. AdamW without decay leaves those where they are."""

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:first] = 0
        return gradient

    return hook


def _seeing(model: nn.Module, path: str, seen: dict[str, Tensor]):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[path] = inputs[0]

    return model.get_submodule(path).register_forward_pre_hook(hook)


def _draw(samples: Tensor, tokens: int, each: int) -> Tensor:
    """Tokens [samples, each or fewer], drawn by each sample's own index."""
    if each >= tokens:
        return torch.arange(tokens).expand(len(samples), -1)
    return torch.stack([torch.randperm(tokens, generator=seeded(f"tokens {s}"))[:each] for s in samples.tolist()])


def _taken(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1])).flatten(0, 1).bfloat16()
