"""From cut weights to the best that can be had: closed form, then gradient steps, judged as what is saved.

    losses = train_best(problem, names, start, options, Path("3.training.safetensors"), report)
    problem.module                                   # holds the weights that did best on held-out images
    losses.cut, losses.start, losses.final

A problem is a `loop.Problem` on rows or on block states; `start` gives its closed form (`pruning/refit.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..flux.weights import SiteWeights
from ..pruning.moments import gather
from ..pruning.refit import Repaired, affine, bias, choose
from ..recording.store import Rows
from .loop import Loss, Problem, fit, held_out_loss
from .options import Options, Report
from .trainable import rounded


@dataclass(frozen=True)
class Losses:
    """Held out: as cut, as training began, at the end; on the last training batch; and the steps in between."""

    cut: Loss
    start: Loss
    final: Loss
    train: Loss | None
    steps: int


def closed_form(weights: SiteWeights, kept: Tensor, fit_rows: Iterable[Rows], judge_rows: Iterable[Rows]) -> Repaired:
    """Least squares on some rows, with the ridge that does best on others; the bias alone where no ridge does better."""
    moments = gather(weights, fit_rows)
    found = choose(weights, kept, moments, gather(weights, judge_rows))
    if found.ridge is None:
        return bias(weights, kept, moments.mean[moments.attn :])
    return affine(weights, kept, moments, found.ridge)


def train_best(
    problem: Problem,
    keys: Sequence[str],
    start: Callable[[], Mapping[str, Tensor]],
    options: Options,
    saved: Path,
    report: Report,
) -> Losses:
    """Closed form, then gradient, as the options say; leaves in the module what does best as it will be saved."""
    weights = dict(problem.module.named_parameters())

    def judged(values: Mapping[str, Tensor]) -> tuple[Loss, dict[str, Tensor]]:
        """The held-out loss with `values` as they will be saved, which the module holds from now on."""
        values = {key: rounded(tensor.detach(), options.dtype).float() for key, tensor in values.items()}
        problem.module.load_state_dict(values, strict=False)
        return held_out_loss(problem, options), values

    at_first, best = judged({key: weights[key] for key in keys})
    began, final, train, steps = at_first, at_first, None, 0
    if options.method != "gradient":
        loss, values = judged({**best, **start()})
        if loss.relative < final.relative:
            began, final, best = loss, loss, values
        problem.module.load_state_dict(best, strict=False)
    if options.method != "closed form" and not options.just_evaluate:
        fitted = fit(problem, began, options, saved, report)
        train, steps = fitted.train, fitted.steps
        loss, values = judged({key: weights[key] for key in keys})
        if loss.relative < final.relative:
            final, best = loss, values
    problem.module.load_state_dict(best, strict=False)
    return Losses(at_first, began, final, train, steps)


def together(losses: Sequence[Losses]) -> Losses:
    """Means over the MLPs of one block."""

    def mean(which: str) -> Loss:
        parts: list[Loss] = [getattr(one, which) for one in losses]
        relative, squares = tuple(part.relative for part in parts), tuple(square for part in parts for square in part.squares)
        return Loss(sum(relative) / len(parts), sum(part.mse for part in parts) / len(parts), relative, squares)

    trained = all(one.train is not None for one in losses)
    return Losses(mean("cut"), mean("start"), mean("final"), mean("train") if trained else None, max(o.steps for o in losses))
