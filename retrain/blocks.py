"""Consecutive blocks of a FLUX by themselves, and their training on block states.

    chain = Chain.load(cut, range(3, 5))             # double blocks 3 and 4, at whatever widths `cut` has
    img, txt = chain(states.batch(samples, 3))
    problem = BlockProblem(chain, states, options)   # against the states at 5, which the dense model left

Indices of blocks are those of block states: single blocks count on from the double ones. What is compared is the state after
the *last* block of the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import blocks_of, sites_at
from ..flux.layout import Layout, Site, read_layout
from ..flux.model import Flux, run_blocks
from ..flux.weights import SiteWeights, full_precision
from ..progress import Progress, part, silent
from ..pruning.surgery import Cut, shape_of
from ..recording.block_states import BlockStates, State
from ..recording.store import Rows
from .loop import Trained, train_best
from .options import Options, Report
from .problem import Problem, seeded, squared
from .rows import closed_form

#: Tokens that the closed form is fitted to, in units of the MLP's width.
ROWS_PER_NEURON = 8


class Chain(nn.Module):
    """The blocks of the indices `span`, under their names in the checkpoint, with the modulations that FLUX.2 shares."""

    def __init__(self, layout: Layout, span: range):
        super().__init__()
        if layout.family == "chroma":
            raise UserError("Chroma's blocks get their modulation from outside: retrain its MLPs on rows.")
        self.layout, self.span = layout, span
        whole, self.blocks = Flux(layout), blocks_of(layout)[span.start : span.stop]
        self.double_blocks, self.single_blocks = (
            nn.ModuleDict({str(block.index): whole.get_submodule(block.path) for block in self.blocks if block.kind == kind})
            for kind in ("double", "single")
        )
        if layout.family == "flux2":
            if self.double_blocks:
                self.double_stream_modulation_img = whole.double_stream_modulation_img
                self.double_stream_modulation_txt = whole.double_stream_modulation_txt
            if self.single_blocks:
                self.single_stream_modulation = whole.single_stream_modulation

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], span: range, device: torch.device | str = "cpu") -> Chain:
        """The blocks of a checkpoint (canonical keys), float32; no other tensor of it is read."""
        layout = read_layout({key: shape_of(tensors, key) for key in tensors})
        with torch.device("meta"):
            chain = cls(layout, span)
        chain.load_state_dict({key: full_precision(tensors, key, device).clone() for key in chain.state_dict()}, assign=True)
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
        x: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        attn: dict[str, list[Tensor]] = {site.name: [] for site in self.sites if site.down_column}
        with ExitStack() as hooks:
            seen: dict[str, Tensor] = {}
            for site in self.sites:
                for path in (site.up, site.down):
                    hooks.callback(self.get_submodule(path).register_forward_pre_hook(_seeing(seen, path)).remove)
            for samples, state in states:
                self(state)
                for site in self.sites:
                    tokens = _draw(samples, seen[site.up].shape[1], each).to(seen[site.up].device)
                    x[site.name].append(_taken(seen[site.up], tokens))
                    if site.down_column:
                        attn[site.name].append(_taken(seen[site.down][..., : site.down_column], tokens))
        nothing = torch.zeros(0)  # whose rows they are is known by whoever chose the samples
        return {
            name: Rows(torch.cat(x[name]), torch.cat(attn[name]) if name in attn else None, nothing, nothing, nothing)
            for name in x
        }


class BlockProblem(Problem):
    """A chain against the states after it, only its MLPs trainable, split by image.

    `before` are blocks that the states go through first: to train on what retrained layers give.
    """

    module: Chain

    def __init__(self, chain: Chain, states: BlockStates, options: Options, before: Sequence[Chain] = ()):
        name = "_".join(block.name for block in chain.blocks)
        super().__init__(name, chain, states.image, states.groups, options)
        train_mlps_alone(chain, chain.sites)
        self.states, self.before = states, before
        self.first = (*before, chain)[0].span.start

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

    def closed_form(self, cut: Cut, progress: Progress) -> dict[str, Tensor]:
        """Repaired down projections and biases of the MLPs that `cut` cuts."""
        tensors, kept = cut.dense.tensors, cut.plan.kept
        sites = [site for site in self.module.sites if site.name in kept]
        dense = Chain.load(tensors, self.module.span, self.options.device)
        each = -(-ROWS_PER_NEURON * max(site.width for site in sites) // sum(map(len, self.train)))
        steps = 2 + len(sites)
        fitted, held_out = (
            dense.rows(self.inputs(groups, part(progress, number, steps)), each)
            for number, groups in enumerate((self.train, self.held_out))
        )
        found: dict[str, Tensor] = {}
        for number, site in enumerate(sites, start=2):
            weights, told = SiteWeights.read(tensors, site, self.options.device), part(progress, number, steps)
            repaired = closed_form(weights, kept[site.name], fitted[site.name], held_out[site.name], told)
            found |= {f"{site.down}.{name}": value for name, value in repaired.items()}
        return found


def train_blocks(
    cut: Cut,
    states: BlockStates,
    group: range,
    options: Options,
    before: Sequence[Chain],
    saved: Callable[[str], Path],
    report: Report | None,
    progress: Progress,
) -> Trained:
    """The blocks of `group` together; where no neuron of them is cut, they are measured alone. `saved(name)` is where a
    training's state is kept."""
    chain = Chain.load(cut, group, options.device)
    if any(site.name in cut.plan.kept for site in chain.sites):
        problem = BlockProblem(chain, states, options, before)
        return train_best(problem, partial(problem.closed_form, cut), saved(problem.name), report, progress)
    measured = train_best(BlockProblem(chain, states, replace(options, just_evaluate=True), before), None, progress=progress)
    return replace(measured, tensors={})


def train_mlps_alone(model: nn.Module, sites: Iterable[Site]) -> None:
    """Makes the MLPs' parameters the only ones of `model` to require gradients.

    Both projections in a double block; in a single block the MLP's rows of linear1, and linear2 whole, since the attention's
    half of it takes part in making up for cut neurons (as in repair).
    """
    model.requires_grad_(False)
    for site in sites:
        for path in (site.up, site.down):
            for weight in model.get_submodule(path).requires_grad_(True).parameters():
                if path == site.up and site.up_row:
                    weight.register_hook(_only_rows_from(site.up_row))


def _only_rows_from(first: int):
    """A gradient without the rows before `first`, which make q, k and v. AdamW without decay leaves those where they are."""
    return lambda gradient: torch.cat((torch.zeros_like(gradient[:first]), gradient[first:]))


def _seeing(seen: dict[str, Tensor], path: str):
    return lambda module, inputs: seen.update({path: inputs[0]})


def _draw(samples: Tensor, tokens: int, each: int) -> Tensor:
    """Tokens [samples, each or fewer], drawn by each sample's own index."""
    if each >= tokens:
        return torch.arange(tokens).expand(len(samples), -1)
    return torch.stack([torch.randperm(tokens, generator=seeded(f"tokens {s}"))[:each] for s in samples.tolist()])


def _taken(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1])).flatten(0, 1).bfloat16()
