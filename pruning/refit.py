"""Repair of one MLP: what its kept weights must become so that they make up for the cut ones, in closed form.

    report = choose(weights, kept, moments, gather(weights, store.rows(site.name, held_out)))  # bias or affine, and the ridge
    repaired = affine(weights, kept, moments, report.ridge)
    repaired.down, repaired.bias

| repair | needs | the kept columns | the bias |
|---|---|---|---|
| none | - | stay | stays |
| bias | internals | stay | takes over the cut neurons' mean (FLAP) |
| affine | rows | + W_P B | + W_P (mu_P - B mu_K) |

B = C_PK (C_KK + lam)^-1 predicts the cut neurons P from all that is kept: in a single block, neurons and attention, whose part
goes into linear2's attention columns. An MLP without bias (FLUX.2) is repaired with uncentred moments.

Errors come from second moments alone, those of the rows fitted to and those of the rows held out; no row is read again.
Where one only has to compare, an MLP is seen through `SKETCH` random directions of its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..flux.weights import SiteWeights
from ..parsing import finite
from ..progress import Progress, silent
from .moments import Moments
from .symmetric import BLOCK, exact_products, quadratic, select

METHODS = ("none", "bias", "affine")

#: Ridges that affine repair chooses among on held-out images, in units of the mean variance of what it regresses on.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
#: Directions of the output in which errors are measured where it is wider than that.
SKETCH = 256


@dataclass(frozen=True)
class RepairReport:
    """How well a repair does at one site, as squared error of the MLP's output relative to its variance.

    `before` is cut without repair, `bias` with the bias repaired, `after` with what was chosen: all on held-out images. Where
    `method` is retrained, they are what the training measured, of the block or the whole model.
    `predicted` is the certificate: the error of `method` on the rows it was fitted to. None = not measured. In outputs wider
    than `SKETCH` all four are estimates (`sketched`). `energy` is that variance per token, on held-out images.
    """

    method: str
    ridge: float | None = None
    before: float | None = None
    bias: float | None = None
    after: float | None = None
    predicted: float | None = None
    energy: float | None = None

    @classmethod
    def from_header(cls, told: Mapping[str, Any]) -> RepairReport:
        """As a file's header tells it; raises `ValueError`, `KeyError` or `TypeError` where it is none."""
        numbers = {
            name: None if value is None else finite(value, name, -1e-6) for name, value in told.items() if name != "method"
        }
        return cls(str(told.get("method")), **numbers)


@dataclass(frozen=True)
class Fold:
    """How cut neurons were replaced: h_P = matrix [attention ; h_K] + offset. What a LoRA needs to follow (`lora.py`).

    `matrix` [cut, attention + kept], None for zero; `offset` [cut], None where the MLP has no bias.
    """

    matrix: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Repaired:
    """The new down projection of a site [hidden, attention + kept] in float32, its bias, and how that came about."""

    down: Tensor
    bias: Tensor | None
    report: RepairReport
    fold: Fold


def none(weights: SiteWeights, kept: Tensor) -> Repaired:
    """Kept columns as they are."""
    return Repaired(_kept_columns(weights, kept), weights.bias, RepairReport("none"), Fold())


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
    problem, mean = Regression.of(weights, kept, moments), moments.mean
    change, matrix = problem.solve(ridge), problem.matrix(ridge) if fold else None
    moved = offset = None
    if weights.bias is not None:
        lost = problem.down_cut @ mean[problem.target] - change @ mean[problem.regressed]
        moved = (weights.bias.double() + lost).float()
        if matrix is not None:
            offset = (mean[problem.target] - matrix @ mean[problem.regressed]).float()
    down = (_kept_columns(weights, kept).double() + change).float()
    return Repaired(down, moved, RepairReport("affine", ridge), Fold(None if matrix is None else matrix.float(), offset))


def choose(
    weights: SiteWeights,
    kept: Tensor,
    moments: Moments,
    held_out: Moments,
    ridges: Sequence[float] = RIDGES,
    progress: Progress = silent,
) -> RepairReport:
    """Affine repair with the ridge that does best on `held_out`, rows of other images than those of `moments`, or the bias
    alone where none of them does better than that."""
    weights = sketched(weights)
    problem = Regression.of(weights, kept, moments)
    unit = output_energy(weights.down, held_out)
    before, only_bias = (problem.error(None, held_out, repaired) / unit for repaired in (False, True))
    after, best, best_change = only_bias, None, None
    for done, ridge in enumerate(ridges):
        progress(f"choosing a ridge for {weights.site.name}", done, len(ridges))
        change = problem.solve(ridge)
        error = problem.error(change, held_out) / unit
        if error < after:
            after, best, best_change = error, ridge, change
    predicted = problem.error(best_change, moments) / output_energy(weights.down, moments)
    return RepairReport("bias" if best is None else "affine", best, before, only_bias, after, predicted, unit)


@dataclass(frozen=True)
class Regression:
    """The regression of one MLP's cut neurons on what is kept, all float64 on one device.

    Attributes:
        target, regressed: places among the moments of the cut neurons, ascending, and of all that is kept, in the order given.
        down_cut: W_P [hidden, cut].
        shared: C_KP W_P^T [regressed, hidden].
    """

    moments: Moments
    target: Tensor
    regressed: Tensor
    down_cut: Tensor
    shared: Tensor

    @classmethod
    @exact_products()
    def of(cls, weights: SiteWeights, kept: Tensor, moments: Moments) -> Regression:
        device, a = weights.down.device, moments.attn
        cut = _rest(weights, kept)
        target, regressed = a + cut, torch.cat((torch.arange(a, device=device), a + kept.to(device)))
        down_cut = weights.down[:, cut].float()
        parts = (moments.second[rows].index_select(1, target).float() @ down_cut.T for rows in regressed.split(BLOCK))
        return cls(moments, target, regressed, down_cut.double(), torch.cat([part.double() for part in parts]))

    def solve(self, ridge: float) -> Tensor:
        """W_P B [hidden, regressed]: what is added to the kept columns."""
        return self.solve_with(self.factor(ridge))

    def solve_with(self, factor: Tensor) -> Tensor:
        """As `solve`, with the `factor` of what is regressed on."""
        return torch.cholesky_solve(self.shared.to(factor), factor).T.double()

    def matrix(self, ridge: float) -> Tensor:
        """B [cut, regressed]."""
        factor = self.factor(ridge)
        return torch.cholesky_solve(self.moments.second[self.regressed][:, self.target].to(factor), factor).T.double()

    def factor(self, ridge: float) -> Tensor:
        """Cholesky factor [regressed, regressed] of C_KK plus a ridge; its first rows and columns are the factor of fewer.

        In float32 where that can be: errors are least at the solution, so that its rounding changes next to nothing.
        """
        try:
            return torch.linalg.cholesky(self._system(ridge, torch.float32))
        except torch.linalg.LinAlgError:
            return torch.linalg.cholesky(self._system(ridge, torch.float64))

    def error(self, change: Tensor | None, rows: Moments, repaired: bool = True) -> float:
        """Squared error per row of the output over the rows of these moments, with the bias repaired (or not, without a
        `change`) and `change` added to the kept columns."""
        lost = self.down_cut.new_zeros(len(self.down_cut), len(rows.mean))
        lost[:, self.target] = self.down_cut
        if change is not None:
            lost[:, self.regressed] = -change
        error = quadratic(lost.float(), rows.second)
        if rows.centred:
            error += (lost @ (rows.mean - self.moments.mean if repaired else rows.mean)).square().sum().item()
        return error

    def _system(self, ridge: float, precision: torch.dtype) -> Tensor:
        """C_KK plus a ridge, in units of the mean variance of attention and of neurons each."""
        second, a, size = self.moments.second, self.moments.attn, len(self.regressed)
        system = select(second, self.regressed, out=second.new_zeros(size, size, dtype=precision))
        variances = system.diagonal()
        for part in (variances[:a], variances[a:]):
            part += ridge * part.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return system


def sketched(weights: SiteWeights) -> SiteWeights:
    """The MLP whose output is seen in `SKETCH` random directions, to measure errors by at a fraction of the work.

    A squared error keeps its mean; relative to it, its standard deviation is at most sqrt(2 / SKETCH / r), with r the effective
    rank of the error's covariance over the output's channels, tr^2 / tr of the square (Johnson & Lindenstrauss 1984, with
    signs as in Achlioptas 2003): .09 where all of it lies in one direction, .01 from r = 80 on.
    """
    hidden = len(weights.down)
    if hidden <= SKETCH:
        return weights
    signs = torch.randint(2, (SKETCH, hidden), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return replace(weights, down=(signs / SKETCH**0.5).to(weights.down) @ weights.down)


def output_energy(down: Tensor, moments: Moments) -> float:
    """tr W C W^T: energy of an MLP's output per token, about its mean if the moments are; above zero."""
    own = moments.second[moments.attn :, moments.attn :]
    return max(quadratic(down, own), torch.finfo(torch.float32).tiny)


def _rest(weights: SiteWeights, kept: Tensor) -> Tensor:
    """Indices of the neurons that are not kept, ascending."""
    gone = torch.ones(weights.down.shape[1], dtype=torch.bool)
    gone[kept.cpu()] = False
    return gone.nonzero().squeeze(1).to(weights.down.device)


def _kept_columns(weights: SiteWeights, kept: Tensor) -> Tensor:
    """[hidden, attention + kept]: what linear2 or the second MLP layer keeps as it is."""
    columns = weights.down[:, kept.to(weights.down.device)]
    return columns if weights.attn is None else torch.cat((weights.attn, columns), dim=1)
