"""Repair of a whole plan: worked out once, one MLP in memory at a time, and kept for the next time.

    repairs = Repairs(dense, plan, "affine", recording)
    if not repairs.complete():
        repairs.compute(progress)
    repairs["single-7"].down, repairs.reports()["single-7"].after
    repairs.fold("single-7")                         # what a LoRA needs to follow

What is done at each MLP, and why, is in `refit.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Site
from ..flux.weights import SiteWeights
from ..parsing import from_json
from ..progress import Progress, part, silent
from ..recording.recording import Recording
from ..recording.split import held_out
from .cache import Shapes, cache_key, cached_header, read_cached, recorded_rows, write_cached
from .dense import Dense
from .modulation import LowRanks
from .moments import gather_recorded
from .plan import PruningPlan
from .refit import METHODS, Fold, Repaired, RepairReport, affine, bias, choose, none
from .scores import require_internals, require_rows

FORMAT = "flux-poke repair 3"
#: What is stored of a site, and what a LoRA needs of it.
OWN, FOLD = ("down", "bias", "offset"), ("matrix", "offset")


class Repairs(Mapping[str, Repaired]):
    """The repairs of a whole plan, one site in memory at a time; `low_ranks` are its truncated modulation layers, worked out
    from the recording `truncated_by` where that is another one.

    none and bias are worked out whenever a site is asked for. affine is worked out once: every site is a file in the
    recording's cache, in a folder that is named after the plan, the model in its precision and the rows, so a run that was
    cancelled goes on where it was. Once more rows were recorded, what comes from the earlier ones is removed, and nothing more
    is worked out from those. Work is done on `device` and tells `progress`, both of which may be set at any time.

    Raises `UserError` where the plan is not of `dense`, or what the method needs is missing, too little, or of another model.
    """

    def __init__(
        self,
        dense: Dense,
        plan: PruningPlan,
        method: str = "none",
        recording: Recording | None = None,
        device: torch.device | str = "cpu",
        truncated_by: Recording | None = None,
    ):
        plan.require(dense)
        if method not in METHODS:
            raise UserError(f"There is no repair {method!r}; there are {', '.join(METHODS)}.")
        self.dense, self.plan, self.method, self.device, self.recording = dense, plan, method, device, recording
        self.progress: Progress = silent
        self.low_ranks = LowRanks(dense, plan, truncated_by or recording)
        self.sites = {site.name: site for site in dense.layout.sites if site.name in plan.kept}
        sites = list(self.sites.values())
        self.folder: Path | None = None
        if method == "none":
            return
        if recording is None:
            raise UserError(f"Repair = {method} works from what was recorded of the dense model, and no recording is given.")
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
            report, found = self._stored(site)
            return Repaired(found["down"].float(), found.get("bias"), report, Fold(None, found.get("offset")))
        weights = SiteWeights.read(self.dense.tensors, site, up=False)
        return none(weights, kept) if self.method == "none" else bias(weights, kept, self.internals.sites[name].mean)

    def fold(self, name: str, matrix: bool = True) -> Fold:
        """How a LoRA follows what was cut at a site (`lora.py`); without `matrix`, its offset alone.

        The matrix of affine repair is worked out when it is first asked for, and kept: [cut, attention + kept] numbers.
        """
        site = self.sites[name]
        if self.method == "affine":
            _, found = self._stored(site, FOLD if matrix else ("offset",))
            return Fold(found.get("matrix"), found.get("offset"))
        if self.method == "none" or not site.biased:
            return Fold()
        return Fold(None, self.internals.sites[name].mean[self.plan.removed(name)].float())

    def reports(self) -> dict[str, RepairReport]:
        """By site, how well it was repaired, as its file tells; only of those that were computed."""
        if self.method != "affine":
            return {name: RepairReport(self.method) for name in self}
        return {name: report for name in self if (report := self._report(name)) is not None}

    def compute(self, progress: Progress | None = None, fold: bool = False) -> dict[str, RepairReport]:
        """Works out what is not there yet, and with `fold` also what LoRAs need; the reports of all sites."""
        self.progress, self.low_ranks.device = progress or self.progress, self.device
        total = len(self.low_ranks) + len(self)
        for done, name in enumerate(self.low_ranks):
            self.progress(f"truncating the modulation of {name}", done, total)
            if self.low_ranks.lacks(name):
                self.low_ranks[name]
        for done, name in enumerate(self.sites, start=len(self.low_ranks)):
            self.progress(f"repairing {name}", done, total)
            self.work_out(name, fold, part(self.progress, done, total))
        self.progress("repaired", total, total)
        return self.reports()

    def work_out(self, name: str, fold: bool = False, progress: Progress = silent) -> None:
        """Works out one site, and with `fold` also what LoRAs need of it, unless that was done."""
        if self.lacks(name, fold):
            self._compute(self.sites[name], fold, progress)

    def complete(self, fold: bool = False) -> bool:
        """Whether nothing is left to be worked out by `compute`."""
        return not any(self.lacks(name, fold) for name in self) and not any(map(self.low_ranks.lacks, self.low_ranks))

    def lacks(self, name: str, fold: bool = False) -> bool:
        """Whether a site, or with `fold` what LoRAs need of it, is still to be worked out: by `compute`, or when asked for."""
        if self.method != "affine":
            return False
        report = self._report(name)
        if report is None or not fold:
            return report is None
        path, shapes = self._file(self.sites[name], report.method, FOLD)
        return cached_header(path, FORMAT, shapes) is None

    def _stored(self, site: Site, parts: Sequence[str] = OWN) -> tuple[RepairReport, dict[str, Tensor]]:
        """A site's report and what is stored of it, worked out before where it is not there or not sound."""
        for _ in range(2):
            if self.lacks(site.name, fold=parts != OWN):
                self._compute(site, parts != OWN, self.progress)
            report = self._report(site.name)
            assert report is not None
            path, shapes = self._file(site, report.method, parts)
            if (found := read_cached(path, FORMAT, shapes)) is not None:
                return report, found
            path.unlink(missing_ok=True)  # the header was sound, the numbers are not
        raise UserError(f"The repair of {site.name} is not finite: look at the model, or record again.")

    def _compute(self, site: Site, fold: bool, progress: Progress) -> None:
        assert self.recording is not None
        if recorded_rows(self.recording) != self._of_rows:
            raise UserError(
                f"More rows were recorded in {self.recording.folder} since this plan was loaded: load it again (Load Pruned "
                "FLUX), or start the command again."
            )
        kept = self.plan.kept[site.name]
        weights = SiteWeights.read(self.dense.tensors, site, self.device)
        fit, held = held_out(self.rows.images(site.name))
        moments = gather_recorded(weights, self.rows, fit, part(progress, 0, 4))
        others = gather_recorded(weights, self.rows, held, part(progress, 1, 4))
        known = self._report(site.name)
        report = known or choose(weights, kept, moments, others, progress=part(progress, 2, 4))
        moments = moments.merge(others)
        del others
        if report.ridge is None:
            repaired = bias(weights, kept, moments.mean[moments.attn :])
        else:
            repaired = affine(weights, kept, moments, report.ridge, fold)
        if repaired.fold.matrix is not None:
            self._write(site, report, FOLD, repaired)
        if known is None:
            self._write(site, report, OWN, repaired)
        assert self.folder is not None
        for other in self.folder.parent.iterdir():
            if not other.name.startswith(self._begins):  # of earlier rows
                shutil.rmtree(other, ignore_errors=True)
        self.dense.release()

    def _write(self, site: Site, report: RepairReport, parts: Sequence[str], repaired: Repaired) -> None:
        """Weights are as precise as the checkpoint's, from 16 bits on."""
        stored = self.dense.tensors[f"{site.down}.weight"].dtype
        down = repaired.down.to(stored if stored in (torch.float32, torch.float16) else torch.bfloat16)
        matrix = None if repaired.fold.matrix is None else repaired.fold.matrix.bfloat16()
        found = {"down": down, "bias": repaired.bias, "matrix": matrix, "offset": repaired.fold.offset}
        path, shapes = self._file(site, report.method, parts)
        there = {name: tensor for name, tensor in found.items() if name in shapes and tensor is not None}
        write_cached(path, FORMAT, there, {"report": json.dumps(asdict(report))})

    def _file(self, site: Site, method: str, parts: Sequence[str]) -> tuple[Path, Shapes]:
        """The file in which `parts` of a site's repair by `method` are, and the shapes of those that there are. The matrix of
        affine repair and its offset have a file of their own."""
        assert self.folder is not None
        hidden, kept = self.dense.layout.hidden, len(self.plan.kept[site.name])
        columns, cut = site.down_column + kept, site.width - kept
        own = "down" in parts or method == "bias"
        shapes: dict[str, tuple[int, ...]] = {"down": (hidden, columns)} if own else {"matrix": (cut, columns)}
        if site.biased and own:
            shapes["bias"] = (hidden,)
        if site.biased and not (own and method == "affine"):
            shapes["offset"] = (cut,)
        path = self.folder / f"{site.name}{'' if own else '.fold'}.safetensors"
        return path, {name: shape for name, shape in shapes.items() if name in parts}

    def _report(self, name: str) -> RepairReport | None:
        """What a site's file tells, or None where it is not there or not sound; its numbers are not read."""
        assert self.folder is not None
        header = cached_header(self.folder / f"{name}.safetensors", FORMAT, {})
        try:
            report = RepairReport.from_header(from_json((header or {})["report"]))
        except (KeyError, ValueError, TypeError):
            return None
        path, shapes = self._file(self.sites[name], report.method, OWN)
        return None if cached_header(path, FORMAT, shapes) is None else report


def report_table(report: Mapping[str, RepairReport]) -> str:
    """Text, one line per site: held-out error cut only, with bias, and after repair."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    lines = [f"{'site':<16}{'repair':>8}{'ridge':>9}{'cut only':>11}{'bias':>11}{'repaired':>11}{'predicted':>11}"]
    for name, site in report.items():
        numbers = (site.before, site.bias, site.after, site.predicted)
        lines.append(f"{name:<16}{site.method:>8}{number(site.ridge):>9}" + "".join(f"{number(v):>11}" for v in numbers))
    return "\n".join(lines)
