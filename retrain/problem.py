"""What is trained, on what, and how far it is off: the same for rows, block states and whole models.

    problem = BlockProblem(name, chain, states, options)         # or RowProblem, VelocityProblem
    held_out_loss(problem, options).relative
    problem.errors(batch(problem.train, options.batch, options.seed, step))

A problem is a module, samples in groups that can be batched, and the squared errors of some of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..progress import Progress, silent
from .options import Options


class Problem(Protocol):
    """What is trained, and on what.

    `train` and `held_out` are samples that can stand in one batch, group by group: int64 indices. `module`'s parameters that
    require gradients are trained.
    """

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def train(self) -> Sequence[Tensor]: ...

    @property
    def held_out(self) -> Sequence[Tensor]: ...

    def errors(self, samples: Tensor) -> Tensor:
        """[streams, 3]: by stream, the sum of squared errors, the sum of squares of what is to be predicted, and of how many
        numbers."""
        ...


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


def precision(options: Options):
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.mixed_precision)


@torch.no_grad()
def held_out_loss(problem: Problem, options: Options, progress: Progress = silent) -> Loss:
    """On the images that are not trained on."""
    batches = [samples for group in problem.held_out for samples in group.split(2 * options.batch)]
    if not batches:
        raise UserError(f"There are no held-out images of {problem.name}: record more images.")
    total: Tensor | None = None
    for done, samples in enumerate(batches):
        progress(f"{problem.name}: measuring on held-out images", done, len(batches))
        with precision(options):
            errors = problem.errors(samples).double().cpu()
        total = errors if total is None else total + errors
    assert total is not None
    return Loss.of(total)


def batch(groups: Sequence[Tensor], size: int, seed: int, step: int) -> Tensor:
    """The samples of one step: every pass over all of them has its own order, and no batch mixes groups."""
    per_pass = sum(max(1, len(group) // size) for group in groups)
    turn, number = divmod(step, per_pass)
    generator = seeded(f"batches {seed} {turn}")
    parts: list[Tensor] = []
    for group in groups:
        order = group[torch.randperm(len(group), generator=generator)]
        parts += order.split(size)[: max(1, len(group) // size)]
    return parts[int(torch.randperm(per_pass, generator=generator)[number])]


def seeded(what: str) -> torch.Generator:
    """A generator that `what` alone decides about, on every machine and in every version of Python."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big"))
