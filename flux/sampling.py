"""Noise levels from noise to image: what a run of a FLUX steps along.

    sigmas = FluxTimer(steps=28, shift="dynamic").sigmas(image_tokens=4096)
    image = euler(lambda x, sigma: model(x, sigma, context, vector), noise, sigmas)      # `integrators.py`

sigma runs from 1 (noise) to 0 (image), with x = (1 - sigma) * image + sigma * noise and velocity = noise - image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

#: What a person is offered that bends the levels, and `FluxTimer.shift` of it; None: a number beside it.
SHIFTS: dict[str, Literal["dynamic", "flux2"] | None] = {
    "FLUX.1 (by size)": "dynamic",
    "FLUX.2 (by size and steps)": "flux2",
    "static": None,
}


@dataclass(frozen=True)
class FluxTimer:
    """A schedule of `steps` steps.

    `shift` bends it towards noise: a number s maps t to s t / (1 + (s - 1) t) (1 leaves it linear, FLUX.1-schnell);
    "dynamic" is FLUX.1-dev's shift, which grows with the image; "flux2" is FLUX.2's, which depends on the steps too.
    With `denoise` below 1 these are the last of int(steps / denoise) steps, as in ComfyUI: they begin at a lower noise level,
    for an image that is there already.
    """

    steps: int
    shift: float | Literal["dynamic", "flux2"] = 1.0
    denoise: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"A schedule takes at least 1 step; {self.steps} were asked for.")
        if not isinstance(self.shift, str) and not 0 < self.shift < math.inf:
            raise UserError(f"A static shift is a number above 0 (1 = none); found {self.shift}.")
        if not 0 < self.denoise <= 1:
            raise UserError(f"denoise is above 0, and at most 1 (from noise alone); found {self.denoise}.")

    def sigmas(self, image_tokens: int = 4096) -> Tensor:
        """Noise levels [steps + 1], float32, falling to exactly 0, from 1 where `denoise` is 1; `image_tokens` counts patches
        of 16x16 pixels."""
        steps = int(self.steps / self.denoise)
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[-(self.steps + 1) :]
        if self.shift == "dynamic":
            t = _exponential_shift(t, dynamic_mu(image_tokens))
        elif self.shift == "flux2":
            t = _exponential_shift(t, flux2_mu(image_tokens, steps))
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
