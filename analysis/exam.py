"""How near a changed FLUX of the tiny kind comes to the dense one, on prompts and noise that no recording saw.

exam = Exam(TinyFlux.load(path), prompts, tiny.noise(len(prompts), seed=500_000))
near = exam.compared("half", pruned_tensors)
near.velocity_error, near.latent_error, near.psnr, near.seconds_a_step
exam.images["half"]                              # what it draws
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flux.model import Flux
from ..recording.trajectories import relative_error, trajectory, velocity_error
from ..tiny.model import TinyFlux

#: Velocities are compared on the first of the measured images, all else on all of them.
COMPARED = 50


@dataclass(frozen=True)
class Nearness:
    """What a changed model does otherwise: `velocity_error` and `latent_error` are relative squared ones, `psnr` of the images
    is in dB, None where they are equal; `seconds_a_step` by the clock, all images together."""

    velocity_error: float = 0.0
    latent_error: float = 0.0
    psnr: float | None = None
    seconds_a_step: float = 0.0


class Exam:
    """Drawings of the dense model, from `noise` of one row a prompt."""

    def __init__(self, tiny: TinyFlux, prompts: Sequence[str], noise: Tensor):
        self.tiny, self.prompts, self.noise = tiny, [*prompts], noise
        points, self.latents = trajectory(tiny.flux, noise, tiny.sigmas(), *tiny.words(self.prompts))
        self.points = [point[:COMPARED] for point in points]
        self.images = {"dense": self.decoded(self.latents)}

    def decoded(self, latents: Tensor) -> Tensor:
        """Images in 0..1; by tens, which stay in the processor's cache."""
        return torch.cat([self.tiny.autoencoder.decode(some) for some in latents.split(10)])

    def compared(self, name: str, tensors: Mapping[str, Tensor]) -> Nearness:
        """How the model with these tensors does; its drawings are `images[name]` then."""
        changed = TinyFlux(Flux.load(tensors, torch.float32), self.tiny.words, self.tiny.autoencoder)
        velocity, begun = velocity_error(changed.flux, self.points), time.perf_counter()
        latents = changed.sample(self.prompts, self.noise)
        seconds = (time.perf_counter() - begun) / len(self.points)
        self.images[name] = self.decoded(latents)
        mse = (self.images[name] - self.images["dense"]).square().mean((1, 2, 3))
        psnr = (-10 * mse.clamp(min=1e-12).log10()).mean().item() if mse.any() else None
        return Nearness(velocity, relative_error(self.latents, latents), psnr, seconds)
