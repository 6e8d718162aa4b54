"""Making plans: what is asked for as a value, and one function that answers it from what was recorded.

    planned = make_plan(dense, recording, ByBudget(share=0.5))       # or ByCount(img=2000), ByThreshold(img=0.1, on="rate")
    planned.plan.save("plan.safetensors")
    planned.figure(), planned.notes

    dense, recording = open_dense(plan), open_recording(plan)        # what a plan that was read knows to belong to it

A request that makes no sense, or that nothing can fulfil, is refused before neurons are ranked, which may take hours.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from ..errors import UserError
from ..flux.layout import Layout, Site, select_sites
from ..progress import Progress, silent
from ..recording.recording import Recording
from .budget import Amplification, BudgetCurve, amplifications, protected_sites
from .curves import Ranking
from .dense import Dense
from .plan import PruningPlan, from_rankings, plan_figure
from .scores import SCORES, rank, require_internals

#: First and last block of a range, both in it; None = all of them.
Layers = tuple[int, int] | None

#: A budget's gigabytes are counted at this precision.
STORED = torch.bfloat16


@dataclass(frozen=True)
class Planned:
    """A plan, the curve it was chosen on where it is one by budget, and sentences on what its reader should know."""

    plan: PruningPlan
    notes: tuple[str, ...] = ()
    curve: BudgetCurve | None = None

    def figure(self) -> Figure:
        """Of a budget, memory saved against predicted error with the plan marked; else kept and cut neurons of every MLP."""
        return plan_figure(self.plan) if self.curve is None else self.curve.figure(self.plan)


@dataclass(frozen=True)
class ByCount:
    """Cuts so many neurons of every img, txt and single MLP in the given ranges of blocks: the first ones by `score`."""

    img: int = 0
    txt: int = 0
    single: int = 0
    score: str = "fluctuation"
    double: Layers = None
    single_blocks: Layers = None

    def check(self, layout: Layout) -> None:
        """Raises `UserError` where a range is outside of the model, a cut leaves nothing of an MLP, or nothing is cut."""
        _require_score(self.score, SCORES)
        for site in self._sites(layout):
            cut = self._cut(site)
            if not 0 <= cut < site.width:
                raise UserError(
                    f"The cut of {site.stream} MLPs is {cut:,}, but {site.name} has {site.width:,} neurons: cut 0 to "
                    f"{site.width - 1:,}."
                )
        if not any(self._cut(site) for site in self._sites(layout)):
            raise UserError("Nothing would be cut: all cuts of MLPs in the chosen layers are 0. Raise one.")

    def plan(self, dense: Dense, recording: Recording, device: torch.device | str, progress: Progress) -> Planned:
        sites = [site for site in self._sites(dense.layout) if self._cut(site)]
        rankings = rank(self.score, dense, recording, sites, device, progress)
        made = f"by count, img {self.img:,} txt {self.txt:,} single {self.single:,}"
        made += f"{_ranges(self.double, self.single_blocks)}, score {self.score}"
        return Planned(from_rankings(dense, rankings, {site.name: self._cut(site) for site in sites}, self.score, made))

    def _sites(self, layout: Layout) -> tuple[Site, ...]:
        return select_sites(layout, self.double, self.single_blocks)

    def _cut(self, site: Site) -> int:
        return {"img": self.img, "txt": self.txt, "single": self.single}[site.stream]


@dataclass(frozen=True)
class ByThreshold:
    """Keeps the neurons that fired at least so often: in all (counts, as the original) or per token (rate, 0 to 1)."""

    img: float = 0.0
    txt: float = 0.0
    single: float = 0.0
    on: Literal["counts", "rate"] = "counts"
    double: Layers = None
    single_blocks: Layers = None

    def check(self, layout: Layout) -> None:
        """Raises `UserError` where a range is outside of the model, a threshold is not one, or nothing would be cut."""
        if self.on not in ("counts", "rate"):
            raise UserError(f"Thresholds are on counts or on rate; found {self.on!r}.")
        for stream, threshold in self._thresholds().items():
            if not 0 <= threshold < math.inf or (self.on == "rate" and threshold > 1):
                most = "to 1 (the share of tokens at which a neuron fires)" if self.on == "rate" else "on (a number of tokens)"
                raise UserError(f"The threshold of {stream} MLPs on {self.on} is a number from 0 {most}; found {threshold:g}.")
        if not any(self._thresholds()[site.stream] for site in self._sites(layout)):
            raise UserError("Nothing would be cut: all thresholds of MLPs in the chosen layers are 0. Raise one.")

    def plan(self, dense: Dense, recording: Recording, device: torch.device | str, progress: Progress) -> Planned:
        """Raises `UserError` where a threshold leaves nothing of an MLP, or nothing is below it."""
        sites, thresholds = self._sites(dense.layout), self._thresholds()
        internals = require_internals(recording.internals(), dense, sites, "a plan by threshold")
        kept = {}
        for site in sites:
            recorded, threshold = internals.sites[site.name], thresholds[site.stream]
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
        made = f"by threshold on {self.on}, img {self.img!r} txt {self.txt!r} single {self.single!r}"
        made += _ranges(self.double, self.single_blocks)
        return Planned(replace(PruningPlan.keeping_all(dense), kept=kept, score="frequency", made=made))

    def _sites(self, layout: Layout) -> tuple[Site, ...]:
        return select_sites(layout, self.double, self.single_blocks)

    def _thresholds(self) -> dict[str, float]:
        return {"img": self.img, "txt": self.txt, "single": self.single}


@dataclass(frozen=True)
class ByBudget:
    """Cuts `share` of all MLP neurons, or saves `gigabytes` (10^9 bytes at 16 bits), where that costs the output least.

    Widths are multiples of `multiple`; MLPs named in `protect` ("double-18, single-0") stay whole.
    """

    share: float | None = None
    gigabytes: float | None = None
    score: str = "obs"
    multiple: int = 64
    protect: str = ""

    def check(self, layout: Layout) -> None:
        """Raises `UserError` where the budget is not one, or more than may be cut, whatever the neurons are worth."""
        _require_score(self.score, ("obs", "fluctuation", "magnitude"))
        if (self.share is None) == (self.gigabytes is None):
            raise UserError("A budget is either a share of the neurons or gigabytes to save: give one of the two.")
        if self.share is not None and not 0 < self.share < 1:
            raise UserError(f"The share of neurons to cut lies between 0 and 1, both excluded; found {self.share:g}.")
        if self.gigabytes is not None and not 0 < self.gigabytes < math.inf:
            raise UserError(f"The gigabytes to save are a number above 0; found {self.gigabytes:g}.")
        alike = {site.name: Ranking(torch.arange(site.width), torch.zeros(site.width + 1)) for site in layout.sites}
        amount, of, _ = self._amount(layout)
        self._curve(layout, alike, {}).until(amount, of)

    def plan(self, dense: Dense, recording: Recording, device: torch.device | str, progress: Progress) -> Planned:
        layout = dense.layout
        amplification = amplifications(recording.states()) if "amplification" in recording.kinds else {}
        unmeasured = [site.name for site in layout.sites if site.name not in amplification]
        if self.score != "obs" and ("rows" not in recording.kinds or unmeasured):
            lacks = f"no amplification of {unmeasured[0]}" if "rows" in recording.kinds else "no rows"
            raise UserError(
                f"A budget by {self.score} weighs errors that are measured on rows by what they do to the picture, and "
                f"{recording.folder} holds {lacks}: record rows with probe "
                "steps (Record, or `uv run flux-poke record`), or plan by count."
            )
        rankings = rank(self.score, dense, recording, None, device, progress, measured=True)
        curve = self._curve(layout, rankings, amplification)
        amount, of, words = self._amount(layout)
        cuts, error = curve.cuts(amount, of)
        weighed = "times amplification" if curve.amplified else "counted alike everywhere"
        plan = from_rankings(dense, rankings, cuts, self.score, f"by budget, {words}, score {self.score}, errors {weighed}")
        if curve.amplified:
            return Planned(replace(plan, velocity_error=error), (), curve)
        known = len(layout.sites) - len(unmeasured)
        note = (
            f"An error counts alike wherever it is made, since what it does to the picture was measured of {known} of "
            f"{len(layout.sites)} MLPs (not of {unmeasured[0]}, for one): record again with probe steps (Record, or `uv run "
            "flux-poke record`) for a better plan with a predicted error."
        )
        return Planned(plan, (note,), curve)

    def _curve(
        self, layout: Layout, rankings: Mapping[str, Ranking], amplification: Mapping[str, Amplification]
    ) -> BudgetCurve:
        return BudgetCurve.of(layout, rankings, amplification, self.multiple, protected_sites(layout, self.protect))

    def _amount(self, layout: Layout) -> tuple[float, Literal["neurons", "parameters"], str]:
        """How many neurons or parameters are to be saved, and the same in words."""
        if self.share is not None:
            return self.share * layout.neurons, "neurons", f"{100 * self.share:.4g}% of the neurons"
        assert self.gigabytes is not None
        precision = str(STORED).removeprefix("torch.")
        return self.gigabytes * 1e9 / STORED.itemsize, "parameters", f"{self.gigabytes:g} GB at {precision}"


Request = ByCount | ByThreshold | ByBudget


def make_plan(
    dense: Dense, recording: Recording, what: Request, device: torch.device | str = "cpu", progress: Progress = silent
) -> Planned:
    """The plan that `what` asks for. Nothing is cut yet; rankings that took long are kept in the recording's cache.

    `device` is where neurons are ranked by rows. Raises `UserError`, before any work, where the request cannot be fulfilled,
    the recording is of another model, or the device is not there.
    """
    require_device(device)
    what.check(dense.layout)
    recording.require(dense.fingerprint, dense.source)
    planned = what.plan(dense, recording, device, progress)
    plan = replace(planned.plan, recording=os.path.abspath(recording.folder), settings=settings_of(what))
    return replace(planned, plan=plan)


def settings_of(what: Request) -> dict[str, Any]:
    """A request as data, as it is read back from a file: `by` and its fields."""
    by = {ByCount: "count", ByThreshold: "threshold", ByBudget: "budget"}[type(what)]
    return json.loads(json.dumps({"by": by, **asdict(what)}))


def open_dense(plan: PruningPlan, override: str | os.PathLike[str] | None = None) -> Dense:
    """The dense model of a plan: from the file it was made from, or from `override` where that moved.

    Raises `UserError` where neither is there, or it is another model.
    """
    path = str(override or plan.checkpoint)
    if not path:
        raise UserError("The plan does not tell what checkpoint it is of: choose it (Load Plan, or --checkpoint FILE).")
    if not Path(path).is_file():
        raise UserError(
            f"The dense model {path} is not there, and the plan was made from it: put it back, or choose where it is now "
            "(Load Plan, or --checkpoint FILE)."
        )
    dense = Dense.open(path)
    plan.require(dense)
    return dense


def open_recording(plan: PruningPlan, override: str | os.PathLike[str] | None = None) -> Recording:
    """The recording of a plan: the folder it was made from, or `override` where that moved.

    Raises `UserError` where neither is there, or it is of another model.
    """
    path = str(override or plan.recording)
    if not path:
        raise UserError("The plan does not tell what recording it is of: choose it (Load Plan, or --recording FOLDER).")
    if not Path(path).exists():
        raise UserError(
            f"The recording {path} is not there, and the plan was made from it: put it back, or choose where it is now "
            "(Load Plan, or --recording FOLDER)."
        )
    recording = Recording.open(path)
    recording.require(plan.fingerprint, "the plan's model")
    return recording


def require_device(device: torch.device | str) -> None:
    """Raises `UserError` where torch cannot compute on `device`."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {device} cannot be used ({reason}): choose cpu, or one that this machine has.") from error


def _require_score(score: str, scores: tuple[str, ...]) -> None:
    if score == "frequency" and score not in scores:
        raise UserError(
            "A budget weighs predicted errors against each other, and the score frequency predicts none: choose "
            f"{', '.join(scores[:-1])} or {scores[-1]}."
        )
    if score not in scores:
        raise UserError(f"There is no score {score!r}; there are {', '.join(scores)}.")


def _ranges(double: Layers, single: Layers) -> str:
    parts = [f"{kind} blocks {r[0]} to {r[1]}" for kind, r in (("double", double), ("single", single)) if r is not None]
    return " in " + ", ".join(parts) if parts else ""
