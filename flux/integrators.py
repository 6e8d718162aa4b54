"""From noise to image along noise levels: four ways to follow a velocity, behind one interface.

    image = euler(lambda x, sigma: model(x, sigma, context, vector), noise, sigmas)
    image = heun(velocity, noise, sigmas)
    image = dpmpp_2m(velocity, noise, sigmas)
    image = Stochastic(churn=10.0, seed=7)(velocity, noise, sigmas)
    image = integrator("stochastic", seed=7)(velocity, noise, sigmas)

Each returns the latents at the last level. Where `noise` is not pure noise, `sigmas` begins at its level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .predictions import convert

#: (x [batch, ...], sigma [batch]) to the velocity at x.
Velocity = Callable[[Tensor, Tensor], Tensor]
#: (step, x, v): told each x before its step and the velocity there.
OnStep = Callable[[int, Tensor, Tensor], None]
#: What `integrator` knows.
Name = Literal["euler", "heun", "dpmpp_2m", "stochastic"]
NAMES: tuple[Name, ...] = get_args(Name)


class Integrator(Protocol):
    def __call__(self, velocity: Velocity, noise: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
        """The latents [batch, ...] at the last of `sigmas` [steps + 1], from `noise` at the first."""


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """One evaluation a step, of first order; for a FLUX the same as DDIM without noise."""
    x, levels = noise, sigmas.tolist()
    for step, (now, after) in enumerate(pairwise(levels)):
        x = x + (after - now) * _seen(velocity, x, now, step, on_step)
    return x


def heun(velocity: Velocity, noise: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Two evaluations a step, of second order (Karras et al. 2022, algorithm 1); one in the step to 0, where no FLUX was
    trained."""
    x, levels = noise, sigmas.tolist()
    for step, (now, after) in enumerate(pairwise(levels)):
        v = _seen(velocity, x, now, step, on_step)
        if after > 0:
            v = (v + _at(velocity, x + (after - now) * v, after)) / 2
        x = x + (after - now) * v
    return x


def dpmpp_2m(velocity: Velocity, noise: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """One evaluation a step, of second order: x0 is continued in a line from the step before (Lu et al. 2022, DPM-Solver++,
    algorithm 2), over half the log of the signal-to-noise ratio, log((1 - sigma) / sigma).

    At sigma 1 and 0 that is infinite, and the steps beside them are of first order.
    """
    x, levels = noise, sigmas.tolist()
    before: Tensor | None = None
    for step, (now, after) in enumerate(pairwise(levels)):
        x0 = convert(_seen(velocity, x, now, step, on_step), x, now, "velocity", "x0")
        goal = x0
        if before is not None and levels[step - 1] < 1 and after > 0:
            last, next_ = _half_log_snr(now) - _half_log_snr(levels[step - 1]), _half_log_snr(after) - _half_log_snr(now)
            goal = x0 + next_ / (2 * last) * (x0 - before)
        x = after / now * x + (1 - after / now) * goal
        before = x0
    return x


@dataclass(frozen=True)
class Stochastic:
    """DDIM with fresh noise in every step, each image's own.

    `eta` is the share of it: 0 is Euler's method, 1 the reverse of the forward process (Song et al. 2021, eq. 16, written for
    x = (1 - sigma) * image + sigma * noise). `churn` first raises the noise level by churn / steps of itself, at most by
    sqrt(2) - 1 (Karras et al. 2022, algorithm 2, whose level is sigma / (1 - sigma)). The noise of image n goes on from
    that which `seed` + n begins with.
    """

    eta: float = 1.0
    churn: float = 0.0
    seed: int = 0

    def __call__(self, velocity: Velocity, noise: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
        generators = [torch.Generator().manual_seed(self.seed + number) for number in range(len(noise))]

        def fresh() -> Tensor:
            drawn = [torch.randn(noise.shape[1:], generator=generator) for generator in generators]
            return torch.stack(drawn).to(noise)

        fresh()  # what the images begin with
        x, levels = noise, sigmas.tolist()
        gain = 1 + min(self.churn / (len(levels) - 1), math.sqrt(2) - 1)
        for step, (now, after) in enumerate(pairwise(levels)):
            if gain > 1 and now < 1:
                raised = gain * now / (gain * now + 1 - now)
                kept = (1 - raised) / (1 - now)
                x = kept * x + math.sqrt(raised**2 - (kept * now) ** 2) * fresh()
                now = raised
            v = _seen(velocity, x, now, step, on_step)
            x0, old = (convert(v, x, now, "velocity", to) for to in ("x0", "noise"))
            ratio = (1 - now) * after / ((1 - after) * now) if after < 1 else 1.0
            new = self.eta * after * math.sqrt(max(0.0, 1 - ratio**2))
            x = (1 - after) * x0 + math.sqrt(after**2 - new**2) * old
            if new > 0:
                x = x + new * fresh()
        return x


def integrator(name: Name, seed: int = 0) -> Integrator:
    """The one of a name; `seed` is that of the first image, for fresh noise."""
    known: dict[Name, Integrator] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "stochastic": Stochastic(seed=seed)}
    return known[name]


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def _at(velocity: Velocity, x: Tensor, sigma: float) -> Tensor:
    return velocity(x, torch.full((len(x),), sigma, device=x.device, dtype=x.dtype))


def _seen(velocity: Velocity, x: Tensor, sigma: float, step: int, on_step: OnStep | None) -> Tensor:
    v = _at(velocity, x, sigma)
    if on_step is not None:
        on_step(step, x, v)
    return v
