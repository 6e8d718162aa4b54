"""One call of the model while it draws, as every recorder is told of it.

    call = Call.at(x, sigma, sigmas, context=context)
    with recorder.watching(model, call):
        model(x, sigma, context, vector)

It says which step of the run this is, which image each row of the batch belongs to, and which tokens count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a call count: `img` [batch, image tokens], `txt` [batch, words], bool; None = all of them."""

    img: Tensor | None = None
    txt: Tensor | None = None

    def rows(self, stream: str, batch: int, tokens: int) -> Tensor | None:
        """The mask for one MLP's input [batch, tokens, ...], flat, bool [batch * tokens]; None = all.

        A single block sees text first, then the image; tokens of references may be missing at the end (FluxKVCache).
        """
        words = self.txt.shape[1] if self.txt is not None and stream == "single" else 0
        img = None if self.img is None else self.img[:, : tokens - words]
        parts = {"img": [img], "txt": [self.txt], "single": [self.txt, img]}[stream]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        other = known[0].new_ones(batch, tokens - known[0].shape[1])
        return torch.cat([other if part is None else part for part in parts], dim=1).flatten()


@dataclass(frozen=True)
class Call:
    """One call of the model within a sampling run, before it happens.

    Attributes:
        x: latents as the sampler holds them, [batch, channels, height, width]. sigma: their noise level [batch].
        sigmas: noise levels of the whole run, steps + 1 numbers: no device has to be waited for.
        images: which image of the run each row of the batch is, from 0; None for rows that no image is read from (a negative
            prompt's, or a second positive prompt's).
        context, guidance: text [batch, words, width], and what distilled guidance is told.
        seed, prompts: the sampler's seed, or one for each image, and the prompt of each, if known.
        references: latents of reference pictures, whose tokens follow those of the image.
        again: makes the same call once more, unwatched; the velocity.
        padded: whether padding of the text may be among the words that count.
        known_step: which of the run's steps this is, where nobody has to be asked (see `step`).
        known_drawn: what tells the images of this run from others, where it is known before they are drawn (see `drawn`).
    """

    x: Tensor
    sigma: Tensor
    sigmas: tuple[float, ...]
    images: tuple[int | None, ...]
    mask: TokenMask = field(default_factory=TokenMask)
    context: Tensor | None = None
    guidance: Tensor | None = None
    seed: int | tuple[int, ...] | None = None
    prompts: tuple[str, ...] = ()
    references: tuple[Tensor, ...] = ()
    again: Callable[[], Tensor] | None = None
    padded: bool = False
    known_step: int | None = None
    known_drawn: str = ""

    @classmethod
    def at(
        cls,
        x: Tensor,
        sigma: Tensor,
        sigmas: Tensor | Sequence[float],
        step: int | None = None,
        images: Sequence[int | None] | None = None,
        mask: TokenMask | None = None,
        **known: Any,
    ) -> Call:
        """Where `sigma` stands in `sigmas`, unless `step` says so; row i is image i, unless `images` says so."""
        levels = tuple(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)
        rows = tuple(range(len(x)) if images is None else images)
        return cls(x, sigma, levels, rows, mask or TokenMask(), known_step=step, **known)

    @cached_property
    def step(self) -> int:
        """Which of the run's steps this is, from 0; the first who asks waits for the device, unless it was known."""
        if self.known_step is not None:
            return self.known_step
        now = self.sigma.max().item()
        return max(sum(level >= now for level in self.sigmas[:-1]) - 1, 0)

    @property
    def sigma_now(self) -> float:
        """The level that the step begins at."""
        return self.sigmas[self.step]

    @property
    def sigma_next(self) -> float:
        return self.sigmas[self.step + 1]

    @property
    def rows(self) -> list[int]:
        """The rows of the batch that images are read from, in the order of the batch."""
        return [row for row, image in enumerate(self.images) if image is not None]

    @property
    def read(self) -> list[int]:
        """The image of each of those rows."""
        return [image for image in self.images if image is not None]

    def part(self, values: Tensor) -> Tensor:
        """Those rows of `values` [batch, ...]; no copy where they stand together."""
        rows = self.rows
        first, end = (rows[0], rows[-1] + 1) if rows else (0, 0)
        return values[first:end] if len(rows) == end - first else values[rows]

    @property
    def count(self) -> int:
        """How many images the run draws."""
        return max(self.read, default=-1) + 1

    @property
    def drawn(self) -> str:
        """Tells the images of this run from those of others: noise and text of its first call, in hexadecimal."""
        if self.known_drawn:
            return self.known_drawn
        parts = [self.part(self.x), *(() if self.context is None else (self.part(self.context),))]
        return hashlib.sha256(b"".join(part.float().cpu().numpy().tobytes() for part in parts)).hexdigest()[:32]

    def asked(self, image: int) -> tuple[str | None, int | None]:
        """Prompt and seed of an image, where they are known."""
        seed = self.seed[image] if isinstance(self.seed, tuple) else self.seed
        return self.prompts[image] if self.prompts else None, seed
