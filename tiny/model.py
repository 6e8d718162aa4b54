"""Small FLUXes that draw the handwritten digits of scikit-learn from prompts such as "three" or "a 7".

    tiny = TinyFlux.load()                           # the weights that ship with the package: FLUX.1, or family="flux2"
    images = tiny.draw(["three", "a 7"], seed=1)     # [2, 3, 64, 64] in 0..1

FLUX.1's or FLUX.2's layout at hidden 128 with 2 double and 4 single blocks, a word encoder, and a TAESD-shaped autoencoder:
everything in the package can be tried on it on a CPU. `uv run flux-poke train tiny` makes it from scratch, and others of its
kind (`training/`): larger ones, of other pictures and words.
FLUX.2 also takes a reference digit, and draws it again ("the same") or in black on white ("the negative of it").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.autoencoder import Autoencoder, Pixels, load_autoencoder
from ..flux.checkpoint import Checkpoint, read_finite
from ..flux.integrators import Velocity, euler
from ..flux.layout import Family, Layout
from ..flux.model import Flux
from ..flux.sampling import FluxTimer
from ..flux.weights import Plain
from .words import WordEncoder

FOLDER = Path(__file__).parent
#: Folder of the files that ship, by family.
SHIPPED: dict[Family, Path] = {"flux1": FOLDER, "flux2": FOLDER / "flux2"}
STEPS = 20

Loaded = TypeVar("Loaded")


@dataclass
class TinyFlux:
    """Transformer, word encoder and autoencoder; `files` are where they come from."""

    flux: Flux
    words: WordEncoder
    autoencoder: Autoencoder | Pixels

    @classmethod
    def load(cls, flux: Path | None = None, dtype: torch.dtype = torch.float32, family: Family = "flux1") -> TinyFlux:
        """The tiny FLUX whose transformer is the file `flux` (default: the shipped one of `family`).

        `words.safetensors` and `autoencoder.safetensors` are taken from beside it where they exist, else the shipped
        ones of its family. Raises `UserError` where the transformer does not take the word encoder's embeddings, or a file is
        damaged.
        """
        path = flux or SHIPPED[family] / "flux.safetensors"
        checkpoint = Checkpoint(path)
        layout, words = checkpoint.layout, _words(checkpoint)
        if (layout.context, layout.vector) != (given := _widths(words, layout)):  # told before a large model is read
            raise UserError(
                f"{path} takes text of width {layout.context} and a vector of width {layout.vector}; the tiny "
                f"word encoder gives {given[0]} and {given[1]}. Models of other text encoders run in ComfyUI: record them "
                "there, or name it to `draw` or `fit` with --comfyui FOLDER or --server HOST:PORT."
            )
        model = Flux.load(dict(Plain(checkpoint)), dtype, source=str(path))
        return cls(model, words, _autoencoder(checkpoint))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image's latents: (16, 8, 8) in FLUX.1 and (128, 4, 4) in FLUX.2, of what ships."""
        return self.autoencoder.latent_shape

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens an image takes in each stream, the text padded."""
        img = self.latent_shape[1] * self.latent_shape[2] // self.flux.layout.patch**2
        return {"img": img, "txt": self.words.padded, "single": img + self.words.padded}

    def latent_shape_of(self, width: int | None, height: int | None) -> tuple[int, int, int]:
        """Of a picture of that size in pixels, which are multiples of what a token stands for; None is the model's own."""
        channels, rows, columns = self.latent_shape
        if width is None and height is None:
            return channels, rows, columns
        return channels, (height or rows * self.scale) // self.scale, (width or columns * self.scale) // self.scale

    @property
    def scale(self) -> int:
        """Pixels along a latent's."""
        return self.autoencoder.side // self.latent_shape[-1]

    @property
    def shift(self) -> float | Literal["flux2"]:
        """Noise levels are evenly spaced in FLUX.1 (as schnell), and FLUX.2 has a schedule of its own."""
        return "flux2" if self.flux.layout.family == "flux2" else 1.0

    def sigmas(self, steps: int = STEPS) -> Tensor:
        """Noise levels [steps + 1] of the model's own `shift` (FLUX.2's: ComfyUI's Flux2Scheduler)."""
        return FluxTimer(steps, self.shift).sigmas(self.tokens["img"])

    def noise(self, count: int, seed: int, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Starting latents [count, *shape], by default of the model's own; each image's own noise depends on `seed` and its
        number alone."""
        generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
        return torch.stack([torch.randn(shape or self.latent_shape, generator=g) for g in generators])

    def velocity(
        self,
        prompts: Sequence[str],
        references: Sequence[Tensor] = (),
        guidance: float = 1.0,
        negative: str = "",
        told: Tensor | None = None,
    ) -> Velocity:
        """What a run of `prompts` follows, from latents of one row a prompt.

        `guidance` other than 1 is classifier-free: what the prompt changes against `negative`, times `guidance` (Ho & Salimans
        2022, arXiv 2207.12598), for models that were trained to do without a prompt; `told` [prompts] is what a model with
        distilled guidance is told. `references` are latents of reference pictures, [prompts, *latent_shape] each.
        """
        texts = self.words(prompts)
        against = None if guidance == 1 else self.words([negative] * len(prompts))

        def at(x: Tensor, sigma: Tensor) -> Tensor:
            prompted = self.flux(x, sigma, *texts, told, references)
            if against is None:
                return prompted
            return torch.lerp(self.flux(x, sigma, *against, told, references), prompted, guidance)

        return at

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        sigmas: Tensor | None = None,
        on_step=None,
        references: Sequence[Tensor] = (),
        guidance: float = 1.0,
    ) -> Tensor:
        """Latents [prompts, *latent_shape] after Euler steps along `sigmas` (default: `STEPS` of them) from `noise`, one row a
        prompt.

        `references` and `guidance` as in `velocity`.
        """
        sigmas = self.sigmas() if sigmas is None else sigmas
        return euler(self.velocity(prompts, references, guidance), noise, sigmas, on_step)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int = 0, references: Sequence[Tensor] = ()) -> Tensor:
        """Images [prompts, 3, side, side] in 0..1; `references` are images of this kind, one for each prompt, in FLUX.2."""
        if references and self.flux.layout.family != "flux2":
            raise UserError("This model takes no reference pictures, and some are given; the tiny FLUX.2 does.")
        latents = [self.autoencoder.encode(images) for images in references]
        return self.autoencoder.decode(self.sample(prompts, self.noise(len(prompts), seed), references=latents))


def autoencoder_of(checkpoint: Checkpoint) -> Autoencoder | Pixels | None:
    """The autoencoder of a FLUX of the tiny kind, from beside it or of those that ship; None where the model is of another
    kind. Raises `UserError` where a file is damaged."""
    layout = checkpoint.layout
    return _autoencoder(checkpoint) if (layout.context, layout.vector) == _widths(_words(checkpoint), layout) else None


def _words(checkpoint: Checkpoint) -> WordEncoder:
    return _beside(checkpoint, "words.safetensors", WordEncoder.load, "the words of a tiny FLUX")


def _autoencoder(checkpoint: Checkpoint) -> Autoencoder | Pixels:
    return _beside(checkpoint, "autoencoder.safetensors", load_autoencoder, "an autoencoder")


def _widths(words: WordEncoder, layout: Layout) -> tuple[int, int | None]:
    """Of the text and the vector that `words` give a model of this layout's family."""
    return words.width, words.width if layout.family == "flux1" else None


def _beside(
    checkpoint: Checkpoint,
    name: str,
    load: Callable[[Mapping[str, Tensor], Mapping[str, str] | None], Loaded],
    what: str,
) -> Loaded:
    """What `load` makes of the file called `name` beside a checkpoint, or of its family's that ships where there is none."""
    path = checkpoint.path.parent / name
    path = path if path.exists() else SHIPPED.get(checkpoint.layout.family, FOLDER) / name
    tensors, metadata = read_finite(path)
    try:
        return load(tensors, metadata)
    except (KeyError, IndexError, ValueError, RuntimeError, UserError) as error:
        found = " ".join(str(error).split())
        raise UserError(
            f"{path} does not hold {what} ({found[:200]}): move it elsewhere, or train the tiny FLUX again."
        ) from error
