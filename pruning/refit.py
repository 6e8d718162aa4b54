"""Repair of one MLP: what its kept weights must become so that they make up for the cut ones, in closed form.

    report = choose(weights, kept, moments, store.rows(site.name, judge))     # bias or affine, and with which ridge
    repaired = affine(weights, kept, moments, report.ridge)
    repaired.down, repaired.bias

| repair | needs | the kept columns | the bias |
|---|---|---|---|
| none | – | stay | stays |
| bias | internals | stay | takes over the cut neurons' mean (FLAP) |
| affine | rows | + W_P B | + W_P (mu_P - B mu_K) |

B = C_PK (C_KK + lam)⁻¹ predicts the cut neurons P from all that is kept: in a single block, neurons and attention, whose part
goes into linear2's attention columns. An MLP without bias (FLUX.2) is repaired with uncentred moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..analysis.hidden_states import Rows
from ..errors import UserError
from .moments import Moments, exact_products, regressors
from .weights import SiteWeights

METHODS = ("none", "bias", "affine")

#: Ridges that affine repair chooses among on held-out images, in units of the mean variance of what it regresses on.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class RepairReport:
    """How well a repair does at one site, as squared error of the MLP's output relative to its variance.

    `before` is cut without repair, `bias` with the bias repaired, `after` with what was chosen: all on held-out images. Where
    `method` is retrained, they are what the training was judged by (`retrain/stats.py`), of the block or the whole model.
    `predicted` is the certificate: the least error of `method` on the rows it was fitted to. None = not measured.
    """

    method: str
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


def affine(weights: SiteWeights, kept: Tensor, moments: Moments, ridge: float, fold: bool = False) -> Repaired:
    """Kept columns and bias that predict the dense output best: ridge regression of the cut neurons on all that is kept.

    Args:
        kept: ascending indices.
        ridge: in units of the mean variance of what is regressed on; `choose` finds it.
        fold: also return the regression's matrix, which is not needed for anything but converting LoRAs.
    """
    problem = Problem.of(weights, kept, moments)
    mean, change = moments.mean, problem.solve(ridge)
    moved = offset = None
    if weights.bias is not None:
        lost = problem.down_cut @ mean[problem.target] - change @ mean[problem.regressed]
        moved = (weights.bias.double() + lost).float()
    matrix = problem.matrix(ridge) if fold else None
    if matrix is not None and weights.bias is not None:
        offset = (mean[problem.target] - matrix @ mean[problem.regressed]).float()
    report = RepairReport("affine", ridge, predicted=problem.certificate(change))
    down = (_kept_columns(weights, kept).double() + change).float()
    return Repaired(down, moved, report, Fold(None if matrix is None else matrix.float(), offset))


def choose(
    weights: SiteWeights, kept: Tensor, moments: Moments, judge: Iterable[Rows], ridges: Sequence[float] = RIDGES
) -> RepairReport:
    """Affine repair with the ridge that does best on the rows of other images than those of `moments`, or the bias alone where
    none of them does better than that."""
    problem = Problem.of(weights, kept, moments)
    changes = [problem.solve(ridge) for ridge in ridges]
    errors = held_out_errors(weights, moments, [(problem, [None, *changes])], judge)[0]
    only_bias, *refitted = errors.refitted
    best = min(range(len(ridges)), key=lambda number: refitted[number])
    if not refitted[best] < only_bias:
        return RepairReport("bias", None, errors.none, only_bias, only_bias, problem.certificate(None))
    return RepairReport("affine", ridges[best], errors.none, only_bias, refitted[best], problem.certificate(changes[best]))


@dataclass(frozen=True)
class Problem:
    """The regression of one MLP's cut neurons on what is kept, all float64 on one device.

    Attributes:
        cut: indices of the neurons that go. target, regressed: places among the moments of the cut and of the kept regressors.
        down_cut: W_P [hidden, cut].
        among: C_KK. shared: C_KP W_Pᵀ [regressed, hidden].
        energy: tr W_P C_PP W_Pᵀ, the error with the bias repaired.
        down: W [hidden, width].
    """

    moments: Moments
    cut: Tensor
    target: Tensor
    regressed: Tensor
    down_cut: Tensor
    among: Tensor
    shared: Tensor
    energy: float
    down: Tensor

    @classmethod
    def of(cls, weights: SiteWeights, kept: Tensor, moments: Moments) -> Problem:
        device = weights.down.device
        cut, a, second = _rest(weights, kept), moments.attn, moments.second
        target, regressed = a + cut, torch.cat((torch.arange(a, device=device), a + kept.to(device)))
        down = weights.down.double()
        toward = second[:, target] @ down[:, cut].T
        energy = (down[:, cut] * toward[target].T).sum().item()
        among = second[regressed][:, regressed]
        return cls(moments, cut, target, regressed, down[:, cut], among, toward[regressed], energy, down)

    def solve(self, ridge: float) -> Tensor:
        """W_P B [hidden, regressed]: what is added to the kept columns."""
        return torch.cholesky_solve(self.shared, self._factor(ridge)).T

    def matrix(self, ridge: float) -> Tensor:
        """B [cut, regressed]."""
        return torch.cholesky_solve(self.moments.second[self.regressed][:, self.target], self._factor(ridge)).T

    def certificate(self, change: Tensor | None) -> float:
        """Squared error on the rows of the moments with `change` (None: the bias alone), relative to `whole`."""
        error = self.energy
        if change is not None:
            error += ((change @ self.among) * change).sum().item() - 2 * (change * self.shared.T).sum().item()
        return max(error, 0.0) / self.whole if self.whole > 0 else 0.0

    @cached_property
    def whole(self) -> float:
        """tr W C Wᵀ: the error of cutting everything."""
        return output_energy(self.down, self.moments)

    def _factor(self, ridge: float) -> Tensor:
        """Cholesky factor of C_KK plus a ridge, in units of the mean variance of attention and of neurons each."""
        system, a = self.among.clone(), self.moments.attn
        variances = self.among.diagonal()
        units = torch.empty_like(variances)
        for part in (slice(0, a), slice(a, None)):
            units[part] = variances[part].mean().clamp(min=torch.finfo(torch.float32).tiny)
        system.diagonal().add_(units, alpha=ridge)
        return torch.linalg.cholesky(system)


def output_energy(down: Tensor, moments: Moments) -> float:
    """tr W C Wᵀ: energy of an MLP's output per token, about its mean if the moments are."""
    own = moments.second[moments.attn :, moments.attn :]
    return ((down.double() @ own) * down).sum().item()


@dataclass(frozen=True)
class HeldOut:
    """Squared errors over held-out rows, relative to the output's variance (its energy, in an MLP without bias).

    `none`: cut alone. `refitted`: with the bias repaired and each change of the kept columns, as many as were asked for.
    """

    none: float
    refitted: list[float]


def held_out_errors(
    weights: SiteWeights, moments: Moments, cases: Sequence[tuple[Problem, Sequence[Tensor | None]]], rows: Iterable[Rows]
) -> list[HeldOut]:
    """For every case, a problem and changes of its kept columns (None: no change), the errors over `rows`, read once.

    Raises `UserError` where there are no rows.
    """
    a, mean, centred = moments.attn, moments.mean.float(), weights.bias is not None
    nones = torch.zeros(len(cases), dtype=torch.float64)
    totals = [torch.zeros(len(changes), dtype=torch.float64) for _, changes in cases]
    narrow = [[None if change is None else change.float().T.contiguous() for change in changes] for _, changes in cases]
    energy, count = 0.0, 0
    output_sum = torch.zeros(len(weights.down), dtype=torch.float64, device=weights.down.device)
    with exact_products():
        for part in rows:
            z = regressors(weights, part)
            output = z[:, a:] @ weights.down.T
            output_sum += output.sum(0, dtype=torch.float64)
            energy += _energy(output)
            count += len(z)
            shifted = z - mean if centred else z
            for number, (problem, _) in enumerate(cases):
                down_cut = problem.down_cut.float().T
                nones[number] += _energy(z[:, problem.target] @ down_cut)
                missing = shifted[:, problem.target] @ down_cut
                kept = shifted[:, problem.regressed]
                for n, change in enumerate(narrow[number]):
                    totals[number][n] += _energy(missing if change is None else missing - kept @ change)
    if not count:
        raise UserError(f"There are no rows of {weights.site.name} on the images that repair is judged by: record more images.")
    if centred:
        energy -= output_sum.square().sum().item() / count
    unit = energy if energy > 0 else 1.0
    return [HeldOut(none.item() / unit, (total / unit).tolist()) for none, total in zip(nones, totals, strict=True)]


def _energy(values: Tensor) -> float:
    return values.double().square().sum().item()


def _rest(weights: SiteWeights, kept: Tensor) -> Tensor:
    """Indices of the neurons that are not kept, ascending."""
    gone = torch.ones(weights.down.shape[1], dtype=torch.bool)
    gone[kept.cpu()] = False
    return gone.nonzero().squeeze(1).to(weights.down.device)


def _kept_columns(weights: SiteWeights, kept: Tensor) -> Tensor:
    """[hidden, attention + kept]: what linear2 or the second MLP layer keeps as it is."""
    columns = weights.down[:, kept.to(weights.down.device)]
    return columns if weights.attn is None else torch.cat((weights.attn, columns), dim=1)
