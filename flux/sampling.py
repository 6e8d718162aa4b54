"""From noise to image: schedules of noise levels, and Euler steps along them.

    sigmas = FluxTimer(steps=28, shift="dynamic").sigmas(image_tokens=4096)
    image = euler(lambda x, sigma: model(x, sigma, context, vector), noise, sigmas)

sigma runs from 1 (noise) to 0 (image), with x = (1 - sigma) * image + sigma * noise and velocity = noise - image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class FluxTimer:
    """A schedule of `steps` Euler steps.

    `shift` bends it towards noise: a number s maps t to s t / (1 + (s - 1) t) (1 leaves it linear, FLUX.1-schnell);
    "dynamic" is FLUX.1-dev's shift, which grows with the image; "flux2" is FLUX.2's, which depends on the steps too.
    """

    steps: int
    shift: float | Literal["dynamic", "flux2"] = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"A schedule takes at least 1 step; {self.steps} were asked for.")
        if not isinstance(self.shift, str) and self.shift <= 0:
            raise UserError(f"A static shift is a number above 0 (1 = none); found {self.shift}.")

    def sigmas(self, image_tokens: int = 4096) -> Tensor:
        """Noise levels [steps + 1], float32, from 1 to exactly 0; `image_tokens` counts patches of 16x16 pixels."""
        t = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        if self.shift == "dynamic":
            t = _exponential_shift(t, dynamic_mu(image_tokens))
        elif self.shift == "flux2":
            t = _exponential_shift(t, flux2_mu(image_tokens, self.steps))
        else:
            t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.float()


def dynamic_mu(image_tokens: int) -> float:
    """FLUX.1's mu: linear through (256 tokens, 0.5) and (4096, 1.15) (black-forest-labs/flux `sampling.py`)."""
    return 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256)


def flux2_mu(image_tokens: int, steps: int) -> float:
    """FLUX.2's empirical mu from image tokens and steps (black-forest-labs/flux2 `sampling.py`)."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-5 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def _exponential_shift(t: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1/t - 1), written so that t = 0 stays 0."""
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Follows `velocity(x, sigma [batch])` from `noise` [batch, ...] along `sigmas`; the latents at the last sigma.

    `on_step(step, x, v)` sees each x before its step and the velocity there.
    """
    x = noise
    for step, (now, after) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        v = velocity(x, torch.full((len(x),), now, device=x.device, dtype=x.dtype))
        if on_step is not None:
            on_step(step, x, v)
        x = x + (after - now) * v
    return x
