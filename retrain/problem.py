"""What is trained, on what, and how far it is off: the same for rows, block states and whole models.

problem = BlockProblem(chain, states, options)               # or RowProblem, VelocityProblem
held_out_loss(problem).relative
problem.errors(batch(problem.train, options.batch, options.seed, step))
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, autocast, nn

from ..progress import Progress, silent
from ..recording.split import held_out
from .options import Options


class Problem(ABC):
    """A module, of which the parameters that require gradients are trained, and samples split by image.

    `image` [samples] tells whose each sample is, `groups` which can stand in one batch: int64 indices, as those in `train` and
    `held_out`. `images` are the image numbers on either side. Raises `UserError` for fewer than two images.
    """

    def __init__(self, name: str, module: nn.Module, image: Tensor, groups: Sequence[Tensor], options: Options):
        self.name, self.module, self.options = name, module, options
        self.images = held_out(image, options.eval_share, options.seed)
        self.train, self.held_out = (_of_images(images, image, groups) for images in self.images)

    @abstractmethod
    def errors(self, samples: Tensor) -> Tensor:
        """[streams, 3]: by stream, the sum of squared errors, the sum of squares of what is to be predicted, and of how many
        numbers."""


def _of_images(images: set[int], image: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
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
    as the original flux-poke has it; `squares` are what each stream is relative to."""

    relative: float
    mse: float
    squares: tuple[float, ...] = ()

    @classmethod
    def of(cls, errors: Tensor) -> Loss:
        """From sums [streams, 3] as `Problem.errors` gives them."""
        squares = (errors[:, 1] / errors[:, 2]).clamp(min=1e-30)
        relative = (errors[:, 0] / errors[:, 2] / squares).mean().item()
        return cls(relative, (errors[:, 0].sum() / errors[:, 2].sum()).item(), tuple(squares.tolist()))


def precision(options: Options):
    return autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.mixed_precision)


@torch.no_grad()
def held_out_loss(problem: Problem, progress: Progress = silent) -> Loss:
    """On the images that are not trained on."""
    batches = [samples for group in problem.held_out for samples in group.split(2 * problem.options.batch)]
    errors = []
    for done, samples in enumerate(batches):
        progress(f"{problem.name}: measuring on held-out images", done, len(batches))
        with precision(problem.options):
            errors.append(problem.errors(samples).double().cpu())
    return Loss.of(torch.stack(errors).sum(0))


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
