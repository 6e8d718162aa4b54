"""A pruning plan: which neurons of which MLPs are kept. A value, to be looked at, saved and passed on before any cut.

    plan = by_count(dense, rankings, img_cut=2000, txt_cut=2000, score="frequency")
    plan.save("plan.safetensors")
    plan = PruningPlan.load("plan.safetensors")
    print(plan.table())

File: key `S` int32 [kept] per site S; everything else is in the header. The same recording gives the same plan. Plans by budget
are made in `budget.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import open_safetensors, require_format
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Layout, select_sites
from ..recording.internals import Internals, site_order
from .dense import Dense
from .scores import Ranking, predicted_errors, require_internals

FORMAT = "flux-poke plan 1"

#: First and last block of a range, both in it; None = all of them.
Layers = tuple[int, int] | None


@dataclass(frozen=True)
class PruningPlan:
    """Kept neurons of the model with `fingerprint`.

    Attributes:
        kept: by site, indices in ascending order, int64. Sites that are not named stay whole.
        widths: by site, how many neurons the dense model has.
        score: what ranked them. made: how, in words.
        predicted: by site, predicted squared error of its output relative to the output's energy, if the score predicts it.
        velocity_error: predicted relative squared error of the velocity, where amplifications were measured.
        unknown: by site, how many neurons are kept where nobody wrote down which: layers of the original flux-poke.
    """

    family: str
    fingerprint: Fingerprint
    kept: Mapping[str, Tensor]
    widths: Mapping[str, int]
    score: str
    made: str
    predicted: Mapping[str, float] = field(default_factory=dict)
    velocity_error: float | None = None
    unknown: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def keeping_all(cls, dense: Dense) -> PruningPlan:
        """The plan that cuts nothing."""
        return cls(dense.layout.family, dense.fingerprint, {}, _widths(dense.layout), "none", "keeps everything")

    @property
    def cut(self) -> dict[str, int]:
        """By site, how many neurons go."""
        left = {**{name: len(indices) for name, indices in self.kept.items()}, **self.unknown}
        return {name: self.widths[name] - count for name, count in left.items()}

    @property
    def neurons(self) -> tuple[int, int]:
        """Kept neurons, and all."""
        total = sum(self.widths.values())
        return total - sum(self.cut.values()), total

    @property
    def masked_count(self) -> str:
        """How many neurons go, by stream: "img{n}_txt{n}_single{n}"."""
        totals = {"img": 0, "txt": 0, "single": 0}
        for name, count in self.cut.items():
            totals[name.split("-")[-2]] += count
        return "_".join(f"{stream}{count}" for stream, count in totals.items())

    @property
    def digest(self) -> str:
        """Hexadecimal; equal for equal cuts of one model."""
        content = hashlib.sha256(self.fingerprint.shapes.encode())
        content.update(json.dumps(self.fingerprint.values).encode())
        for name in sorted(self.kept):
            content.update(f"{name} {self.kept[name].tolist()}".encode())
        return content.hexdigest()

    def removed(self, site: str) -> Tensor:
        """Indices of the neurons of `site` that go, ascending, int64."""
        gone = torch.ones(self.widths[site], dtype=torch.bool)
        gone[self.kept[site]] = False
        return gone.nonzero().squeeze(1)

    def require(self, dense: Dense) -> None:
        """Raises `UserError` where the plan is of another model than `dense`."""
        if not self.fingerprint.matches(dense.fingerprint):
            raise UserError(
                f"The plan was made for another model than {dense.source}: {self.fingerprint.difference(dense.fingerprint)}. "
                "Choose the checkpoint it was made for, or make a new plan."
            )

    def table(self) -> str:
        """Text, one line per site: width, kept, cut, predicted error."""
        kept, total = self.neurons
        lines = [f"{self.made}: {kept:,} of {total:,} neurons kept ({kept / total:.1%})"]
        if self.velocity_error is not None:
            lines.append(f"predicted relative velocity error {self.velocity_error:.3g}")
        lines.append(f"{'site':<16}{'width':>8}{'kept':>8}{'cut':>8}{'predicted error':>18}")
        for name in sorted(self.cut, key=site_order):
            width, gone = self.widths[name], self.cut[name]
            error = f"{self.predicted[name]:.3g}" if name in self.predicted else "–"
            lines.append(f"{name:<16}{width:>8}{width - gone:>8}{gone / width:>8.1%}{error:>18}")
        if self.unknown:
            lines.append(f"Which neurons were kept is not known of {', '.join(sorted(self.unknown, key=site_order))}.")
        return "\n".join(lines)

    def part(self, sites: Collection[str]) -> PruningPlan:
        """What it says of some sites; the others stay whole."""

        def of_these(values: Mapping) -> dict:
            return {name: value for name, value in values.items() if name in sites}

        kept, predicted, unknown = map(of_these, (self.kept, self.predicted, self.unknown))
        return replace(self, kept=kept, predicted=predicted, velocity_error=None, unknown=unknown)

    def joined(self, other: PruningPlan) -> PruningPlan:
        """Both together, plans of one model for different sites."""
        said = {(self.score, self.made), (other.score, other.made)}
        score, made = ("; ".join(sorted(set(words))) for words in zip(*said, strict=True))
        return replace(
            self, kept={**self.kept, **other.kept}, score=score, made=made, predicted={**self.predicted, **other.predicted},
            velocity_error=None, unknown={**self.unknown, **other.unknown},
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file as a whole, in place of what was there."""
        write_safetensors(path, {name: indices.int() for name, indices in self.kept.items()}, self.header())

    def header(self) -> dict[str, str]:
        """Everything but the indices, as safetensors metadata."""
        facts = {
            "widths": dict(self.widths), "score": self.score, "made": self.made, "predicted": dict(self.predicted),
            "velocity_error": self.velocity_error, "unknown": dict(self.unknown),
        }  # fmt: skip
        return {"format": FORMAT, "family": self.family, "model": self.fingerprint.to_json(), "plan": json.dumps(facts)}

    @classmethod
    def from_header(cls, header: Mapping[str, str], kept: Mapping[str, Tensor]) -> PruningPlan:
        """Raises `KeyError` or `ValueError` where `header` is none of a plan's."""
        facts = json.loads(header["plan"])
        return cls(
            family=header["family"],
            fingerprint=Fingerprint.from_json(header["model"]),
            kept={name: kept[name].long() for name in sorted(kept, key=site_order)},
            widths={name: int(width) for name, width in facts["widths"].items()},
            score=facts["score"],
            made=facts["made"],
            predicted=facts["predicted"],
            velocity_error=facts["velocity_error"],
            unknown=facts.get("unknown", {}),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        if not Path(path).is_file():
            raise UserError(f"There is no plan {path}: make one with a Plan Pruning node, or with `flux-poke plan`.")
        with open_safetensors(path) as file:
            header = require_format(file.metadata(), path, FORMAT, "pruning plan")
            try:
                return cls.from_header(header, {key: file.get_tensor(key) for key in file.keys()})
            except (KeyError, ValueError, TypeError, SafetensorError) as error:
                raise UserError(f"{path} is a damaged pruning plan ({error}): make it again.") from error


def by_count(
    dense: Dense,
    rankings: Mapping[str, Ranking],
    score: str,
    img_cut: int = 0,
    txt_cut: int = 0,
    single_cut: int = 0,
    double: Layers = None,
    single: Layers = None,
) -> PruningPlan:
    """Cuts so many neurons of every img, txt and single MLP in the given ranges of blocks.

    Raises `UserError` where a cut leaves nothing of an MLP, or a range is outside of the model.
    """
    cuts = {"img": img_cut, "txt": txt_cut, "single": single_cut}
    sites = select_sites(dense.layout, double, single)
    for site in sites:
        cut = cuts[site.stream]
        if not 0 <= cut < site.width:
            raise UserError(
                f"{site.stream}_cut is {cut:,}, but {site.name} has {site.width:,} neurons: cut 0 to {site.width - 1:,}."
            )
    counts = {site.name: cuts[site.stream] for site in sites if cuts[site.stream]}
    made = f"by count, img {img_cut:,} txt {txt_cut:,} single {single_cut:,}{_ranges(double, single)}, score {score}"
    return from_rankings(dense, rankings, counts, score, made)


def by_threshold(
    dense: Dense,
    internals: Internals,
    img_threshold: float = 0,
    txt_threshold: float = 0,
    single_threshold: float = 0,
    on: Literal["counts", "rate"] = "counts",
    double: Layers = None,
    single: Layers = None,
) -> PruningPlan:
    """Keeps the neurons that fired at least so often: in all (counts, as the original) or per token (rate, 0 to 1).

    Raises `UserError` where a threshold leaves nothing of an MLP, or a range is outside of the model.
    """
    thresholds = {"img": img_threshold, "txt": txt_threshold, "single": single_threshold}
    sites = select_sites(dense.layout, double, single)
    internals = require_internals(internals, dense, sites, "a plan by threshold")
    kept = {}
    for site in sites:
        recorded, threshold = internals.sites[site.name], thresholds[site.stream]
        value = recorded.fires if on == "counts" else recorded.rate
        keep = (value >= threshold).nonzero().squeeze(1)
        if not len(keep):
            raise UserError(
                f"{site.stream}_threshold is {threshold:g}, and no neuron of {site.name} fired that often (the most frequent "
                f"one: {value.max().item():g}): all of them would be cut. Choose a lower threshold."
            )
        if len(keep) < site.width:
            kept[site.name] = keep
    limits = f"img {img_threshold:g} txt {txt_threshold:g} single {single_threshold:g}"
    made = f"by threshold on {on}, {limits}{_ranges(double, single)}"
    return PruningPlan(dense.layout.family, dense.fingerprint, kept, _widths(dense.layout), "frequency", made)


def from_rankings(
    dense: Dense,
    rankings: Mapping[str, Ranking],
    cuts: Mapping[str, int],
    score: str,
    made: str,
    velocity_error: float | None = None,
) -> PruningPlan:
    """The plan that cuts the first `cuts[site]` neurons of each ranking."""
    missing = [name for name, cut in cuts.items() if cut and name not in rankings]
    if missing:
        raise UserError(f"{missing[0]} was not ranked, but is to be cut: rank all MLPs that the plan may touch.")
    kept = {name: rankings[name].order[cut:].sort().values for name, cut in cuts.items() if cut}
    widths = _widths(dense.layout)
    return PruningPlan(
        dense.layout.family, dense.fingerprint, kept, widths, score, made, predicted_errors(rankings, kept), velocity_error
    )


def plan_figure(plan: PruningPlan) -> Figure:
    """Kept and cut neurons of every MLP, side by side."""
    names = sorted(plan.widths, key=site_order)
    cut = [plan.cut.get(name, 0) for name in names]
    kept = [plan.widths[name] - gone for name, gone in zip(names, cut, strict=True)]
    figure = Figure(figsize=(8, max(3.0, 0.17 * len(names) + 1.4)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(names, kept, color="#4c5b8c", label="kept")
    axes.barh(names, cut, left=kept, color="#d9d4c8", label="cut")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(5, min(9, 400 / len(names))))
    axes.set(title=f"{plan.neurons[0]:,} of {plan.neurons[1]:,} neurons kept", xlabel="neurons")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    return figure


def _widths(layout: Layout) -> dict[str, int]:
    return {site.name: site.width for site in layout.sites}


def _ranges(double: Layers, single: Layers) -> str:
    parts = [f"{kind} blocks {r[0]} to {r[1]}" for kind, r in (("double", double), ("single", single)) if r is not None]
    return " in " + ", ".join(parts) if parts else ""
