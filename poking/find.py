"""Finding the neurons of a concept: what differs between recordings with it and recordings without.

    found = find(tensors, layout, with_it, without, Search(share=0.02))
    print(found.table())

`with_it` and `without` are internals of one model, one file each or several: of several without the concept, a control tells
how many neurons chance would give.

With m_j, q_j a neuron's mean and mean square with the concept, m'_j, v'_j its mean and variance without, and W2[:, j] its
column of the down projection, turning it about m'_j changes the output of its MLP on drawings of the concept by

    gain_j = |W2[:, j]|^2 E[(h_j - m'_j)^2] = |W2[:, j]|^2 (q_j - 2 m_j m'_j + m'_j^2)

and on all others by cost_j = |W2[:, j]|^2 v'_j, both squared and a token's mean. Those of the largest gain_j - `spare` cost_j
are chosen: of all choices of as many neurons with as much change of the others, none changes the concept more (Lagrange), as
far as neurons add up. A difference of means alone also takes those that other concepts share, which cost most.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Layout, Site
from ..flux.weights import SiteWeights
from ..recording.internals import Internals
from ..recording.statistics import SiteInternals
from .neurons import Measured, Neurons, SiteNeurons

#: How much more a change of other drawings counts than one of the concept's, by default.
SPARE = 10.0
#: How often the drawings without the concept are split at random for the control.
SHUFFLES = 20


@dataclass(frozen=True)
class Search:
    """What is looked for: `count` neurons, or else a `share` of all of the model's; in `sites`, or else in all.

    `spare` is how much more a change of the others counts than one of the concept (0: they do not count). `chance`: whether the
    control is worked out, by draws of `seed`. Raises `UserError` where nothing would be found.
    """

    count: int | None = None
    share: float = 0.02
    sites: tuple[Site, ...] | None = None
    spare: float = SPARE
    chance: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UserError(f"At least 1 neuron is to be found; {self.count} were asked for.")
        if not 0 < self.share <= 1:
            raise UserError(f"The share of neurons is above 0 and at most 1; found {self.share}.")
        if not 0 <= self.spare < float("inf"):
            raise UserError(f"How much the others count is a number from 0 on; found {self.spare}.")

    def number(self, layout: Layout) -> int:
        return self.count or max(1, int(self.share * layout.neurons))


@dataclass(frozen=True)
class Scored:
    """What is known of all neurons of one MLP [width], and by how much they are to be chosen."""

    measured: Measured
    score: Tensor

    @classmethod
    def of(cls, concept: SiteInternals, others: SiteInternals, columns: Tensor, spare: float) -> Scored:
        """`columns` [width] are the lengths of the columns of the down projection."""
        mean, variance = others.mean, others.variance
        difference = concept.mean - mean
        gain = columns**2 * (concept.variance + difference**2)
        effect = difference.abs() * columns
        measured = Measured(mean.float(), difference.float(), variance.sqrt().float(), effect.float(), torch.ones(len(mean)))
        return cls(measured, (gain - spare * columns**2 * variance).float())


def find(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    concept: Sequence[Internals],
    others: Sequence[Internals],
    what: Search | None = None,
    compared: str = "with against without",
) -> Neurons:
    """The neurons of the concept; `tensors` (canonical keys) are the dense model's, of which down projections are read.

    Raises `UserError` where the recordings are of several models, or have none of the sites.
    """
    what = what or Search()
    with_it, without = _together(concept, "with"), _together(others, "without")
    if with_it.fingerprint is None or without.fingerprint is None:
        raise UserError("The counts of the original flux-poke hold no means: record internals again (Record, Calibrate).")
    if not with_it.fingerprint.matches(without.fingerprint):
        raise UserError(
            "The recordings with and without are of two models: "
            f"{with_it.fingerprint.difference(without.fingerprint)}. Record both with one model."
        )
    widths = {site.name: site.width for site in layout.sites}
    for recorded, name in ((with_it, "The recording with"), (without, "The recording without")):
        for site in layout.sites:
            found = recorded.sites.get(site.name)
            if found is None or len(found.fires) != site.width:
                raise UserError(
                    f"{name} is not of this model: {site.name} has {site.width:,} neurons. Choose its own recording."
                )
    columns = {
        site.name: SiteWeights.read(tensors, site, up=False).down.norm(dim=0).double() for site in what.sites or layout.sites
    }
    scored = {name: Scored.of(with_it.sites[name], without.sites[name], columns[name], what.spare) for name in columns}
    chosen, least = strongest({name: one.score for name, one in scored.items()}, what.number(layout))
    sites = {
        name: SiteNeurons(indices, scored[name].measured.part(indices)) for name, indices in chosen.items() if len(indices)
    }
    everything = sum(one.measured.strength for one in scored.values())
    explained = sum(site.measured.strength for site in sites.values()) / max(everything, 1e-300)
    chance = by_chance(others, len(concept), columns, what, least) if what.chance and len(others) > len(concept) else None
    return Neurons(
        layout.family, with_it.fingerprint, widths, sites, compared, explained=explained, chance=chance,
        spare=what.spare,
    )  # fmt: skip


def strongest(scores: Mapping[str, Tensor], number: int) -> tuple[dict[str, Tensor], float]:
    """The `number` neurons of the largest scores above 0, ascending by site, and the least score among them.

    Raises `UserError` where none is above 0.
    """
    flat = torch.cat(list(scores.values()))
    best = flat.topk(min(number, len(flat)))
    least = max(best.values[-1].item(), torch.finfo(torch.float32).tiny)
    if best.values[0].item() < least:
        raise UserError(
            "No neuron changes the concept's drawings by more than it changes the others: compare drawings that differ more, "
            "or let the others count less."
        )
    chosen, first = {}, 0
    for name, score in scores.items():
        own = best.indices[(best.indices >= first) & (best.indices < first + len(score)) & (best.values >= least)] - first
        chosen[name] = own.sort().values
        first += len(score)
    return chosen, least


def by_chance(others: Sequence[Internals], size: int, columns: Mapping[str, Tensor], what: Search, least: float) -> float:
    """How many neurons reach the score `least` among the others alone: `size` of their recordings stand for those with the
    concept, drawn at random, the mean over `SHUFFLES` draws. Where all are of the same prompts, that is what chance gives; of
    one prompt each, they differ as these prompts do."""
    counts = []
    for number in range(SHUFFLES):
        parts = shuffled(others, size, what.seed + number)
        with_it, without = (
            {name: reduce(SiteInternals.__add__, [one.sites[name] for one in part]) for name in columns} for part in parts
        )
        scores = (Scored.of(with_it[name], without[name], columns[name], what.spare).score for name in columns)
        counts.append(sum(int((score >= least).sum()) for score in scores))
    return sum(counts) / len(counts)


def shuffled(others: Sequence[Internals], size: int, seed: int = 0) -> tuple[list[Internals], list[Internals]]:
    """`size` of `others`, drawn at random, and the rest: what a control compares in the place of a concept and the others."""
    drawn = {*random.Random(seed).sample(range(len(others)), size)}
    return [one for n, one in enumerate(others) if n in drawn], [one for n, one in enumerate(others) if n not in drawn]


def _together(recorded: Sequence[Internals], what: str) -> Internals:
    if not recorded:
        raise UserError(f"There is no recording {what} the concept: at least one is needed.")
    return reduce(Internals.merge, recorded)
