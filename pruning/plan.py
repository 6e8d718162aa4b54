"""A pruning plan: which neurons of which MLPs are kept, and which rank modulation layers are left with. A value, to be looked
at, saved and passed on before any cut.

    plan.save("plan.safetensors")
    plan = PruningPlan.load("plan.safetensors")
    print(plan.table())

File: key `S` int32 [kept] per site S; everything else is in the header. The same recording gives the same plan. Plans are made
in `planning.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..files import size_text, write_safetensors
from ..flux.checkpoint import open_safetensors, require_format
from ..flux.fingerprint import Fingerprint
from ..parsing import finite, from_json
from ..recording.amplification import MODULATION
from ..recording.internals import site_order
from .curves import Ranking
from .dense import Dense

FORMAT = "flux-poke plan 1"
_SITE = re.compile(r"(double-(img|txt)|single)-\d{1,4}")


@dataclass(frozen=True)
class PruningPlan:
    """Kept neurons of the model with `fingerprint`.

    Attributes:
        kept: by site, indices in ascending order, int64. Sites that are not named stay whole.
        widths: by site, how many neurons the dense model has.
        score: what ranked them. made: how, in words.
        ranks: by site, what rank the modulation layer of its stream of the block is left with; it stays whole elsewhere.
        predicted: by site, predicted squared error of its output relative to the output's energy, if the score predicts it;
            `S.modulation` for the modulation layer of site S.
        velocity_error: predicted relative squared error of the velocity, where amplifications were measured.
        unknown: by site, how many neurons are kept where nobody wrote down which: layers of the original flux-poke.
        checkpoint, recording: paths of the dense file and of the recording's folder, where the plan was made from files.
        settings: what was asked for, as data: `by` (count, threshold or budget) and the fields of that request.
        sizes: bytes, of a plan by budget: of the dense model and of the file in the precision asked for ("dense", "file"), and
            what cutting saves of that ("neurons", "ranks").
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
    checkpoint: str = ""
    recording: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def keeping_all(cls, dense: Dense) -> PruningPlan:
        """The plan that cuts nothing."""
        layout, made = dense.layout, "keeps everything"
        widths = {site.name: site.width for site in layout.sites}
        return cls(layout.family, dense.fingerprint, {}, widths, "none", made, checkpoint=dense.path)

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
    def precision(self) -> str:
        """What its file is to be saved in, where a budget counted in it."""
        return str(self.settings.get("precision", "stored"))

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
        if self.ranks:
            content.update(json.dumps(self.ranks, sort_keys=True).encode())
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

    def totals(self) -> str:
        """`facts` in one line."""
        return "; ".join(self.facts())

    def facts(self) -> list[str]:
        """How it was made and what is kept, its size, and the predicted error of the whole model."""
        kept, total = self.neurons
        said = [f"{self.made}: {kept:,} of {total:,} neurons kept ({kept / total:.1%})"]
        if self.ranks:
            least, most = min(self.ranks.values()), max(self.ranks.values())
            said.append(f"{len(self.ranks)} of {len(self.widths)} modulation layers of rank {least} to {most}")
        if self.sizes:
            gone = {"neurons": self.sizes["neurons"], "modulation": self.sizes["ranks"]}
            parts = ", ".join(f"{what} -{size_text(size)}" for what, size in gone.items() if size)
            said.append(f"{size_text(self.sizes['file'])} instead of {size_text(self.sizes['dense'])} ({parts})")
        if self.velocity_error is not None:
            said.append(f"predicted relative velocity error {self.velocity_error:.3g}")
        return said

    def table(self) -> str:
        """Text: the totals, then a line for each site that is cut (width, kept, cut, predicted error), and for each modulation
        layer that is truncated (rank, predicted error)."""
        return "\n".join([self.totals(), *self.rows()])

    def rows(self) -> list[str]:
        """Of the table, all but the totals."""
        lines = [f"{'site':<16}{'width':>8}{'kept':>8}{'cut':>8}{'predicted error':>18}"]
        for name in sorted(self.cut, key=site_order):
            width, gone = self.widths[name], self.cut[name]
            error = f"{self.predicted[name]:.3g}" if name in self.predicted else "-"
            lines.append(f"{name:<16}{width:>8}{width - gone:>8}{gone / width:>8.1%}{error:>18}")
        if self.ranks:
            lines.append(f"{'modulation of':<16}{'rank':>8}{'predicted error':>34}")
            for name in sorted(self.ranks, key=site_order):
                key = f"{name}{MODULATION}"
                error = f"{self.predicted[key]:.3g}" if key in self.predicted else "-"
                lines.append(f"{name:<16}{self.ranks[name]:>8}{error:>34}")
        if self.unknown:
            lines.append(f"Which neurons were kept is not known of {', '.join(sorted(self.unknown, key=site_order))}.")
        return lines

    def part(self, sites: Collection[str]) -> PruningPlan:
        """What it says of some sites; the others stay whole."""

        def of_these(values: Mapping) -> dict:
            return {name: value for name, value in values.items() if name.removesuffix(MODULATION) in sites}

        kept, ranks, predicted, unknown = map(of_these, (self.kept, self.ranks, self.predicted, self.unknown))
        return replace(self, kept=kept, ranks=ranks, predicted=predicted, velocity_error=None, unknown=unknown, sizes={})

    def joined(self, other: PruningPlan) -> PruningPlan:
        """Both together, plans of one model for different sites."""
        said = {(self.score, self.made), (other.score, other.made)}
        score, made = ("; ".join(sorted(set(words))) for words in zip(*said, strict=True))
        return replace(
            self, kept={**self.kept, **other.kept}, score=score, made=made, predicted={**self.predicted, **other.predicted},
            velocity_error=None, unknown={**self.unknown, **other.unknown},
            recording=self.recording if self.recording == other.recording else "",
            settings=self.settings if self.settings == other.settings else {}, ranks={**self.ranks, **other.ranks}, sizes={},
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str], graph: Mapping[str, str] | None = None) -> None:
        """Writes the file as a whole, in place of what was there; its header also holds the `graph` that made it."""
        header = {**(graph or {}), **self.header()}
        write_safetensors(path, {name: indices.int() for name, indices in self.kept.items()}, header)

    def header(self) -> dict[str, str]:
        """Everything but the indices, as safetensors metadata."""
        apart = ("family", "fingerprint", "kept")
        facts = {fact.name: getattr(self, fact.name) for fact in fields(self) if fact.name not in apart}
        return {"format": FORMAT, "family": self.family, "model": self.fingerprint.to_json(), "plan": json.dumps(facts)}

    @classmethod
    def from_header(cls, header: Mapping[str, str], kept: Mapping[str, Tensor]) -> PruningPlan:
        """The plan of a header and the kept indices beside it; this is where both are checked, for every kind of file.

        Raises `ValueError` where `header` is not a plan's, or a site's indices are not whole numbers in ascending order, all
        below the site's width, at least one.
        """
        try:
            facts = from_json(header["plan"])
            velocity = facts["velocity_error"]
            plan = cls(
                family=str(header["family"]),
                fingerprint=Fingerprint.from_json(header["model"]),
                kept={},
                widths={name: _whole(width, name) for name, width in facts["widths"].items()},
                score=str(facts["score"]),
                made=str(facts["made"]),
                predicted={name: finite(error, name) for name, error in facts["predicted"].items()},
                velocity_error=None if velocity is None else finite(velocity, "the velocity error"),
                unknown={name: _whole(count, name) for name, count in facts.get("unknown", {}).items()},
                checkpoint=str(facts.get("checkpoint", "")),
                recording=str(facts.get("recording", "")),
                settings=dict(facts.get("settings", {})),
                ranks={name: _whole(rank, name) for name, rank in facts.get("ranks", {}).items()},
                sizes={what: _whole(size, what, least=0) for what, size in facts.get("sizes", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"its header lacks or misstates {error}") from error
        for name in (*plan.widths, *kept, *plan.unknown, *plan.ranks):
            if not _SITE.fullmatch(name) or name not in plan.widths:
                raise ValueError(f"it names an MLP {name!r}, which the model does not have")
        for name, count in plan.unknown.items():
            if count > plan.widths[name]:
                raise ValueError(f"it keeps {count} of the {plan.widths[name]} neurons of {name}")
        return replace(
            plan, kept={name: require_indices(kept[name], plan.widths[name], name) for name in sorted(kept, key=site_order)}
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        if not Path(path).is_file():
            raise UserError(f"There is no plan {path}: make one with a Plan Pruning node, or with `uv run flux-poke plan`.")
        with open_safetensors(path) as file:
            header = require_format(file.metadata(), path, FORMAT, "pruning plan")
            try:
                return cls.from_header(header, {key: file.get_tensor(key) for key in file.keys()})
            except (ValueError, SafetensorError) as error:
                raise UserError(f"{path} is a damaged pruning plan ({error}): make it again.") from error


def require_indices(kept: Tensor, width: int, site: str) -> Tensor:
    """`kept` as int64; raises `ValueError` where it is not one or more whole numbers in ascending order below `width`."""
    if kept.ndim != 1 or kept.dtype not in (torch.int32, torch.int64) or not len(kept):
        raise ValueError(f"the kept neurons of {site} are {kept.dtype} {tuple(kept.shape)}, expected at least one whole number")
    kept = kept.long()
    if kept[0] < 0 or kept[-1] >= width or (kept[1:] <= kept[:-1]).any():
        raise ValueError(f"the kept neurons of {site} are not ascending numbers from 0 to {width - 1}")
    return kept


def from_rankings(dense: Dense, rankings: Mapping[str, Ranking], cuts: Mapping[str, int], score: str, made: str) -> PruningPlan:
    """The plan that cuts the first `cuts[site]` neurons of each ranking."""
    kept = {name: rankings[name].order[cut:].sort().values for name, cut in cuts.items() if cut}
    predicted = {
        name: ranking.error[cuts[name]].item() / ranking.energy
        for name in kept
        if (ranking := rankings[name]).error is not None
    }
    return replace(PruningPlan.keeping_all(dense), kept=kept, score=score, made=made, predicted=predicted)


def plan_figure(plan: PruningPlan) -> Figure:
    """Kept and cut neurons of every MLP, side by side."""
    names = sorted(plan.widths, key=site_order)
    cut = [plan.cut.get(name, 0) for name in names]
    kept = [plan.widths[name] - gone for name, gone in zip(names, cut, strict=True)]
    figure = Figure(figsize=(8, max(3.0, 0.17 * len(names) + 1.4)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.barh(names, kept, color="#4c5b8c", label="kept")
    axes.barh(names, cut, left=kept, color="#d9d4c8", label="cut")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(5, min(9, 400 / len(names))))
    axes.set(title=f"{plan.neurons[0]:,} of {plan.neurons[1]:,} neurons kept", xlabel="neurons")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _whole(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"it says {value!r} of {name}, expected a whole number from {least} on")
    return value
