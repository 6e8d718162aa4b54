"""The two tiny FLUXes, on the server and as the reference draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from flux_poke.flux.integrators import euler
from flux_poke.flux.layout import Family
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.tiny.model import SHIPPED, TinyFlux
from flux_poke.tiny.words import pad_text


@dataclass(frozen=True)
class TinyFamily:
    family: Family
    #: What Load Tiny FLUX calls it, and what the loaders call its file.
    name: str
    file: str

    @property
    def node(self) -> dict:
        return {"class_type": "FluxPokeLoadTinyFlux", "inputs": {"family": self.name}}

    @property
    def checkpoint(self):
        return SHIPPED[self.family] / "flux.safetensors"

    def empty(self, batch: int) -> dict:
        """The node of an empty latent."""
        kind = "EmptySD3LatentImage" if self.family == "flux1" else "EmptyFlux2LatentImage"
        return {"class_type": kind, "inputs": {"width": 64, "height": 64, "batch_size": batch}}

    def load(self) -> TinyFlux:
        return TinyFlux.load(family=self.family)

    def sigmas(self, steps: int) -> torch.Tensor:
        """Those of KSampler's "simple": FLUX.2 is shifted by 2.02 there, FLUX.1-schnell is not."""
        return FluxTimer(steps, shift=1.0 if self.family == "flux1" else math.exp(2.02)).sigmas()

    def texts(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context and vector as the model gets them from ComfyUI."""
        context, vector = self.load().words(prompts)
        return (context if self.family == "flux1" else pad_text(context)), vector

    @torch.no_grad()
    def latents(
        self, flux: Flux, prompt: str, seed: int, batch: int, steps: int = 20, references: tuple[torch.Tensor, ...] = ()
    ) -> torch.Tensor:
        """What the reference transformer draws of KSampler's noise."""
        context, vector = self.texts([prompt] * batch)
        noise = torch.randn(batch, *self.load().latent_shape, generator=torch.Generator().manual_seed(seed))
        return euler(lambda x, sigma: flux(x, sigma, context, vector, None, references), noise, self.sigmas(steps))

    def images(self, latents: torch.Tensor):
        """0..255, [batch, height, width, 3]."""
        return self.load().autoencoder.decode(latents).mul(255).permute(0, 2, 3, 1).numpy()


@pytest.fixture(
    scope="module",
    params=[
        TinyFamily("flux1", "FLUX.1", "tiny FLUX (ships with the pack)"),
        TinyFamily("flux2", "FLUX.2", "tiny FLUX.2 (ships with the pack)"),
    ],
    ids=["flux1", "flux2"],
)
def tiny_family(request: pytest.FixtureRequest) -> TinyFamily:
    return request.param


@pytest.fixture(scope="session")
def tiny_flux2() -> TinyFamily:
    return TinyFamily("flux2", "FLUX.2", "tiny FLUX.2 (ships with the pack)")
