"""Chosen neurons of one model, and directions in the space of its neurons: what is poked.

    neurons.save("three.safetensors")
    neurons = Neurons.load("three.safetensors")
    print(neurons.table())
    without_common = neurons.subtract(Neurons.load("digits.safetensors"))
    plan = neurons.plan(Dense.open(checkpoint))      # cuts them

File, per site S: `S` int32 [n], ascending, and float32 [n] each: `S.mean` (mean of the others), `S.difference` (mean with the
concept less that), `S.spread` (of the others) and `S.effect`; of neurons that were learned, `S.weight` too. Directions have
`S.directions` float32 [n, width] in the place of `S`, and the same four as `S.directions.mean`, ... Everything else is in the
header. Neurons are found in `find.py`, and learned in `learn.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import read_finite, require_format
from ..flux.fingerprint import Fingerprint
from ..flux.layout import FAMILY_NAMES, Layout
from ..parsing import from_json
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan, require_indices
from ..recording.internals import site_order

FORMAT = "flux-poke neurons 1"
DIRECTIONS = ".directions"
#: How far a neuron may be turned.
MOST_WEIGHT = 100.0
_SITE = re.compile(r"(double-(img|txt)|single)-\d{1,4}")


@dataclass(frozen=True)
class Measured:
    """What is known of n neurons of one MLP, or of n directions in their space; float32 [n] each.

    Attributes:
        mean: of the others: what they are turned about. Of a direction, the mean of the activations along it.
        difference: mean with the concept less that of the others. spread: standard deviation of the others.
        effect: what the difference does to the output of the MLP, times how much that moves the velocity, where it is known.
        weight: how far a neuron is turned beside the others: at a factor f by 1 + (f - 1) weight. 1 where that was not learned.
    """

    mean: Tensor
    difference: Tensor
    spread: Tensor
    effect: Tensor
    weight: Tensor

    @classmethod
    def about(cls, mean: Tensor) -> Measured:
        """Of neurons that nothing else is known of than what they are turned about."""
        difference, spread, effect = (torch.zeros(len(mean)) for _ in range(3))
        return cls(mean.float(), difference, spread, effect, torch.ones(len(mean)))

    @property
    def strength(self) -> float:
        """The effects' sum of squares."""
        return self.effect.double().square().sum().item()

    def part(self, which: Tensor) -> Measured:
        return Measured(*(getattr(self, one.name)[which] for one in fields(self)))

    def followed_by(self, other: Measured) -> Measured:
        return Measured(*(torch.cat([getattr(self, one.name), getattr(other, one.name)]) for one in fields(self)))


MEASURES = tuple(one.name for one in fields(Measured))


@dataclass(frozen=True)
class SiteNeurons:
    """Neurons of one MLP: `indices` int64 [n], ascending, in the dense model's numbers."""

    indices: Tensor
    measured: Measured

    def part(self, which: Tensor) -> SiteNeurons:
        return SiteNeurons(self.indices[which], self.measured.part(which))

    def placed(self, values: Tensor, width: int) -> Tensor:
        """What is known of them [n] in their places among all neurons [width]; 0 elsewhere."""
        return torch.zeros(width).index_copy(0, self.indices, values)


@dataclass(frozen=True)
class SiteDirections:
    """Directions in the space of one MLP's neurons as they enter the down projection: `vectors` float32 [n, width].

    They may come from a sparse autoencoder's decoder or from a difference of means; turning them turns what of the activations
    lies in the space that they span.
    """

    vectors: Tensor
    measured: Measured


@dataclass(frozen=True)
class Neurons:
    """Neurons and directions of the model with `fingerprint`, by site.

    Attributes:
        widths: by site, how many neurons the dense model has.
        compared: what was compared, in words.
        sigmas: noise levels that they were found at.
        explained: share of the whole effect (its squares, over all neurons that were compared) that is theirs.
        spare: how much more a change of the others counted than one of the concept, where they were found so.
        factor: by which to turn them to erase the concept as far as they do, where that was worked out (`tune.py`, `learn.py`).
        chance: how many stand out as far among the others alone, some of their recordings against the rest; None where that
            was not measured.
        workflow: ComfyUI's `workflow` and `prompt` of the run that found them.
    """

    family: str
    fingerprint: Fingerprint
    widths: Mapping[str, int]
    sites: Mapping[str, SiteNeurons]
    compared: str
    directions: Mapping[str, SiteDirections] = field(default_factory=dict)
    sigmas: tuple[float, float] = (0.0, 1.0)
    explained: float | None = None
    chance: float | None = None
    spare: float | None = None
    factor: float | None = None
    workflow: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, fingerprint: Fingerprint, indices: Mapping[str, Tensor], compared: str) -> Neurons:
        """Neurons that somebody names, turned about 0; raises `UserError` where the model lacks one."""
        sites = {}
        for name, chosen in indices.items():
            site = layout.site(name)
            kept = chosen.long().unique()
            if not len(kept) or kept[0] < 0 or kept[-1] >= site.width:
                raise UserError(f"{name} has the neurons 0 to {site.width - 1}; found {chosen.tolist()[:5]}.")
            sites[name] = SiteNeurons(kept, Measured.about(torch.zeros(len(kept))))
        return cls(layout.family, fingerprint, {site.name: site.width for site in layout.sites}, sites, compared)

    @property
    def count(self) -> int:
        """How many neurons; directions are not counted."""
        return sum(len(site.indices) for site in self.sites.values())

    @property
    def total(self) -> int:
        return sum(self.widths.values())

    @property
    def learned(self) -> bool:
        """Whether neurons are turned each by as much as was learned."""
        return any((site.measured.weight != 1).any() for site in self.sites.values())

    @property
    def own_factor(self) -> float:
        """To poke with where nobody says another: what erases the concept as far as that is known, else what often does."""
        if self.factor is not None:
            return self.factor
        return 0.0 if self.learned else -1.0

    def strongest(self, count: int) -> list[tuple[str, int, Measured]]:
        """Site, index and what is known of the `count` neurons of the largest effect, largest first."""
        found = [
            (name, int(index), site.measured.part(torch.tensor([place])))
            for name, site in self.sites.items()
            for place, index in enumerate(site.indices)
        ]
        return sorted(found, key=lambda one: (-one[2].effect.item(), one[0], one[1]))[:count]

    def join(self, other: Neurons) -> Neurons:
        """Both together; of a neuron that is in both, what this one knows of it is kept.

        Where each has a factor of its own, weights take their place: at factor 0 every neuron is turned as it was in its file.
        """
        self._require_same(other)
        if self.factor != other.factor:
            return self._weighed().join(other._weighed())
        sites = dict(self.sites)
        for name, new in other.sites.items():
            if name not in sites:
                sites[name] = new
                continue
            own = sites[name]
            new = new.part(~torch.isin(new.indices, own.indices))
            indices, order = torch.cat([own.indices, new.indices]).sort()
            sites[name] = SiteNeurons(indices, own.measured.followed_by(new.measured).part(order))
        directions = dict(self.directions)
        for name, also in other.directions.items():
            had = directions.get(name)
            directions[name] = also if had is None else SiteDirections(
                torch.cat([had.vectors, also.vectors]), had.measured.followed_by(also.measured)
            )  # fmt: skip
        sigmas = (min(self.sigmas[0], other.sigmas[0]), max(self.sigmas[1], other.sigmas[1]))
        compared = self.compared if self.compared == other.compared else f"{self.compared}; {other.compared}"
        return replace(
            self, sites=_ordered(sites), directions=_ordered(directions), compared=compared, sigmas=sigmas, explained=None,
            chance=None, spare=None,
        )  # fmt: skip

    def _weighed(self) -> Neurons:
        """With weights that turn them at factor 0 as their own factor does."""
        sites = {}
        for name, site in self.sites.items():
            weight = (1 - self.own_factor) * site.measured.weight
            sites[name] = replace(site, measured=replace(site.measured, weight=weight))
        return replace(self, sites=sites, factor=0.0)

    def subtract(self, other: Neurons) -> Neurons:
        """Without the neurons of `other`; directions stay."""
        self._require_same(other)
        sites = {}
        for name, own in self.sites.items():
            left = own
            if name in other.sites:
                left = own.part(~torch.isin(own.indices, other.sites[name].indices))
            if len(left.indices):
                sites[name] = left
        compared = f"{self.compared}, without those of: {other.compared}"
        return replace(self, sites=sites, compared=compared, explained=None, chance=None, spare=None)

    def plan(self, dense: Dense) -> PruningPlan:
        """The plan that cuts them.

        Raises `UserError` where there are none, an MLP would be left without neurons, or the model is another.
        """
        self.require(dense.fingerprint, dense.source)
        if not self.sites:
            raise UserError(f"There are no neurons to cut ({self.compared}): choose others.")
        whole = PruningPlan.keeping_all(dense)
        kept = {}
        for name, site in self.sites.items():
            left = torch.ones(self.widths[name], dtype=torch.bool)
            left[site.indices] = False
            kept[name] = left.nonzero().squeeze(1)
            if not len(kept[name]):
                raise UserError(f"All {self.widths[name]:,} neurons of {name} are chosen; at least one has to stay.")
        return replace(
            whole, kept=_ordered(kept), score="neurons", made=f"cuts {self.count:,} chosen neurons ({self.compared})"
        )

    def require(self, fingerprint: Fingerprint, what: str) -> None:
        """Raises `UserError` where they are neurons of another model than the one with `fingerprint`, called `what`."""
        if not self.fingerprint.matches(fingerprint):
            raise UserError(
                f"The neurons are of another model than {what}: {self.fingerprint.difference(fingerprint)}. Choose those that "
                "were found in it, or find them again."
            )

    def kept_by(self, plan: PruningPlan) -> Mapping[str, Tensor] | None:
        """Which neurons of their model `plan` keeps, by site; None where it is of another model.

        Raises `UserError` where that is not known of their sites.
        """
        if not self.fingerprint.matches(plan.fingerprint):
            return None
        if unknown := sorted(plan.unknown.keys() & self.sites.keys()):
            raise UserError(
                f"Which neurons of {unknown[0]} were kept is not known: neurons cannot be found again in this model."
            )
        return plan.kept

    def _require_same(self, other: Neurons) -> None:
        if not self.fingerprint.matches(other.fingerprint):
            raise UserError(
                f"The neurons are of two models: {self.fingerprint.difference(other.fingerprint)}. Choose neurons of one model."
            )

    def totals(self) -> str:
        """How many, of what, and what is known of them together, in one line."""
        said = [f"{FAMILY_NAMES[self.family]}: {self.count:,} of {self.total:,} neurons ({self.count / self.total:.2%})"]  # type: ignore[index]
        if count := sum(len(site.vectors) for site in self.directions.values()):
            said.append(f"{count:,} directions")
        said.append(self.compared)
        if self.sigmas != (0.0, 1.0):
            said.append(f"noise levels {self.sigmas[0]:g} to {self.sigmas[1]:g}")
        if self.explained is not None:
            said.append(f"{self.explained:.1%} of the effect of all")
        if self.chance is not None:
            said.append(f"as far apart among the others alone: {self.chance:,.3g} neurons")
        if self.learned:
            said.append("each turned by a weight of its own")
        if self.factor is not None:
            said.append(f"turned with factor {self.factor:g}")
        return "; ".join(said)

    def table(self, count: int = 20) -> str:
        """Text: the totals, neurons and effect by site, and the `count` strongest."""
        lines = [self.totals(), f"{'site':<16}{'neurons':>9}{'of':>8}{'effect':>12}"]
        for name in sorted({*self.sites, *self.directions}, key=site_order):
            known = [found.measured for found in (self.sites.get(name), self.directions.get(name)) if found is not None]
            effect = math.sqrt(sum(one.strength for one in known))
            number = len(self.sites[name].indices) if name in self.sites else 0
            lines.append(f"{name:<16}{number:>9,}{self.widths[name]:>8,}{effect:>12.3g}")
        heading = f"{'strongest':<20}{'others':>10}{'difference':>12}{'in spreads':>12}{'effect':>12}"
        lines.append(f"{heading}{'weight':>9}" if self.learned else heading)
        for name, index, known_of in self.strongest(count):
            spreads = known_of.difference.item() / known_of.spread.item() if known_of.spread.item() else math.nan
            line = (
                f"{f'{name}:{index}':<20}{known_of.mean.item():>10.3g}{known_of.difference.item():>12.3g}"
                f"{spreads:>12.2f}{known_of.effect.item():>12.3g}"
            )
            lines.append(f"{line}{known_of.weight.item():>9.2f}" if self.learned else line)
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str], graph: Mapping[str, str] | None = None) -> None:
        """Writes the file as a whole; its header also holds the `graph` that found them."""
        tensors: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            tensors |= {name: site.indices.int(), **_named(name, site.measured)}
        for name, found in self.directions.items():
            tensors |= {f"{name}{DIRECTIONS}": found.vectors, **_named(f"{name}{DIRECTIONS}", found.measured)}
        facts = {
            "widths": dict(self.widths), "compared": self.compared, "sigmas": self.sigmas, "explained": self.explained,
            "chance": self.chance, "spare": self.spare, "factor": self.factor,
        }  # fmt: skip
        header = {"format": FORMAT, "family": self.family, "model": self.fingerprint.to_json(), "neurons": json.dumps(facts)}
        write_safetensors(path, tensors, {**self.workflow, **(graph or {}), **header})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Neurons:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        if not Path(path).is_file():
            raise UserError(f"There are no neurons {path}: find them (Find Neurons, or `uv run flux-poke neurons find`).")
        tensors, metadata = read_finite(path)
        header = require_format(metadata, path, FORMAT, "file of neurons")
        try:
            return cls._read(tensors, header)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, SafetensorError) as error:
            raise UserError(f"{path} is a damaged file of neurons ({error}): find them again.") from error

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Neurons:
        facts = from_json(header["neurons"])
        widths = {str(name): int(width) for name, width in facts["widths"].items()}
        names = [key.removesuffix(DIRECTIONS) for key in tensors if key.rpartition(".")[2] not in MEASURES]
        for name in (*widths, *names):
            if not _SITE.fullmatch(name) or name not in widths or widths[name] < 1:
                raise ValueError(f"it names an MLP {name!r}, which the model does not have")
        sites, directions = {}, {}
        for name in sorted({*names}, key=site_order):
            if name in tensors:
                indices = require_indices(tensors[name], widths[name], name)
                sites[name] = SiteNeurons(indices, _measured(tensors, name, len(indices)))
            if (key := f"{name}{DIRECTIONS}") in tensors:
                vectors = tensors[key].float()
                if vectors.ndim != 2 or vectors.shape[1] != widths[name] or not (vectors.norm(dim=1) > 0).all():
                    raise ValueError(
                        f"the directions of {name} are {tuple(vectors.shape)}, expected [n, {widths[name]}], not 0"
                    )
                directions[name] = SiteDirections(vectors, _measured(tensors, key, len(vectors)))
        low, high = (float(level) for level in facts["sigmas"])
        if not 0 <= low <= high <= 1:
            raise ValueError(f"noise levels {low:g} to {high:g}, expected two from 0 to 1")
        explained, chance, spare, factor = (
            None if facts[one] is None else float(facts[one]) for one in ("explained", "chance", "spare", "factor")
        )
        if header["family"] not in FAMILY_NAMES:
            raise ValueError(f"its family is {header['family']!r}")
        return cls(
            header["family"], Fingerprint.from_json(header["model"]), widths, sites, str(facts["compared"]), directions,
            (low, high), explained, chance, spare, factor,
            {key: header[key] for key in ("workflow", "prompt") if key in header},
        )  # fmt: skip


def unit(vectors: Tensor) -> Tensor:
    """Rows [n, width] of length 1, float32; raises `UserError` where one is 0 or not finite."""
    lengths = vectors.float().norm(dim=1, keepdim=True)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise UserError("A direction is a vector of finite numbers that are not all 0.")
    return vectors.float() / lengths


def _named(key: str, measured: Measured) -> dict[str, Tensor]:
    """Weights are named where one is not 1."""
    names = [name for name in MEASURES if name != "weight" or (measured.weight != 1).any()]
    return {f"{key}.{name}": getattr(measured, name).float().contiguous() for name in names}


def _measured(tensors: Mapping[str, Tensor], key: str, count: int) -> Measured:
    known = {f"{key}.weight": torch.ones(count)} | dict(tensors)
    found = [known[f"{key}.{name}"] for name in MEASURES]
    if any(one.shape != (count,) or not one.is_floating_point() for one in found):
        raise ValueError(f"what is known of {key} is of other lengths than its {count}")
    measured = Measured(*(one.float() for one in found))
    if (measured.weight.abs() > MOST_WEIGHT).any():
        raise ValueError(f"weights of {key} are beyond {MOST_WEIGHT:g}")
    return measured


def _ordered(found: dict) -> dict:
    return {name: found[name] for name in sorted(found, key=site_order)}
