"""Repair of a whole plan: worked out once, one MLP in memory at a time, and kept for the next time.

    repairs = Repairs(dense, plan, "affine", rows=store, folder=folder)
    repairs.compute(progress)
    repairs["single-7"].down, repairs.report["single-7"].after

What is done at each MLP, and why, is in `refit.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from ..analysis.hidden_states import HiddenStates, held_out
from ..analysis.internals import Internals
from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Site
from .dense import Dense
from .moments import gather
from .plan import PruningPlan
from .refit import METHODS, Fold, Repaired, RepairReport, affine, bias, choose, none
from .scores import Progress, require_internals, require_rows
from .weights import SiteWeights

FORMAT = "flux-poke repair 1"


class Repairs(Mapping[str, Repaired]):
    """The repairs of a whole plan, one site in memory at a time.

    none and bias are worked out whenever a site is asked for. affine is worked out once: every site is a file in a folder of
    `folder` that is named after the plan, the repair and the rows, so asking again costs reading it, and a run that was
    cancelled goes on where it was. `compute` does all sites; `progress` is told after each, and an exception from it stops
    the work.

    Raises `UserError` where the plan is not of `dense`, or what the method needs is missing, too little, or of another model.
    """

    def __init__(
        self,
        dense: Dense,
        plan: PruningPlan,
        method: str = "none",
        internals: Internals | None = None,
        rows: HiddenStates | None = None,
        folder: str | os.PathLike[str] | None = None,
        fold: bool = False,
        device: torch.device | str = "cpu",
    ):
        plan.require(dense)
        if method not in METHODS:
            raise UserError(f"There is no repair {method!r}; there are {', '.join(METHODS)}.")
        self.dense, self.plan, self.method, self.fold, self.device = dense, plan, method, fold, device
        self.sites = {site.name: site for site in dense.layout.sites if site.name in plan.kept}
        sites = list(self.sites.values())
        self.internals = require_internals(internals, dense, sites, "repair = bias") if method == "bias" else internals
        self.rows = require_rows(rows, dense, sites, "repair = affine") if method == "affine" else rows
        self.folder: Path | None = None
        if method == "affine":
            if folder is None:
                raise UserError("Repair = affine keeps what it computes: name a folder for it.")
            self.folder = Path(folder) / f"repair-{self._key()}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Repaired:
        site, kept = self.sites[name], self.plan.kept[name]
        if self.method == "affine":
            path = self._path(name)
            return load_repaired(path) if path.exists() else self._compute(site)
        weights = SiteWeights.read(self.dense.tensors, site, self.device)
        if self.method == "none":
            return none(weights, kept)
        assert self.internals is not None
        return bias(weights, kept, self.internals.sites[name].mean)

    @property
    def report(self) -> dict[str, RepairReport]:
        """By site, how well it was repaired; only of those that were computed."""
        if self.method != "affine":
            return {name: RepairReport(self.method) for name in self}
        return {name: load_repaired(self._path(name), report_only=True).report for name in self if self._path(name).exists()}

    def compute(self, progress: Progress | None = None) -> None:
        """Works out what is not there yet."""
        for done, (name, site) in enumerate(self.sites.items(), start=1):
            if self.method == "affine" and not self._path(name).exists():
                self._compute(site)
                self.dense.release()
            if progress is not None:
                progress(name, done, len(self))

    def _compute(self, site: Site) -> Repaired:
        assert self.rows is not None
        weights, kept = SiteWeights.read(self.dense.tensors, site, self.device), self.plan.kept[site.name]
        fit, judge = held_out(self.rows.images(site.name))
        importance = partial(self.rows.importance, site.name)
        moments = gather(weights, self.rows.rows(site.name, fit), importance)
        others = gather(weights, self.rows.rows(site.name, judge), importance)
        report = choose(weights, kept, moments, others)
        moments = moments.merged(others)
        del others
        if report.ridge is None:
            repaired = bias(weights, kept, moments.mean[moments.attn :])
        else:
            repaired = affine(weights, kept, moments, report.ridge, self.fold)
        repaired = replace(repaired, report=report)
        save_repaired(self._path(site.name), repaired, self.dense.tensors[f"{site.down}.weight"].dtype)
        return repaired

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _key(self) -> str:
        assert self.rows is not None
        return hashlib.sha256(f"{FORMAT} {self.plan.digest} {self.fold} {self.rows.digest}".encode()).hexdigest()[:16]


def report_table(report: Mapping[str, RepairReport]) -> str:
    """Text, one line per site: held-out error cut only, with bias, and after repair."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    lines = [f"{'site':<16}{'repair':>8}{'ridge':>9}{'cut only':>11}{'bias':>11}{'repaired':>11}{'predicted':>11}"]
    for name, site in report.items():
        numbers = (site.before, site.bias, site.after, site.predicted)
        lines.append(f"{name:<16}{site.method:>8}{number(site.ridge):>9}" + "".join(f"{number(v):>11}" for v in numbers))
    return "\n".join(lines)


def save_repaired(path: Path, repaired: Repaired, stored: torch.dtype) -> None:
    """One site's file; weights in the checkpoint's precision, from 16 bits on, else bfloat16, as the fold's matrix."""
    dtype = stored if stored in (torch.float32, torch.float16) else torch.bfloat16
    tensors = {"down": repaired.down.to(dtype).cpu()}
    if repaired.bias is not None:
        tensors["bias"] = repaired.bias.cpu()
    if repaired.fold.matrix is not None:
        tensors["fold.matrix"] = repaired.fold.matrix.bfloat16().cpu()
    if repaired.fold.offset is not None:
        tensors["fold.offset"] = repaired.fold.offset.cpu()
    write_safetensors(path, tensors, {"format": FORMAT, "report": json.dumps(asdict(repaired.report))})


def load_repaired(path: Path, report_only: bool = False) -> Repaired:
    """What `save_repaired` wrote; its tensors are empty if only the report is wanted."""
    with open_safetensors(path) as file:
        report = RepairReport(**json.loads((file.metadata() or {})["report"]))
        if report_only:
            return Repaired(torch.empty(0), None, report, Fold(None, None))
        there = {key: file.get_tensor(key) for key in file.keys()}
    fold = Fold(there.get("fold.matrix"), there.get("fold.offset"))
    return Repaired(there["down"].float(), there.get("bias"), report, fold)
