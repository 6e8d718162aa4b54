"""What cutting the first k neurons of a ranking really costs, for every k: measured on rows, with affine repair.

    ranking = measure_affine(ranking, weights, fitted, held_out, ridge)

A ranking by rows has the errors of the rows it was fitted to, right in shape at best. So errors are measured at a few widths on
rows of other images, and the curve is scaled to meet them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..flux.weights import SiteWeights
from .moments import Moments
from .refit import Regression, output_energy, sketched

#: Shares of a site's neurons at which the errors of cutting are measured; in between they are interpolated.
GRID = (0.05, 0.25, 0.5, 0.75, 0.9, 0.97)


@dataclass(frozen=True)
class Ranking:
    """The order in which a site's neurons are cut, and what that costs.

    Attributes:
        order: int64 [width], first to go first.
        error: predicted squared error per token at the MLP's output after cutting the first k, float64 [width + 1];
            None where the score predicts none (frequency).
        energy: of that output per token, about its mean where the MLP has a bias: the unit of relative errors.
    """

    order: Tensor
    error: Tensor | None = None
    energy: float = 1.0


def ridge_for(width: int, rows: float) -> float:
    """What serves a regression without being chosen by held-out images: less, the more rows there are for each neuron."""
    return min(0.1, 0.1 * width / rows)


def measure_affine(ranking: Ranking, weights: SiteWeights, fitted: Moments, held_out: Moments, ridge: float) -> Ranking:
    """With the errors that regression on `fitted` leaves on `held_out`, rows of other images; the bias is always repaired."""
    error, width = ranking.error, len(ranking.order)
    assert error is not None
    seen = sketched(weights)
    unit = ranking.energy / output_energy(seen.down, held_out)
    cuts = sorted({cut for share in GRID if 0 < (cut := round(share * width)) < width})
    if not cuts:
        return ranking
    factors, kept = [], ranking.order.flip(0)
    whole = Regression.of(seen, kept, fitted).factor(ridge)
    for cut in cuts:
        problem = Regression.of(seen, kept[: width - cut], fitted)
        change = problem.solve_with(whole[: len(problem.regressed), : len(problem.regressed)])
        found = unit * min(problem.error(None, held_out), problem.error(change, held_out))
        factors.append(found / max(error[cut].item(), 1e-30))
    scale = np.interp(np.arange(width + 1), [0, *cuts, width], [factors[0], *factors, 1.0])
    return replace(ranking, error=(error * torch.from_numpy(scale)).cummax(0).values)
