"""The training loop, one for all kinds of data.

    before = held_out_loss(problem, options)
    fitted = fit(problem, before, options, Path("3.training.safetensors"), report)
    fitted.curve                                     # held-out losses by step; the module now holds the best weights

A problem is a module, samples in groups that can be batched, and the squared errors of some of them. Batches depend on the
seed and the step alone, and the state is saved at evaluations: a killed training goes on, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.resume import load_training, save_training
from .options import Options, Progress, Report

#: A held-out loss that falls by less than this share of itself counts as standing still.
LEAST_GAIN = 0.002
#: Seconds between reports in the middle of a training, and between saved states.
REPORT_EVERY, SAVE_EVERY = 0.25, 30.0


class Problem(Protocol):
    """What is trained, and on what.

    `train` and `judge` are samples that can stand in one batch, group by group: int64 indices. `module`'s parameters that
    require gradients are trained.
    """

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def train(self) -> Sequence[Tensor]: ...

    @property
    def judge(self) -> Sequence[Tensor]: ...

    def errors(self, samples: Tensor) -> Tensor:
        """[streams, 3]: by stream, the sum of squared errors, the sum of squares of what is to be predicted, and of how many
        numbers."""
        ...


def split_images(image: Tensor, options: Options) -> tuple[set[int], set[int]]:
    """Image numbers to train on and to judge by, out of those of all samples, drawn by the seed.

    Prompts often come in turns: every fifth image could be of one kind, which the others would teach nothing about. Raises
    `UserError` for fewer than two images.
    """
    numbers = image.unique().tolist()
    if len(numbers) < 2:
        raise UserError(
            f"The recording is of {len(numbers)} image; at least 2 are needed, one of them to judge by. Record more images."
        )
    judged = set(random.Random(options.seed).sample(numbers, max(1, round(options.eval_share * len(numbers)))))
    return set(numbers) - judged, judged


def samples_of(images: set[int], image: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    """The samples of each group whose image is one of `images`; `image` [samples]."""
    chosen = torch.isin(image, torch.tensor(sorted(images)))
    return [part for group in groups if len(part := group[chosen[group]])]


def squared(found: Tensor, expected: Tensor) -> Tensor:
    """One stream of `Problem.errors` [3]: squared error, squares, how many."""
    found, expected = found.float(), expected.float()
    count = torch.tensor(float(expected.numel()), device=expected.device)
    return torch.stack(((found - expected).square().sum(), expected.square().sum(), count))


@dataclass(frozen=True)
class Loss:
    """Squared errors: `relative` to the mean square of what is to be predicted, mean over streams; `mse` over all numbers,
    as the original flux-poke has it; `streams` are the relative ones, `squares` what they are relative to."""

    relative: float
    mse: float
    streams: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, errors: Tensor) -> Loss:
        """From sums [streams, 3] as `Problem.errors` gives them."""
        squares = (errors[:, 1] / errors[:, 2]).clamp(min=1e-30)
        streams = (errors[:, 0] / errors[:, 2] / squares).tolist()
        mse = (errors[:, 0].sum() / errors[:, 2].sum()).item()
        return cls(sum(streams) / len(streams), mse, tuple(streams), tuple(squares.tolist()))


@dataclass(frozen=True)
class Fitted:
    """Loss on the last training batch, steps done, and the curve (step, relative held-out loss)."""

    train: Loss | None
    steps: int
    curve: tuple[tuple[int, float], ...]


def fit(problem: Problem, initial: Loss, options: Options, saved: Path | None = None, report: Report | None = None) -> Fitted:
    """Trains until the steps are done or the held-out loss stands still; leaves the weights that were best held out.

    `initial` is the held-out loss as it is.

    `saved` is where the state goes while it runs, and what it goes on from; it is gone at the end. Raises `UserError` where the
    loss is no number any more.
    """
    parameters = [weight for weight in problem.module.parameters() if weight.requires_grad]
    state = _State(parameters, 2 + options.steps // options.eval_every)
    optimizer = _optimizer(parameters, options)
    first = 0
    if saved is not None and saved.exists():
        first = load_training(saved, state, optimizer, options.steps)
    else:
        state.note(0, initial.relative)
    writer = _event_writer(options, problem.name)
    train: Loss | None = None
    squares = torch.tensor(initial.squares, device=parameters[0].device)
    begun = told = kept = time.monotonic()

    def tell(step: int) -> None:
        left = (time.monotonic() - begun) / max(step - first, 1) * (options.steps - step)
        if report is not None:
            relative = None if train is None else train.relative
            report(Progress(problem.name, step, options.steps, relative, state.last, left))

    tell(first)
    done = first
    for step in range(first, options.steps):
        # While the rate is high, the loss may stand or rise: it falls as the rate does.
        if 2 * step >= options.steps and state.stood_still(options.patience):
            break
        optimizer.zero_grad(set_to_none=True)
        samples = batch(problem.train, options.batch, options.seed, step)
        with _precision(options):
            errors = problem.errors(samples)
        # Each stream against its own mean square: neither drowns the other.
        loss = (errors[:, 0] / (errors[:, 2] * squares)).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(step, options.steps)
        optimizer.step()
        done = step + 1
        now = time.monotonic()
        if done % options.eval_every == 0 or done == options.steps:
            train = Loss.of(errors.detach())
            if not math.isfinite(train.relative):
                raise UserError(f"{problem.name}: the loss is no number after {done} steps; choose a lower learning rate.")
            state.note(done, held_out_loss(problem, options).relative)
            if writer is not None:
                writer.add_scalar("loss/train", train.relative, done)
                writer.add_scalar("loss/held out", state.last, done)
            if saved is not None and now - kept >= SAVE_EVERY:
                save_training(saved, state, optimizer, done)
                kept = time.monotonic()
            tell(done)
        elif now - told > REPORT_EVERY:
            train = Loss.of(errors.detach())
            tell(done)
            told = now
    state.restore_best()
    if writer is not None:
        writer.close()
    if saved is not None:
        saved.unlink(missing_ok=True)
    return Fitted(train, done, state.curve)


@torch.no_grad()
def held_out_loss(problem: Problem, options: Options) -> Loss:
    """On the images that are not trained on."""
    return Loss.of(_total(problem, problem.judge, options))


@torch.no_grad()
def _total(problem: Problem, groups: Sequence[Tensor], options: Options) -> Tensor:
    """Sums of `errors` over all samples of `groups`, float64 [streams, 3] on the CPU."""
    total: Tensor | None = None
    for group in groups:
        for samples in group.split(2 * options.batch):
            with _precision(options):
                errors = problem.errors(samples).double().cpu()
            total = errors if total is None else total + errors
    if total is None:
        raise UserError(f"There is nothing to judge {problem.name} by: record more images.")
    return total


def batch(groups: Sequence[Tensor], size: int, seed: int, step: int) -> Tensor:
    """The samples of one step: every pass over all of them has its own order, and no batch mixes groups."""
    per_pass = sum(max(1, len(group) // size) for group in groups)
    turn, place = divmod(step, per_pass)
    generator = torch.Generator().manual_seed(hash((seed, turn)))
    parts: list[Tensor] = []
    for group in groups:
        order = group[torch.randperm(len(group), generator=generator)]
        parts += order.split(size)[: max(1, len(group) // size)]
    return parts[int(torch.randperm(per_pass, generator=generator)[place])]


class _State(nn.Module):
    """What is saved in the middle: the parameters, the best so far, and the curve. Losses that fail the saved dtype's rounding
    are no matter here: what is written is judged again."""

    def __init__(self, parameters: list[nn.Parameter], evaluations: int):
        super().__init__()
        self.current = nn.ParameterList(parameters)
        for number, weight in enumerate(parameters):
            self.register_buffer(f"best{number}", weight.detach().clone())
        self.steps: Tensor
        self.losses: Tensor
        self.register_buffer("steps", torch.full((evaluations,), -1))
        self.register_buffer("losses", torch.zeros(evaluations, dtype=torch.float64))

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        known = int((self.steps >= 0).sum())
        return tuple(zip(self.steps[:known].tolist(), self.losses[:known].tolist(), strict=True))

    @property
    def last(self) -> float:
        return self.curve[-1][1]

    def note(self, step: int, loss: float) -> None:
        """A held-out loss; the weights are kept where it is the least so far."""
        if all(loss < before for _, before in self.curve):
            for number, weight in enumerate(self.current):
                self.get_buffer(f"best{number}").copy_(weight.detach())
        place = len(self.curve)
        self.steps[place], self.losses[place] = step, loss

    def stood_still(self, patience: int) -> bool:
        """Whether the last `patience` losses are neither below all before them nor on their way down."""
        losses = [loss for _, loss in self.curve]
        if len(losses) <= patience:
            return False
        before, latest = losses[:-patience], losses[-patience:]
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


def _precision(options: Options):
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.mixed_precision)


def _event_writer(options: Options, name: str) -> Any:
    if options.tensorboard is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("Event files need the package tensorboard: install it, or leave that option out.") from error
    return SummaryWriter(str(options.tensorboard / name))
