"""A FLUX to hold in the hand: draws the handwritten digits of scikit-learn from prompts such as "three" or "a 7".

    tiny = TinyFlux.load()                           # the weights that ship with the package
    images = tiny.draw(["three", "a 7"], seed=1)     # [2, 3, 64, 64] in 0..1

FLUX.1's layout at hidden 128 with 2 double and 4 single blocks, a word encoder, and a TAESD-shaped autoencoder:
everything in the package can be tried on it on a CPU. `flux-poke train tiny` makes it from scratch (`training.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..flux.autoencoder import CHANNELS, Autoencoder
from ..flux.checkpoint import Checkpoint
from ..flux.model import Flux
from ..flux.sampling import FluxTimer, euler
from .words import WordEncoder

FOLDER = Path(__file__).parent
LATENT_SIDE = 8
STEPS = 20


@dataclass
class TinyFlux:
    """Transformer, word encoder and autoencoder; `files` are where they come from."""

    flux: Flux
    words: WordEncoder
    autoencoder: Autoencoder

    @classmethod
    def load(cls, flux: Path | None = None, dtype: torch.dtype = torch.float32) -> TinyFlux:
        """The tiny FLUX whose transformer is the file `flux` (default: the shipped one).

        `words.safetensors` and `autoencoder.safetensors` are taken from beside it where they exist, else the shipped
        ones. Raises `UserError` where the transformer does not take the word encoder's embeddings.
        """
        path = flux or FOLDER / "flux.safetensors"
        checkpoint = Checkpoint(path)
        model = Flux.load(checkpoint.tensors(), dtype, source=str(path))

        def beside(name: str) -> dict[str, Tensor]:
            here = path.parent / name
            return load_file(here if here.exists() else FOLDER / name)

        words = WordEncoder.load(beside("words.safetensors"))
        if (model.layout.context, model.layout.vector) != (words.width, words.width):
            raise UserError(
                f"{path} takes text of width {model.layout.context} and a vector of width {model.layout.vector}; the tiny "
                f"word encoder gives {words.width} for both. Models of other text encoders run in ComfyUI."
            )
        return cls(model, words, Autoencoder.load(beside("autoencoder.safetensors")))

    def noise(self, count: int, seed: int) -> Tensor:
        """Starting latents [count, 16, 8, 8]; each image's own noise depends on `seed` and its number alone."""
        generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
        return torch.stack([torch.randn(CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=g) for g in generators])

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], noise: Tensor, sigmas: Tensor | None = None, on_step=None) -> Tensor:
        """Latents [prompts, 16, 8, 8] after `STEPS` Euler steps from `noise` (one row a prompt)."""
        context, vector = self.words(prompts)
        sigmas = FluxTimer(STEPS).sigmas() if sigmas is None else sigmas
        return euler(lambda x, sigma: self.flux(x, sigma, context, vector), noise, sigmas, on_step)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int = 0) -> Tensor:
        """Images [prompts, 3, 64, 64] in 0..1."""
        return self.autoencoder.decode(self.sample(prompts, self.noise(len(prompts), seed)))
