"""Repair: what the kept weights of an MLP must become so that they make up for the cut ones, in closed form.

    repaired = affine(weights, kept, moments, rows)  # one MLP
    repairs = Repairs(dense, plan, "affine", rows=store, folder=folder)      # all of a plan, computed once, kept in `folder`
    repairs["single-7"].down, repairs.report["single-7"].after

| repair | needs | the kept columns | the bias |
|---|---|---|---|
| none | – | stay | stays |
| bias | internals | stay | takes over the cut neurons' mean (FLAP) |
| affine | rows | + W_P B | + W_P (mu_P - B mu_K) |

B = C_PK (C_KK + lam)⁻¹ predicts cut neurons P from all that is kept: in a single block, neurons and attention, whose part goes into
linear2's attention columns. An MLP without bias (FLUX.2) is repaired with uncentred moments.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..analysis.hidden_states import HiddenStates, Rows, held_out
from ..analysis.internals import Internals
from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Site
from .dense import Dense
from .moments import Moments, exact_products, gather, regressors
from .plan import PruningPlan
from .scores import Progress, mean_variance, require_internals, require_rows
from .weights import SiteWeights

Method = Literal["none", "bias", "affine"]
METHODS: tuple[Method, ...] = get_args(Method)
FORMAT = "flux-poke repair 1"

#: Ridges that affine repair chooses among on held-out images, in units of the mean variance of what it regresses on.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class RepairReport:
    """How well a repair does at one site, as squared error of the MLP's output relative to its variance.

    `before` is cut without repair, `bias` with the bias repaired, `after` with what was chosen: all on held-out images.
    `predicted` is the certificate: the least error of `method` on the rows it was fitted to. None = not measured.
    """

    method: Method
    ridge: float | None = None
    before: float | None = None
    bias: float | None = None
    after: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Fold:
    """How cut neurons were replaced: h_P ≈ matrix · [attention ; h_K] + offset. What a LoRA needs to follow (`lora.py`).

    `matrix` [cut, attention + kept], None for zero; `offset` [cut], None where the MLP has no bias.
    """

    matrix: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class Repaired:
    """The new down projection of a site [hidden, attention + kept] in float32, its bias, and how that came about."""

    down: Tensor
    bias: Tensor | None
    report: RepairReport
    fold: Fold


def none(weights: SiteWeights, kept: Tensor) -> Repaired:
    """Kept columns as they are."""
    return Repaired(_kept_columns(weights, kept), weights.bias, RepairReport("none"), Fold(None, None))


def bias(weights: SiteWeights, kept: Tensor, mean: Tensor) -> Repaired:
    """Kept columns as they are; b + W_P mu_P, with `mean` [width] of the neurons (An et al. 2023, arXiv 2312.11983, FLAP)."""
    cut = _rest(weights, kept)
    offset = mean.to(weights.down.device)[cut].double()
    moved = None if weights.bias is None else (weights.bias.double() + weights.down[:, cut].double() @ offset).float()
    fold = Fold(None, None if weights.bias is None else offset.float())
    return Repaired(_kept_columns(weights, kept), moved, RepairReport("bias"), fold)


def affine(
    weights: SiteWeights,
    kept: Tensor,
    moments: Moments,
    judge: Iterable[Rows],
    ridges: Iterable[float] = RIDGES,
    fold: bool = False,
) -> Repaired:
    """Kept columns and bias that predict the dense output best: ridge regression of the cut neurons on all that is kept.

    Args:
        kept: ascending indices.
        moments: of the rows to fit on.
        judge: rows of other images, on which the ridge is chosen; where no ridge beats repairing the bias alone, that is done.
        fold: also return the regression's matrix, which is not needed for anything but converting LoRAs.
    """
    device = weights.down.device
    cut, a = _rest(weights, kept), moments.attn
    regressed = torch.cat((torch.arange(a, device=device), a + kept.to(device)))
    down, second = weights.down.double(), moments.second
    centred = weights.bias is not None
    base = bias(weights, kept, moments.mean[a:])
    if not len(cut):
        return replace(base, report=RepairReport("affine", None, 0.0, 0.0, 0.0, 0.0))

    # What the cut neurons' part of the output has in common with all regressors: C_·P W_Pᵀ.
    shared = second[:, a + cut] @ down[:, cut].T
    among = second[regressed][:, regressed]
    energy = (down[:, cut] * shared[a + cut].T).sum().item()
    whole = ((down @ second[a:, a:]) * down).sum().item()
    units = torch.full((len(regressed),), mean_variance(among[a:, a:]), dtype=torch.float64, device=device)
    if a:
        units[:a] = mean_variance(among[:a, :a])

    def solve(ridge: float, target: Tensor) -> Tensor:
        system = among.clone()
        system.diagonal().add_(units, alpha=ridge)
        return torch.cholesky_solve(target, torch.linalg.cholesky(system)).T

    changes = {ridge: solve(ridge, shared[regressed]) for ridge in ridges}
    errors = _held_out_errors(weights, kept, cut, moments, changes, judge, centred)
    report = RepairReport("bias", None, errors["none"], errors["bias"], errors["bias"], energy / whole)
    best = min(changes, key=lambda ridge: errors[ridge])
    if not errors[best] < errors["bias"]:
        return replace(base, report=report)

    change = changes[best]
    moved = None
    if weights.bias is not None:
        lost = down[:, cut] @ moments.mean[a + cut] - change @ moments.mean[regressed]
        moved = (weights.bias.double() + lost).float()
    matrix = solve(best, second[regressed][:, a + cut]) if fold else None
    certificate = energy - 2 * (change * shared[regressed].T).sum().item() + ((change @ among) * change).sum().item()
    offset = None
    if matrix is not None and centred:
        offset = (moments.mean[a + cut] - matrix @ moments.mean[regressed]).float()
    return Repaired(
        down=(_kept_columns(weights, kept).double() + change).float(),
        bias=moved,
        report=replace(report, method="affine", ridge=best, after=errors[best], predicted=max(certificate, 0.0) / whole),
        fold=Fold(None if matrix is None else matrix.float(), offset),
    )


def _held_out_errors(
    weights: SiteWeights, kept: Tensor, cut: Tensor, moments: Moments, changes: Mapping[float, Tensor], rows: Iterable[Rows],
    centred: bool,
) -> dict[float | str, float]:  # fmt: skip
    """Squared error of the output over `rows` for each change of the kept columns, and for "none" and "bias", relative to
    the variance of the output (its energy, without bias)."""
    device = weights.down.device
    a, mean = moments.attn, moments.mean.float()
    down_cut = weights.down[:, cut]
    regressed = torch.cat((torch.arange(a, device=device), a + kept.to(device)))
    totals: dict[float | str, float] = dict.fromkeys(("none", "bias", *changes), 0.0)
    narrow = {ridge: change.float() for ridge, change in changes.items()}
    energy, count = 0.0, 0
    output_sum = torch.zeros(len(weights.down), dtype=torch.float64, device=device)
    with exact_products():
        for part in rows:
            z = regressors(weights, part)
            output = z[:, a:] @ weights.down.T
            output_sum += output.sum(0, dtype=torch.float64)
            energy += output.double().square().sum().item()
            count += len(z)
            if centred:
                totals["none"] += (z[:, a + cut] @ down_cut.T).double().square().sum().item()
                z -= mean
            missing = z[:, a + cut] @ down_cut.T
            totals["bias"] += missing.double().square().sum().item()
            for ridge, change in narrow.items():
                totals[ridge] += (missing - z[:, regressed] @ change.T).double().square().sum().item()
    if not centred:
        totals["none"] = totals["bias"]
    if not count:
        raise UserError(f"There are no rows of {weights.site.name} on the images that repair is judged by: record more images.")
    if centred:
        energy -= output_sum.square().sum().item() / count
    return {name: total / energy if energy > 0 else 0.0 for name, total in totals.items()}


class Repairs(Mapping[str, Repaired]):
    """The repairs of a whole plan, one site in memory at a time.

    none and bias are worked out whenever a site is asked for. affine is worked out once: every site is a file in a folder of
    `folder` that is named after the plan, the repair and the rows, so asking again costs reading it, and a run that was cancelled goes on
    where it was. `compute` does all sites; `progress` is told after each, and an exception from it stops the work.

    Raises `UserError` where the plan is not of `dense`, or what the method needs is missing, too little, or of another model.
    """

    def __init__(
        self,
        dense: Dense,
        plan: PruningPlan,
        method: Method = "none",
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
            return _load(path) if path.exists() else self._compute(site)
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
        return {name: _load(self._path(name), report_only=True).report for name in self if self._path(name).exists()}

    def compute(self, progress: Progress | None = None) -> None:
        """Works out what is not there yet."""
        for done, (name, site) in enumerate(self.sites.items(), start=1):
            if self.method == "affine" and not self._path(name).exists():
                self._compute(site)
            if progress is not None:
                progress(name, done, len(self))

    def _compute(self, site: Site) -> Repaired:
        assert self.rows is not None
        weights = SiteWeights.read(self.dense.tensors, site, self.device)
        fit, judge = held_out(self.rows.images(site.name))
        moments = gather(weights, self.rows.rows(site.name, fit))
        repaired = affine(weights, self.plan.kept[site.name], moments, self.rows.rows(site.name, judge), fold=self.fold)
        _save(self._path(site.name), repaired, self.dense.tensors[f"{site.down}.weight"].dtype)
        return repaired

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _key(self) -> str:
        assert self.rows is not None
        shards = [asdict(shard) for shard in self.rows.manifest.shards]
        rows = json.dumps([self.rows.manifest.created, shards])
        return hashlib.sha256(f"{FORMAT} {self.plan.digest} {self.method} {self.fold} {rows}".encode()).hexdigest()[:16]


def report_table(report: Mapping[str, RepairReport]) -> str:
    """Text, one line per site: held-out error cut only, with bias, and after repair."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    lines = [f"{'site':<16}{'repair':>8}{'ridge':>9}{'cut only':>11}{'bias':>11}{'repaired':>11}{'predicted':>11}"]
    for name, site in report.items():
        numbers = (site.before, site.bias, site.after, site.predicted)
        lines.append(f"{name:<16}{site.method:>8}{number(site.ridge):>9}" + "".join(f"{number(v):>11}" for v in numbers))
    return "\n".join(lines)


def _save(path: Path, repaired: Repaired, stored: torch.dtype) -> None:
    """One site's file; weights as the checkpoint stores them, if in 16 bits or more, else in bfloat16, as is the fold's matrix."""
    dtype = stored if stored in (torch.float32, torch.float16) else torch.bfloat16
    tensors = {"down": repaired.down.to(dtype).cpu()}
    if repaired.bias is not None:
        tensors["bias"] = repaired.bias.cpu()
    if repaired.fold.matrix is not None:
        tensors["fold.matrix"] = repaired.fold.matrix.bfloat16().cpu()
    if repaired.fold.offset is not None:
        tensors["fold.offset"] = repaired.fold.offset.cpu()
    write_safetensors(path, tensors, {"format": FORMAT, "report": json.dumps(asdict(repaired.report))})


def _load(path: Path, report_only: bool = False) -> Repaired:
    with open_safetensors(path) as file:
        report = RepairReport(**json.loads((file.metadata() or {})["report"]))
        if report_only:
            return Repaired(torch.empty(0), None, report, Fold(None, None))
        there = {key: file.get_tensor(key) for key in file.keys()}
    fold = Fold(there.get("fold.matrix"), there.get("fold.offset"))
    return Repaired(there["down"].float(), there.get("bias"), report, fold)


def _rest(weights: SiteWeights, kept: Tensor) -> Tensor:
    """Indices of the neurons that are not kept, ascending."""
    gone = torch.ones(weights.down.shape[1], dtype=torch.bool)
    gone[kept.cpu()] = False
    return gone.nonzero().squeeze(1).to(weights.down.device)


def _kept_columns(weights: SiteWeights, kept: Tensor) -> Tensor:
    """[hidden, attention + kept]: what linear2 or the second MLP layer keeps as it is."""
    columns = weights.down[:, kept.to(weights.down.device)]
    return columns if weights.attn is None else torch.cat((weights.attn, columns), dim=1)
