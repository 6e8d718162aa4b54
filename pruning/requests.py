"""What a plan can be asked for by count or by threshold (`by_budget.py` has the third way), and what comes of it.

    request = ByCount(img=2000)                      # or ByThreshold(img=0.1, on="rate")
    request.check(dense)                             # a sentence where it makes no sense, before neurons are ranked
    request.plan(dense, recording, "cuda", progress)

`planning.make_plan` is how they are answered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from ..analysis.charts import bar_chart
from ..errors import UserError
from ..flux.layout import Layout, Site, select_sites
from ..progress import Progress
from ..recording.internals import site_order
from ..recording.recording import Recording
from .budget import Amounts, BudgetCurve
from .dense import Dense
from .plan import PruningPlan, from_rankings, plan_figure
from .scores import SCORES, rank, require_internals

#: First and last block of a range, both in it; None = all of them.
Layers = tuple[int, int] | None


@dataclass(frozen=True)
class Planned:
    """A plan, sentences on what its reader should know, and of one by budget the curve, how many of its steps were taken, and
    what to ask for to take others."""

    plan: PruningPlan
    notes: tuple[str, ...] = ()
    curve: BudgetCurve | None = None
    taken: int = 0
    amounts: Amounts = field(default_factory=dict)

    def figure(self) -> Figure:
        """Of a budget, memory saved against predicted error with the plan marked; else kept and cut neurons of every MLP."""
        return plan_figure(self.plan) if self.curve is None else self.curve.figure(self.taken)

    def chart(self) -> dict[str, Any]:
        """The same for a page (`analysis/charts.py`)."""
        if self.curve is not None:
            return self.curve.chart(self.taken, self.amounts)
        names, (kept, neurons) = sorted(self.plan.widths, key=site_order), self.plan.neurons
        cut = [self.plan.cut.get(name, 0) for name in names]
        left = [self.plan.widths[name] - gone for name, gone in zip(names, cut, strict=True)]
        return bar_chart(f"{kept:,} of {neurons:,} neurons kept", names, {"kept": left, "cut": cut}, "neurons")


@dataclass(frozen=True, kw_only=True)
class _ByStream:
    """Asks for a number for img, txt and single MLPs each, in the given ranges of blocks."""

    double: Layers = None
    single_blocks: Layers = None

    def _asked(self, layout: Layout, what: str) -> dict[Site, Any]:
        """What is asked for, by MLP; raises `UserError` where a range is outside of the model, or all of it is 0."""
        found = {site: getattr(self, site.stream) for site in select_sites(layout, self.double, self.single_blocks)}
        if not any(found.values()):
            raise UserError(f"Nothing would be cut: all {what} of MLPs in the chosen layers are 0. Raise one.")
        return found

    def _where(self) -> str:
        chosen = (("double", self.double), ("single", self.single_blocks))
        parts = [f"{kind} blocks {layers[0]} to {layers[1]}" for kind, layers in chosen if layers is not None]
        return " in " + ", ".join(parts) if parts else ""


@dataclass(frozen=True)
class ByCount(_ByStream):
    """Cuts so many neurons of every img, txt and single MLP in the given ranges of blocks: the first ones by `score`."""

    img: int = 0
    txt: int = 0
    single: int = 0
    score: str = "fluctuation"

    def check(self, dense: Dense) -> None:
        """Raises `UserError` where a range is outside of the model, a cut leaves nothing of an MLP, or nothing is cut."""
        if self.score not in SCORES:
            raise UserError(f"There is no score {self.score!r}; there are {', '.join(SCORES)}.")
        for site, cut in self._asked(dense.layout, "cuts").items():
            if not 0 <= cut < site.width:
                raise UserError(
                    f"The cut of {site.stream} MLPs is {cut:,}, but {site.name} has {site.width:,} neurons: cut 0 to "
                    f"{site.width - 1:,}."
                )

    def plan(self, dense: Dense, recording: Recording, device: torch.device | str, progress: Progress) -> Planned:
        cuts = {site: cut for site, cut in self._asked(dense.layout, "cuts").items() if cut}
        rankings = rank(self.score, dense, recording, list(cuts), device, progress)
        made = f"by count, img {self.img:,} txt {self.txt:,} single {self.single:,}{self._where()}, score {self.score}"
        return Planned(from_rankings(dense, rankings, {site.name: cut for site, cut in cuts.items()}, self.score, made))


@dataclass(frozen=True)
class ByThreshold(_ByStream):
    """Keeps the neurons that fired at least so often: in all (counts, as the original) or per token (rate, 0 to 1)."""

    img: float = 0.0
    txt: float = 0.0
    single: float = 0.0
    on: Literal["counts", "rate"] = "counts"

    def check(self, dense: Dense) -> None:
        """Raises `UserError` where a range is outside of the model, a threshold is not one, or nothing would be cut."""
        if self.on not in ("counts", "rate"):
            raise UserError(f"Thresholds are on counts or on rate; found {self.on!r}.")
        for stream, threshold in (("img", self.img), ("txt", self.txt), ("single", self.single)):
            if not 0 <= threshold < math.inf or (self.on == "rate" and threshold > 1):
                most = "to 1 (the share of tokens at which a neuron fires)" if self.on == "rate" else "on (a number of tokens)"
                raise UserError(f"The threshold of {stream} MLPs on {self.on} is a number from 0 {most}; found {threshold:g}.")
        self._asked(dense.layout, "thresholds")

    def plan(self, dense: Dense, recording: Recording, device: torch.device | str, progress: Progress) -> Planned:
        """Raises `UserError` where a threshold leaves nothing of an MLP, or nothing is below it."""
        thresholds = self._asked(dense.layout, "thresholds")
        internals = require_internals(recording.internals(), dense, list(thresholds), "a plan by threshold")
        kept = {}
        for site, threshold in thresholds.items():
            recorded = internals.sites[site.name]
            value = recorded.fires if self.on == "counts" else recorded.rate
            keep = (value >= threshold).nonzero().squeeze(1)
            if not len(keep):
                raise UserError(
                    f"The threshold of {site.stream} MLPs is {threshold!r}, and no neuron of {site.name} fired that often (the "
                    f"most frequent one: {value.max().item():g}): all of them would be cut. Choose a lower threshold."
                )
            if len(keep) < site.width:
                kept[site.name] = keep
        if not kept:
            raise UserError("Nothing is cut: every neuron of the chosen layers fired as often as asked for. Raise a threshold.")
        made = f"by threshold on {self.on}, img {self.img!r} txt {self.txt!r} single {self.single!r}{self._where()}"
        return Planned(replace(PruningPlan.keeping_all(dense), kept=kept, score="frequency", made=made))
