"""Repair of a whole plan: worked out once, one MLP in memory at a time, and kept for the next time.

    repairs = Repairs(dense, plan, "affine", rows=store, folder=folder)
    repairs.compute(progress)
    repairs["single-7"].down, repairs.report["single-7"].after
    repairs.fold("single-7")                         # what a LoRA needs to follow

What is done at each MLP, and why, is in `refit.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Site
from ..flux.weights import SiteWeights
from ..recording.internals import Internals
from ..recording.split import held_out
from ..recording.store import HiddenStates
from .dense import Dense
from .moments import Check, gather
from .plan import PruningPlan
from .refit import METHODS, Fold, Repaired, RepairReport, affine, bias, choose, none
from .scores import Progress, require_internals, require_rows

FORMAT = "flux-poke repair 2"


class Repairs(Mapping[str, Repaired]):
    """The repairs of a whole plan, one site in memory at a time.

    none and bias are worked out whenever a site is asked for. affine is worked out once: every site is a file in a folder of
    `folder` that is named after the plan, the model in its precision and the rows, so asking again costs reading it, and a run
    that was cancelled goes on where it was. Once more rows were recorded, what comes from the earlier ones is removed, and
    nothing more is worked out from those. `compute` does all sites on `device`; `progress` is told after each, `check` is
    called within them, and an exception from either stops the work. `device` may be changed at any time.

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
        device: torch.device | str = "cpu",
        check: Check | None = None,
    ):
        plan.require(dense)
        if method not in METHODS:
            raise UserError(f"There is no repair {method!r}; there are {', '.join(METHODS)}.")
        self.dense, self.plan, self.method, self.device, self.check = dense, plan, method, device, check
        self.sites = {site.name: site for site in dense.layout.sites if site.name in plan.kept}
        sites = list(self.sites.values())
        self.internals = require_internals(internals, dense, sites, "repair = bias") if method == "bias" else internals
        self.rows = require_rows(rows, dense, sites, "repair = affine") if method == "affine" else rows
        self.folder: Path | None = None
        if method == "affine":
            if folder is None:
                raise UserError("Repair = affine keeps what it computes: name a folder for it.")
            assert rows is not None
            self._store = f"repair-{_short(str(rows.folder.resolve()))}-"
            self._recording = f"{self._store}{_short(FORMAT + rows.digest('rows', 'amplification'))}-"
            self.folder = Path(folder) / f"{self._recording}{_short(plan.digest + dense.fingerprint.digest)}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Repaired:
        site, kept = self.sites[name], self.plan.kept[name]
        if self.method == "affine":
            if self.lacks(name):
                self._compute(site)
            return load_repaired(self._path(name))
        weights = SiteWeights.read(self.dense.tensors, site, up=False)
        if self.method == "none":
            return none(weights, kept)
        assert self.internals is not None
        return bias(weights, kept, self.internals.sites[name].mean)

    def fold(self, name: str, matrix: bool = True) -> Fold:
        """How a LoRA follows what was cut at a site (`lora.py`); without `matrix`, its offset alone.

        The matrix of affine repair is worked out when it is first asked for, and kept: [cut, attention + kept] numbers.
        """
        site = self.sites[name]
        if self.method == "none":
            return Fold(None, None)
        if self.method == "bias":
            assert self.internals is not None
            mean = self.internals.sites[name].mean[self.plan.removed(name)].float()
            return Fold(None, mean if site.biased else None)
        if self.lacks(name, fold=True):
            self._compute(site, fold=True)
        path = self._path(name) if _read_report(self._path(name)).method == "bias" else self._fold_path(name)
        found = _read(path, ("matrix", "offset") if matrix else ("offset",))
        return Fold(found.get("matrix"), found.get("offset"))

    @property
    def report(self) -> dict[str, RepairReport]:
        """By site, how well it was repaired; only of those that were computed."""
        if self.method != "affine":
            return {name: RepairReport(self.method) for name in self}
        return {name: _read_report(self._path(name)) for name in self if _there(self._path(name))}

    def compute(self, progress: Progress | None = None, fold: bool = False) -> None:
        """Works out what is not there yet, and with `fold` also what LoRAs need."""
        for done, (name, site) in enumerate(self.sites.items(), start=1):
            if self.lacks(name, fold):
                self._compute(site, fold)
            if progress is not None:
                progress(name, done, len(self))

    def lacks(self, name: str, fold: bool = False) -> bool:
        """Whether a site, or with `fold` what LoRAs need of it, is still to be worked out: by `compute`, or when asked for."""
        if self.method != "affine":
            return False
        path = self._path(name)
        if not _there(path):
            return True
        return fold and _read_report(path).method == "affine" and not _there(self._fold_path(name))

    def _compute(self, site: Site, fold: bool = False) -> None:
        assert self.rows is not None
        if self.rows.changed("rows", "amplification"):
            raise UserError(f"More rows were recorded in {self.rows.folder} since this plan was loaded: load it again.")
        name, kept, path = site.name, self.plan.kept[site.name], self._path(site.name)
        weights = SiteWeights.read(self.dense.tensors, site, self.device)
        fit, judge = held_out(self.rows.images(name))
        importance = partial(self.rows.importance, name)
        moments = gather(weights, self.rows.rows(name, fit), importance, self.check)
        others = gather(weights, self.rows.rows(name, judge), importance, self.check)
        report = _read_report(path) if _there(path) else choose(weights, kept, moments, others)
        moments = moments.merged(others)
        del others
        if report.ridge is None:
            repaired = bias(weights, kept, moments.mean[moments.attn :])
        else:
            repaired = affine(weights, kept, moments, report.ridge, fold)
        if fold and repaired.fold.matrix is not None:
            _write(self._fold_path(name), {"matrix": repaired.fold.matrix.bfloat16(), "offset": repaired.fold.offset}, report)
        if not _there(path):
            stored = self.dense.tensors[f"{site.down}.weight"].dtype
            save_repaired(path, replace(repaired, report=report), stored)
        self._forget_earlier_rows()
        self.dense.release()

    def _forget_earlier_rows(self) -> None:
        assert self.folder is not None
        for other in self.folder.parent.glob(f"{self._store}*"):
            if not other.name.startswith(self._recording):
                shutil.rmtree(other, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _fold_path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.fold.safetensors"


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
    """One site's file; its weights are as precise as the checkpoint's, `stored`, from 16 bits on."""
    dtype = stored if stored in (torch.float32, torch.float16) else torch.bfloat16
    offset = repaired.fold.offset if repaired.report.method == "bias" else None  # else it goes with the matrix
    _write(path, {"down": repaired.down.to(dtype), "bias": repaired.bias, "offset": offset}, repaired.report)


def load_repaired(path: Path) -> Repaired:
    """What `save_repaired` wrote."""
    found = _read(path, ("down", "bias", "offset"))
    return Repaired(found["down"].float(), found.get("bias"), _read_report(path), Fold(None, found.get("offset")))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, tensors: Mapping[str, Tensor | None], report: RepairReport) -> None:
    there = {key: tensor.cpu() for key, tensor in tensors.items() if tensor is not None}
    write_safetensors(path, there, {"format": FORMAT, "report": json.dumps(asdict(report))})


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in names if name in file.keys()}


def _there(path: Path) -> bool:
    """Whether the file is there and whole; one that is damaged is removed, to be made anew."""
    try:
        _read_report(path)
    except UserError:
        path.unlink(missing_ok=True)
        return False
    return True


def _read_report(path: Path) -> RepairReport:
    with open_safetensors(path) as file:
        return RepairReport(**json.loads((file.metadata() or {})["report"]))
