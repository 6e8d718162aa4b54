"""A small FLUX that draws the handwritten digits of scikit-learn from prompts such as "three" or "a 7".

    tiny = TinyFlux.load()                           # the weights that ship with the package
    images = tiny.draw(["three", "a 7"], seed=1)     # [2, 3, 64, 64] in 0..1

FLUX.1's layout at hidden 128 with 2 double and 4 single blocks, a word encoder, and a TAESD-shaped autoencoder:
everything in the package can be tried on it on a CPU. `uv run flux-poke train tiny` makes it from scratch (`training.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.autoencoder import CHANNELS, Autoencoder
from ..flux.checkpoint import Checkpoint, open_safetensors
from ..flux.model import Flux
from ..flux.sampling import FluxTimer, euler
from .words import WordEncoder

FOLDER = Path(__file__).parent
LATENT_SIDE = 8
STEPS = 20

Loaded = TypeVar("Loaded")


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
        ones. Raises `UserError` where the transformer does not take the word encoder's embeddings, or a file is damaged.
        """
        path = flux or FOLDER / "flux.safetensors"
        checkpoint = Checkpoint(path)
        model = Flux.load(checkpoint.tensors(), dtype, source=str(path))

        words = _beside(path, "words.safetensors", WordEncoder.load, "the words of a tiny FLUX")
        if (model.layout.context, model.layout.vector) != (words.width, words.width):
            raise UserError(
                f"{path} takes text of width {model.layout.context} and a vector of width {model.layout.vector}; the tiny "
                f"word encoder gives {words.width} for both. Models of other text encoders run in ComfyUI."
            )
        return cls(model, words, _beside(path, "autoencoder.safetensors", Autoencoder.load, "an autoencoder"))

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


def _beside(checkpoint: Path, name: str, load: Callable[[Mapping[str, Tensor]], Loaded], what: str) -> Loaded:
    """What `load` makes of the file called `name` beside a checkpoint, or of the shipped one where there is none."""
    path = checkpoint.parent / name
    path = path if path.exists() else FOLDER / name
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    try:
        return load(tensors)
    except (KeyError, IndexError, RuntimeError, UserError) as error:
        found = " ".join(str(error).split())
        raise UserError(
            f"{path} does not hold {what} ({found[:200]}): move it elsewhere, or train the tiny FLUX again."
        ) from error
