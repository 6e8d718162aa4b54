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

        A single block sees text first, then the image.
        """
        if self.img is None and self.txt is None:
            return None
        if stream == "single":
            known = self.img if self.img is not None else self.txt
            assert known is not None
            other = torch.ones(batch, tokens - known.shape[1], dtype=torch.bool, device=known.device)
            txt, img = self.txt if self.txt is not None else other, self.img if self.img is not None else other
            return torch.cat((txt, img), dim=1).flatten()
        mask = self.img if stream == "img" else self.txt
        return None if mask is None else mask.flatten()


@dataclass(frozen=True)
class Call:
    """One call of the model within a sampling run, before it happens.

    Attributes:
        x: latents as the sampler holds them, [batch, channels, height, width]. sigma: their noise level [batch].
        sigmas: noise levels of the whole run, steps + 1 numbers: no device has to be waited for.
        images: which image of the run each row of the batch is, from 0; None for rows that no image is read from (a negative
            prompt's, or a second positive prompt's).
        mask: which tokens count.
        context, guidance, seed: text [batch, words, width], what distilled guidance is told, and the seed of the sampler, or
            one for each image, if known.
        prompts: of each image, if known.
        references: latents of reference pictures, whose tokens follow those of the image.
        again: makes the same call once more, unwatched; the velocity.
        known_step: which of the run's steps this is, where nobody has to be asked (see `step`).
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
    known_step: int | None = None

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
        """Where `sigma` [batch] stands in the schedule `sigmas` [steps + 1], unless `step` says so; row i is image i, unless
        `images` says so."""
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
    def sigma_next(self) -> float:
        """The level that the step leads to."""
        return self.sigmas[self.step + 1]

    @property
    def sigma_now(self) -> float:
        """The level that the step begins at."""
        return self.sigmas[self.step]

    @property
    def rows(self) -> list[int]:
        """The rows of the batch that images are read from, in the order of the batch."""
        return [row for row, image in enumerate(self.images) if image is not None]

    @property
    def read(self) -> list[int]:
        """The image of each of those rows."""
        return [image for image in self.images if image is not None]

    def part(self, values: Tensor) -> Tensor:
        """Those rows of `values` [batch, ...]; no copy where they are all of them."""
        rows = self.rows
        if len(rows) == len(self.images):
            return values
        first, count = (rows[0], len(rows)) if rows else (0, 0)
        return values[first : first + count] if rows == [*range(first, first + count)] else values[rows]

    @property
    def count(self) -> int:
        """How many images the run draws."""
        return max(self.read, default=-1) + 1

    @property
    def drawn(self) -> str:
        """Tells the images of this run from those of others: noise and text of its first call, in hexadecimal."""
        parts = [self.part(self.x), *(() if self.context is None else (self.part(self.context),))]
        return hashlib.sha256(b"".join(part.float().cpu().numpy().tobytes() for part in parts)).hexdigest()[:32]

    def asked(self, image: int) -> tuple[str | None, int | None]:
        """Prompt and seed of an image, where they are known."""
        seed = self.seed[image] if isinstance(self.seed, tuple) else self.seed
        return self.prompts[image] if self.prompts else None, seed
