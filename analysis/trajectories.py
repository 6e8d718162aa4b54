"""Where a dense model goes from noise to image, and how far a changed one strays from it there.

points, latents = trajectory(dense, noise, sigmas, context, vector)
velocity_error(pruned, points)                   # at the dense run's x_t
relative_error(latents, other_latents)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flux.sampling import euler

#: velocity = model(x, sigma, context, vector, guidance); `flux.model.Flux` is one.
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """One call of a FLUX: latents x [batch, ...], sigma [batch], what it is told, and the velocity that came of it."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    vector: Tensor | None
    guidance: Tensor | None
    velocity: Tensor

    def __getitem__(self, images: slice) -> Point:
        """The same for some images of the batch."""
        parts = (self.x, self.sigma, self.context, self.vector, self.guidance, self.velocity)
        return Point(*(None if part is None else part[images] for part in parts))  # type: ignore[arg-type]

    def run(self, model: Model) -> Tensor:
        """The velocity of another model there."""
        return model(self.x, self.sigma, self.context, self.vector, self.guidance)


@torch.no_grad()
def trajectory(
    model: Model, noise: Tensor, sigmas: Tensor, context: Tensor, vector: Tensor | None = None, guidance: Tensor | None = None
) -> tuple[list[Point], Tensor]:
    """Every point an Euler run goes through, and the latents it ends at."""
    points: list[Point] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        points.append(Point(x, sigma, context, vector, guidance, model(x, sigma, context, vector, guidance)))
        return points[-1].velocity

    return points, euler(velocity, noise, sigmas)


@torch.no_grad()
def velocity_error(model: Model, points: Sequence[Point]) -> float:
    """Sum over all points of |difference to the velocity there|², divided by the sum of |velocity|²."""
    difference, energy = 0.0, 0.0
    for point in points:
        difference += (point.run(model).double() - point.velocity.double()).square().sum().item()
        energy += point.velocity.double().square().sum().item()
    return difference / energy


def relative_error(expected: Tensor, found: Tensor) -> float:
    """|found - expected|² / |expected|²."""
    expected = expected.double()
    return ((found.double() - expected).square().sum() / expected.square().sum()).item()
