"""What cutting the first k neurons of a ranking really costs, for every k: measured on rows, with the repair that follows.

    ranking = measure_affine(ranking, weights, fitted, held_out, ridge)     # what affine repair leaves
    ranking = measure_cut(ranking, weights, moments, mean)                  # what repairing the bias leaves, or nothing (None)

A score's own error curve is right in shape at best: one by neuron as if each were alone says several times too little where
neurons go together, and one by regression is of the rows it was fitted to. So errors are measured at a few widths, and the
curve is scaled to meet them. Where no bias is repaired, the part of the error that is the mean's (`Ranking.shift`) stands
apart, since it counts differently in what comes after (`budget.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..flux.weights import SiteWeights
from .moments import Moments
from .refit import Problem, output_energy, sketched

#: Shares of a site's neurons at which the errors of cutting are measured; in between they are interpolated.
GRID = (0.05, 0.25, 0.5, 0.75, 0.9, 0.97)


@dataclass(frozen=True)
class Ranking:
    """The order in which a site's neurons are cut, and what that costs.

    Attributes:
        order: int64 [width], first to go first.
        error: predicted squared error per token at the MLP's output after cutting the first k, float64 [width + 1];
            None where the score predicts none (frequency).
        shift: how much of that is the output's mean being off, which it is where no bias is repaired; None for nothing.
        energy: of that output per token, about its mean where the MLP has a bias: the unit of relative errors.
    """

    order: Tensor
    error: Tensor | None = None
    energy: float = 1.0
    shift: Tensor | None = None

    def relative_error(self, cut: int) -> float | None:
        """Predicted error after cutting the first `cut`, relative to the output's energy."""
        return None if self.error is None else self.error[cut].item() / self.energy


def ridge_for(width: int, rows: float) -> float:
    """What serves a regression without being chosen by held-out images: less, the more rows there are for each neuron."""
    return min(0.1, 0.1 * width / rows)


def predicted_errors(rankings: Mapping[str, Ranking], kept: Mapping[str, Tensor]) -> dict[str, float]:
    """By site, the predicted error relative to its output's energy; only where the score predicts one."""
    found = {name: rankings[name].relative_error(len(rankings[name].order) - len(indices)) for name, indices in kept.items()}
    return {name: error for name, error in found.items() if error is not None}


def measure_affine(ranking: Ranking, weights: SiteWeights, fitted: Moments, held_out: Moments, ridge: float) -> Ranking:
    """With the errors that regression on `fitted` leaves on `held_out`, rows of other images; the bias is always repaired."""
    seen = sketched(weights)
    unit = ranking.energy / output_energy(seen.down, held_out)
    found = {}
    for cut in _cuts(ranking):
        problem = Problem.of(seen, ranking.order[cut:].sort().values, fitted)
        found[cut] = unit * min(problem.error(None, held_out), problem.error(problem.solve(ridge), held_out))
    assert ranking.error is not None
    return replace(ranking, error=_scaled(ranking.error, found))


def measure_cut(ranking: Ranking, weights: SiteWeights, moments: Moments, mean: Tensor | None) -> Ranking:
    """With the errors of leaving neurons out over the rows of `moments`: with `mean` [width] in their place, or nothing."""
    seen = sketched(weights)
    lost, shift = {}, {}
    for cut in (*_cuts(ranking), len(ranking.order)):
        gone = ranking.order[:cut].sort().values.to(seen.down.device)
        down, at = seen.down[:, gone].double(), moments.attn + gone
        lost[cut] = ((down @ moments.second[at].index_select(1, at)) * down).sum().item()
        if moments.centred:
            away = moments.mean[at] - (0 if mean is None else mean.to(at.device)[gone])
            shift[cut] = (down @ away).square().sum().item()
    assert ranking.error is not None
    energy = max(lost[len(ranking.order)], torch.finfo(torch.float32).tiny)
    moved = torch.zeros_like(ranking.error) if mean is not None or not shift else _scaled(ranking.error, shift)
    total = {cut: value + shift.get(cut, 0.0) for cut, value in lost.items()}
    return Ranking(ranking.order, _scaled(ranking.error, total), energy, moved)


def _cuts(ranking: Ranking) -> list[int]:
    width = len(ranking.order)
    return sorted({cut for share in GRID if 0 < (cut := round(share * width)) < width})


def _scaled(error: Tensor, found: Mapping[int, float]) -> Tensor:
    """`error` [width + 1], never falling, scaled to go through `found`; as it is where nothing was found."""
    if not found:
        return error
    cuts = sorted(found)
    factors = [found[cut] / max(error[cut].item(), 1e-30) for cut in cuts]
    width = len(error) - 1
    ends = {0: factors[0], **dict(zip(cuts, factors, strict=True))}
    if width not in ends:
        ends[width] = 1.0
    scale = np.interp(np.arange(width + 1), list(ends), list(ends.values()))
    return (error * torch.from_numpy(scale)).cummax(0).values
