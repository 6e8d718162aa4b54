"""Repair of a whole plan: worked out once, one MLP in memory at a time, and kept for the next time.

    repairs = Repairs(dense, plan, "affine", recording)
    repairs.compute(progress)
    repairs["single-7"].down, repairs.reports()["single-7"].after
    repairs.fold("single-7")                         # what a LoRA needs to follow

What is done at each MLP, and why, is in `refit.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Site
from ..flux.weights import SiteWeights
from ..progress import Progress, part, silent
from ..recording.recording import Recording
from ..recording.split import held_out
from .cache import Shapes, cache_key, cached_header, read_cached, recorded_rows, write_cached
from .dense import Dense
from .moments import gather
from .plan import PruningPlan
from .refit import METHODS, Fold, Repaired, RepairReport, affine, bias, choose, none
from .scores import require_internals, require_rows

FORMAT = "flux-poke repair 2"


class Repairs(Mapping[str, Repaired]):
    """The repairs of a whole plan, one site in memory at a time.

    none and bias are worked out whenever a site is asked for. affine is worked out once: every site is a file in the
    recording's cache, in a folder that is named after the plan, the model in its precision and the rows, so asking again costs
    reading it, and a run that was cancelled goes on where it was. Once more rows were recorded, what comes from the earlier
    ones is removed, and nothing more is worked out from those. Work is done on `device`, which may be changed at any time, and
    tells `progress`, from which an exception stops it.

    Raises `UserError` where the plan is not of `dense`, or what the method needs is missing, too little, or of another model.
    """

    def __init__(
        self,
        dense: Dense,
        plan: PruningPlan,
        method: str = "none",
        recording: Recording | None = None,
        device: torch.device | str = "cpu",
        progress: Progress = silent,
    ):
        plan.require(dense)
        if method not in METHODS:
            raise UserError(f"There is no repair {method!r}; there are {', '.join(METHODS)}.")
        self.dense, self.plan, self.method, self.device, self.progress = dense, plan, method, device, progress
        self.sites = {site.name: site for site in dense.layout.sites if site.name in plan.kept}
        sites = list(self.sites.values())
        self.folder: Path | None = None
        if method == "none":
            return
        if recording is None:
            raise UserError(f"Repair = {method} works from what was recorded of the dense model, and no recording is given.")
        self.recording = recording
        if method == "bias":
            self.internals = require_internals(recording.internals(), dense, sites, "repair = bias")
            self.internals.require_sums("repair = bias")
            return
        self.rows = require_rows(recording.states(), dense, sites, "repair = affine")
        self._of_rows = recorded_rows(recording)
        self._begins = f"{cache_key(FORMAT, self._of_rows)}-"
        key = cache_key(plan.digest, dense.fingerprint.digest)
        self.folder = recording.cache / "repairs" / f"{self._begins}{key}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Repaired:
        site, kept = self.sites[name], self.plan.kept[name]
        if self.method == "affine":
            if self.lacks(name):
                self._compute(site)
            if (found := self._load(site)) is None:  # the header was sound, the numbers are not
                self._path(name).unlink()
                self._compute(site)
                found = self._load(site)
            assert found is not None
            return found
        weights = SiteWeights.read(self.dense.tensors, site, up=False)
        return none(weights, kept) if self.method == "none" else bias(weights, kept, self.internals.sites[name].mean)

    def fold(self, name: str, matrix: bool = True) -> Fold:
        """How a LoRA follows what was cut at a site (`lora.py`); without `matrix`, its offset alone.

        The matrix of affine repair is worked out when it is first asked for, and kept: [cut, attention + kept] numbers.
        """
        site = self.sites[name]
        if self.method == "none":
            return Fold(None, None)
        if self.method == "bias":
            mean = self.internals.sites[name].mean[self.plan.removed(name)].float()
            return Fold(None, mean if site.biased else None)
        if self.lacks(name, fold=True):
            self._compute(site, fold=True)
        report = self._report(name)
        assert report is not None
        if report.method == "bias":
            return Fold(None, (read_cached(self._path(name), FORMAT, self._shapes(site, "bias")) or {}).get("offset"))
        shapes = self._fold_shapes(site)
        found = read_cached(
            self._fold_path(name), FORMAT, shapes if matrix else {k: v for k, v in shapes.items() if k == "offset"}
        )
        if found is None:
            self._fold_path(name).unlink(missing_ok=True)
            return self.fold(name, matrix)
        return Fold(found.get("matrix"), found.get("offset"))

    def reports(self) -> dict[str, RepairReport]:
        """By site, how well it was repaired, as its file tells; only of those that were computed."""
        if self.method != "affine":
            return {name: RepairReport(self.method) for name in self}
        return {name: report for name in self if (report := self._report(name)) is not None}

    def compute(self, progress: Progress | None = None, fold: bool = False) -> dict[str, RepairReport]:
        """Works out what is not there yet, and with `fold` also what LoRAs need; the reports of all sites."""
        if progress is not None:
            self.progress = progress
        whole = self.progress
        try:
            for done, (name, site) in enumerate(self.sites.items()):
                whole(f"repairing {name}", done, len(self))
                if self.lacks(name, fold):
                    self.progress = part(whole, done, len(self))
                    self._compute(site, fold)
        finally:
            self.progress = whole
        whole("repaired", len(self), len(self))
        return self.reports()

    def lacks(self, name: str, fold: bool = False) -> bool:
        """Whether a site, or with `fold` what LoRAs need of it, is still to be worked out: by `compute`, or when asked for."""
        if self.method != "affine":
            return False
        report = self._report(name)
        if report is None:
            return True
        shapes = self._fold_shapes(self.sites[name])
        return fold and report.method == "affine" and cached_header(self._fold_path(name), FORMAT, shapes) is None

    def _compute(self, site: Site, fold: bool = False) -> None:
        if recorded_rows(self.recording) != self._of_rows:
            raise UserError(
                f"More rows were recorded in {self.recording.folder} since this plan was loaded: load it again (Load Pruned "
                "FLUX), or start the command again."
            )
        name, kept, path = site.name, self.plan.kept[site.name], self._path(site.name)
        weights = SiteWeights.read(self.dense.tensors, site, self.device)
        fit, held = held_out(self.rows.images(name))
        importance, count = partial(self.rows.importance, name), self.rows.count(name)
        moments = gather(weights, self.rows.rows(name, fit), importance, part(self.progress, 0, 4), count)
        others = gather(weights, self.rows.rows(name, held), importance, part(self.progress, 1, 4), count)
        known = self._report(name)
        report = known or choose(weights, kept, moments, others, progress=part(self.progress, 2, 4))
        moments = moments.merge(others)
        del others
        if report.ridge is None:
            repaired = bias(weights, kept, moments.mean[moments.attn :])
        else:
            repaired = affine(weights, kept, moments, report.ridge, fold)
        if fold and repaired.fold.matrix is not None:
            found = {"matrix": repaired.fold.matrix.bfloat16(), "offset": repaired.fold.offset}
            _write(self._fold_path(name), found, report)
        if known is None:
            stored = self.dense.tensors[f"{site.down}.weight"].dtype
            save_repaired(path, replace(repaired, report=report), stored)
        self._remove_those_of_earlier_rows()
        self.dense.release()

    def _remove_those_of_earlier_rows(self) -> None:
        assert self.folder is not None
        for other in self.folder.parent.iterdir():
            if not other.name.startswith(self._begins):
                shutil.rmtree(other, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _fold_path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.fold.safetensors"

    def _shapes(self, site: Site, method: str) -> Shapes:
        """What a site's file holds."""
        hidden, kept = self.dense.layout.hidden, len(self.plan.kept[site.name])
        shapes: dict[str, tuple[int, ...]] = {"down": (hidden, site.down_column + kept)}
        if site.biased:
            shapes["bias"] = (hidden,)
            if method == "bias":
                shapes["offset"] = (site.width - kept,)
        return shapes

    def _fold_shapes(self, site: Site) -> Shapes:
        kept = len(self.plan.kept[site.name])
        shapes: dict[str, tuple[int, ...]] = {"matrix": (site.width - kept, site.down_column + kept)}
        return {**shapes, "offset": (site.width - kept,)} if site.biased else shapes

    def _report(self, name: str) -> RepairReport | None:
        """What a site's file tells, or None where it is not there or not sound; its numbers are not read."""
        header = cached_header(self._path(name), FORMAT, {})
        try:
            report = RepairReport(**json.loads((header or {})["report"]))
        except (KeyError, ValueError, TypeError):
            return None
        shapes = self._shapes(self.sites[name], report.method)
        return None if cached_header(self._path(name), FORMAT, shapes) is None else report

    def _load(self, site: Site) -> Repaired | None:
        report = self._report(site.name)
        assert report is not None
        found = read_cached(self._path(site.name), FORMAT, self._shapes(site, report.method))
        if found is None:
            return None
        return Repaired(found["down"].float(), found.get("bias"), report, Fold(None, found.get("offset")))


def report_table(report: Mapping[str, RepairReport]) -> str:
    """Text, one line per site: held-out error cut only, with bias, and after repair."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    lines = [f"{'site':<16}{'repair':>8}{'ridge':>9}{'cut only':>11}{'bias':>11}{'repaired':>11}{'predicted':>11}"]
    for name, site in report.items():
        numbers = (site.before, site.bias, site.after, site.predicted)
        lines.append(f"{name:<16}{site.method:>8}{number(site.ridge):>9}" + "".join(f"{number(v):>11}" for v in numbers))
    return "\n".join(lines)


def save_repaired(path: Path, repaired: Repaired, stored: torch.dtype) -> None:
    """One site's file; its weights are as precise as the checkpoint's, `stored`, from 16 bits on."""
    dtype = stored if stored in (torch.float32, torch.float16) else torch.bfloat16
    offset = repaired.fold.offset if repaired.report.method == "bias" else None  # else it goes with the matrix
    _write(path, {"down": repaired.down.to(dtype), "bias": repaired.bias, "offset": offset}, repaired.report)


def _write(path: Path, tensors: Mapping[str, Tensor | None], report: RepairReport) -> None:
    found = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    write_cached(path, FORMAT, found, {"report": json.dumps(asdict(report))})
