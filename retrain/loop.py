"""The training loop, one for all kinds of data.

    trained = train_best(problem, closed_form, Path("3.training.safetensors"), report, progress)
    trained.tensors                                  # the weights that did best on held-out images, as they are saved
    trained.cut, trained.start, trained.final

What is trained, and on what, is a `problem.Problem`. Batches depend on the seed and the step alone, and the state is saved at
evaluations: a killed training goes on, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.resume import load_training, save_training
from ..progress import Progress, part, silent
from .options import Options, Report, TrainingStatus, rounded
from .problem import Loss, Problem, batch, held_out_loss, precision

#: A held-out loss that falls by less than this share of itself counts as standing still.
LEAST_GAIN = 0.002
#: Seconds between reports in the middle of a training, and between saved states.
REPORT_EVERY, SAVE_EVERY = 0.25, 30.0


@dataclass(frozen=True)
class Trained:
    """What became of a module.

    Attributes:
        tensors: the trained parameters by name, in the precision they are saved in; float32 where that is an 8-bit one.
        cut, start, final: held-out losses as cut, as training began, at the end. train: on the last training batch.
        steps: of the gradient. images: those held out.
    """

    tensors: Mapping[str, Tensor]
    cut: Loss
    start: Loss
    final: Loss
    train: Loss | None
    steps: int
    images: frozenset[int]

    @classmethod
    def nothing(cls) -> Trained:
        """Of a block whose MLPs are all as the dense model's."""
        right = Loss(0.0, 0.0)
        return cls({}, right, right, right, None, 0, frozenset())

    @classmethod
    def together(cls, parts: Sequence[Trained]) -> Trained:
        """The MLPs of one block, each trained by itself: losses are means over them."""

        def mean(name: str) -> Any:
            losses = [getattr(part, name) for part in parts]
            return None if None in losses else Loss(fmean(one.relative for one in losses), fmean(one.mse for one in losses))

        tensors = {key: tensor for part in parts for key, tensor in part.tensors.items()}
        steps, images = max(part.steps for part in parts), frozenset().union(*(part.images for part in parts))
        return cls(tensors, mean("cut"), mean("start"), mean("final"), mean("train"), steps, images)


def train_best(
    problem: Problem,
    closed_form: Callable[[Progress], Mapping[str, Tensor]] | None,
    saved: Path | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> Trained:
    """Closed form, then gradient, as the problem's options say; the weights that do best as they will be saved.

    `closed_form` works out weights by their names in the problem's module, without gradients; `saved` is where a training's
    state is kept. An exception from `report` or `progress` stops the work. Raises `UserError` where the errors are not finite.
    """
    options = problem.options
    weights = {name: weight for name, weight in problem.module.named_parameters() if weight.requires_grad}

    def measure(values: Mapping[str, Tensor], within: Progress) -> tuple[Loss, dict[str, Tensor]]:
        """The held-out loss with `values` as they will be saved, which the module holds from now on."""
        values = {key: rounded(tensor.detach(), options.dtype) for key, tensor in values.items()}
        problem.module.load_state_dict(values, strict=False)
        return held_out_loss(problem, within), values

    at_first, best = measure(weights, part(progress, 0, 1, 0.05))
    if not math.isfinite(at_first.relative):
        raise UserError(
            f"The error of {problem.name} is not a finite number before training: the model or the recording holds numbers "
            "that are not. Record again, or choose another save dtype."
        )
    began, final, train, steps = at_first, at_first, None, 0
    gradient = options.method != "closed form" and not options.just_evaluate
    if closed_form is not None and options.method != "gradient":
        values = {**best, **closed_form(part(progress, 0.05, 1, 0.3 if gradient else 0.9))}
        loss, values = measure(values, part(progress, 0.35 if gradient else 0.95, 1, 0.05))
        if loss.relative < final.relative:
            began, final, best = loss, loss, values
        problem.module.load_state_dict(best, strict=False)
    if gradient:
        train, steps = fit(problem, began, saved, report, part(progress, 0.4, 1, 0.55))
        loss, values = measure(weights, part(progress, 0.95, 1, 0.05))
        if loss.relative < final.relative:
            final, best = loss, values
    return Trained(best, at_first, began, final, train, steps, frozenset(problem.images[1]))


def fit(
    problem: Problem, initial: Loss, saved: Path | None, report: Report | None, progress: Progress
) -> tuple[Loss | None, int]:
    """Trains until the steps are done or the held-out loss stands still; leaves the weights that were best held out.

    `initial` is the held-out loss as it is, `saved` what training goes on from, gone at the end. Returns the loss on the last
    training batch, and the steps done. Raises `UserError` where the loss is no longer a finite number.
    """
    options = problem.options
    parameters = [weight for weight in problem.module.parameters() if weight.requires_grad]
    state = _State(parameters, 2 + options.steps // options.eval_every)
    optimizer = _optimizer(parameters, options)
    first = 0
    if saved is not None and saved.exists():
        first = load_training(saved, state, optimizer, options.steps)
    else:
        state.note(initial.relative)
    writer = _event_writer(options, problem.name)
    train: Loss | None = None
    squares = torch.tensor(initial.squares, device=parameters[0].device)
    begun = told = kept = time.monotonic()

    def tell(step: int) -> None:
        progress(f"{problem.name}: held-out error {state.last:.3g}", step, options.steps)
        left = (time.monotonic() - begun) / max(step - first, 1) * (options.steps - step)
        if report is not None:
            relative = None if train is None else train.relative
            report(TrainingStatus(problem.name, step, options.steps, relative, state.last, left))

    tell(first)
    done = first
    for step in range(first, options.steps):
        # While the rate is high, the loss may stand or rise: it falls as the rate does.
        if 2 * step >= options.steps and state.stood_still(options.patience):
            break
        optimizer.zero_grad(set_to_none=True)
        samples = batch(problem.train, options.batch, options.seed, step)
        with precision(options):
            errors = problem.errors(samples)
        # Each stream against its own mean square: neither drowns the other.
        loss = (errors[:, 0] / (errors[:, 2] * squares)).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(step, options.steps)
        optimizer.step()
        done, now = step + 1, time.monotonic()
        evaluate = done % options.eval_every == 0 or done == options.steps
        if not evaluate and now - told <= REPORT_EVERY:
            continue
        train = Loss.of(errors.detach())
        if evaluate:
            if not math.isfinite(train.relative):
                raise UserError(
                    f"{problem.name}: the loss is not a finite number after {done} steps; choose a lower learning rate."
                )
            state.note(held_out_loss(problem, part(progress, done, options.steps, 0)).relative)
            if writer is not None:
                writer.add_scalar("loss/train", train.relative, done)
                writer.add_scalar("loss/held out", state.last, done)
            if saved is not None and now - kept >= SAVE_EVERY:
                save_training(saved, state, optimizer, done)
                kept = time.monotonic()
        tell(done)
        told = now
    state.restore_best()
    if writer is not None:
        writer.close()
    if saved is not None:
        saved.unlink(missing_ok=True)
    return train, done


class _State(nn.Module):
    """What is saved in the middle: the parameters, the best so far, and the held-out losses, one an evaluation.

    Losses are those of float32 weights: what is written is measured again, as it is rounded.
    """

    def __init__(self, parameters: list[nn.Parameter], evaluations: int):
        super().__init__()
        self.current = nn.ParameterList(parameters)
        for number, weight in enumerate(parameters):
            self.register_buffer(f"best{number}", weight.detach().clone())
        self.losses: Tensor
        self.register_buffer("losses", torch.full((evaluations,), -1.0, dtype=torch.float64))

    @property
    def curve(self) -> list[float]:
        return self.losses[self.losses != -1].tolist()

    @property
    def last(self) -> float:
        return self.curve[-1]

    def note(self, loss: float) -> None:
        """A held-out loss; the weights are kept where it is the least so far."""
        if all(loss < before for before in self.curve):
            for number, weight in enumerate(self.current):
                self.get_buffer(f"best{number}").copy_(weight.detach())
        self.losses[len(self.curve)] = loss

    def stood_still(self, patience: int) -> bool:
        """Whether the last `patience` losses are neither below all before them nor on their way down."""
        before, latest = self.curve[:-patience], self.curve[-patience:]
        if not before:
            return False
        return min(latest) > (1 - LEAST_GAIN) * min(before) and latest[-1] > (1 - LEAST_GAIN) * before[-1]

    @torch.no_grad()
    def restore_best(self) -> None:
        for number, weight in enumerate(self.current):
            weight.copy_(self.get_buffer(f"best{number}"))


def _optimizer(parameters: list[nn.Parameter], options: Options) -> torch.optim.Optimizer:
    if options.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=options.learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: up over the first tenth, then down along a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _event_writer(options: Options, name: str) -> Any:
    if options.tensorboard is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("Event files need the package tensorboard: install it, or leave that option out.") from error
    return SummaryWriter(str(options.tensorboard / name))
