"""Where a dense model goes from noise to image, and how far a changed one strays from it there.

points, latents = trajectory(model, noise, sigmas, context, vector)
velocity_error(dense, pruned, points)            # both at the dense run's x_t
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
    """One call of a FLUX: latents x [batch, ...], sigma [batch], and what it is told."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    vector: Tensor | None = None
    guidance: Tensor | None = None

    def velocity(self, model: Model) -> Tensor:
        return model(self.x, self.sigma, self.context, self.vector, self.guidance)


@torch.no_grad()
def trajectory(
    model: Model, noise: Tensor, sigmas: Tensor, context: Tensor, vector: Tensor | None = None, guidance: Tensor | None = None
) -> tuple[list[Point], Tensor]:
    """Every point an Euler run goes through, and the latents it ends at."""
    points: list[Point] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        points.append(Point(x, sigma, context, vector, guidance))
        return points[-1].velocity(model)

    return points, euler(velocity, noise, sigmas)


@torch.no_grad()
def velocity_error(dense: Model, changed: Model, points: Sequence[Point]) -> float:
    """Sum over all points of |difference to the dense velocity|², divided by the sum of |dense velocity|²."""
    difference, energy = 0.0, 0.0
    for point in points:
        expected = point.velocity(dense).double()
        difference += (point.velocity(changed).double() - expected).square().sum().item()
        energy += expected.square().sum().item()
    return difference / energy


def relative_error(expected: Tensor, found: Tensor) -> float:
    """|found - expected|² / |expected|²."""
    expected = expected.double()
    return ((found.double() - expected).square().sum() / expected.square().sum()).item()
