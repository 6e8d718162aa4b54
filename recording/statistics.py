"""Counts and sums of MLP activations, in one pass, where the model runs.

    sums = Sums.of(h) + Sums.of(more)                # h [tokens, width], any float precision; nothing waits for the device
    sums.result()                                    # moved to the CPU: fires, tokens, sum, sum_sq

Counts are exact integers. Sums are taken in float32 over at most `TILE` tokens and added up in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens per float32 partial sum. On a CPU, two float32 tiles of FLUX.1's width (2 x 6 MB) stay in its cache.
TILE = 128


@dataclass
class SiteInternals:
    """What was recorded of one MLP, on the CPU.

    Attributes:
        fires: how often each neuron's activation was above 0, int64 [width].
        tokens: over how many tokens.
        sum: sum of each neuron's activation as it enters the down projection, float64 [width].
        sum_sq: sum of its square, float64 [width].
    """

    fires: Tensor
    tokens: int
    sum: Tensor
    sum_sq: Tensor

    def __add__(self, other: SiteInternals) -> SiteInternals:
        """Both recordings of one MLP together."""
        return SiteInternals(
            self.fires + other.fires, self.tokens + other.tokens, self.sum + other.sum, self.sum_sq + other.sum_sq
        )

    def __sub__(self, part: SiteInternals) -> SiteInternals:
        """What is left without a part that was added."""
        return SiteInternals(self.fires - part.fires, self.tokens - part.tokens, self.sum - part.sum, self.sum_sq - part.sum_sq)

    @property
    def rate(self) -> Tensor:
        """Share of tokens at which each neuron fired, float64 [width]; 0 where nothing was recorded."""
        return self.fires.double() / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean activation, float64 [width]."""
        return self.sum / max(self.tokens, 1)

    @property
    def variance(self) -> Tensor:
        """Population variance of the activation, float64 [width]."""
        return (self.sum_sq / max(self.tokens, 1) - self.mean**2).clamp(min=0)


@dataclass(frozen=True)
class Sums:
    """Of calls of one MLP, where it ran: fires int64, sum and sum_sq float64 (float32 on MPS) [width], and over how many
    tokens: a tensor [] where a mask tells."""

    fires: Tensor
    sum: Tensor
    sum_sq: Tensor
    tokens: Tensor | int

    @classmethod
    def of(cls, h: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> Sums:
        """Of activations h [tokens, width].

        Args:
            gate: pre-activation of the gate [tokens, width], whose sign tells what fires in a gated MLP.
            keep: which tokens count, bool [tokens].
        """
        wide = torch.float32 if h.device.type == "mps" else torch.float64  # MPS has no float64
        fires, total, squares = partial_sums(h, gate, keep)
        return cls(
            fires.sum(0, dtype=torch.int64), total.sum(0, dtype=wide), squares.sum(0, dtype=wide),
            len(h) if keep is None else keep.sum(),
        )  # fmt: skip

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.fires + other.fires, self.sum + other.sum, self.sum_sq + other.sum_sq, self.tokens + other.tokens)

    def result(self) -> SiteInternals:
        """On the CPU; this waits for the device."""
        return SiteInternals(self.fires.cpu(), int(self.tokens), self.sum.cpu().double(), self.sum_sq.cpu().double())


def partial_sums(h: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Fires, sums and sums of squares over at most `TILE` tokens each: three [tiles, width], exact counts and float32.

    One pass over `h` by a Triton kernel on a GPU for which Triton can compile one, else tile by tile with torch.
    """
    if h.is_cuda:
        from . import statistics_triton

        if statistics_triton.works(h.device, h.dtype):
            return statistics_triton.partial_sums(h, gate, keep)
    return partial_sums_eager(h, gate, keep)


def partial_sums_eager(h: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`partial_sums` with torch operations, each on a tile that stays in the cache."""
    tokens, width = h.shape
    tiles = -(-tokens // TILE)
    partial = torch.empty(3, tiles, width, dtype=torch.float32, device=h.device)
    value, scratch = torch.empty(2, min(TILE, tokens), width, dtype=torch.float32, device=h.device)
    for index, start in enumerate(range(0, tokens, TILE)):
        rows = h[start : start + TILE]
        x, y = value[: len(rows)], scratch[: len(rows)]
        left_out = None if keep is None else ~keep[start : start + TILE, None]
        x.copy_(rows)
        if left_out is not None:
            x.masked_fill_(left_out, 0)
        torch.sum(x, 0, out=partial[1, index])
        torch.sum(torch.mul(x, x, out=y), 0, out=partial[2, index])
        if gate is not None:
            x.copy_(gate[start : start + TILE])
            if left_out is not None:
                x.masked_fill_(left_out, 0)
        torch.sum(x.gt_(0), 0, out=partial[0, index])
    return partial[0], partial[1], partial[2]
