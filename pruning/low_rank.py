"""Layers of a low rank: the best one for what a layer reads, and what it costs.

    vectors = Vectors.sample(tensors, layout, pooled)  # mean and covariance of what all modulation layers read
    errors = rank_errors(weight, vectors, held_out)    # squared error at every rank, on prompts that were not fitted to
    layer = low_rank(weight, bias, vectors, rank=16)
    layer.up @ (layer.down @ s) + layer.bias

For one layer y = W s + b, with mean mu and covariance C of s, the best map of rank r is found by reduced-rank regression
(Izenman 1975): with U S V^T = SVD(W C^(1/2)), W_r = U_r U_r^T W and b_r = b + (W - W_r) mu. Its error is the sum of S_i^2
beyond r. It costs r (out + hidden) parameters in place of out * hidden, and almost nothing in quality: a vector that is a
function of noise level, guidance and pooled text spans few dimensions. A plain SVD of W is a hundred times worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flux.layout import Layout
from ..flux.vectors import SIGMAS, Embedders, modulation_inputs

#: Directions of s that vary less than this, relative to the one that varies most, are left out.
NEGLIGIBLE = 1e-10
#: Prompts that s is sampled for at once.
BATCH = 16


@dataclass(frozen=True)
class Vectors:
    """What the modulation layers of a model read: s = silu(vec), over noise levels, guidances and texts.

    Attributes:
        mean: float64 [hidden].
        spread: float64 [hidden, k] with spread spread^T their covariance; directions of negligible variance are left out.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def sample(
        cls,
        tensors: Mapping[str, Tensor],
        layout: Layout,
        pooled: Tensor,
        importance: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        sigmas: Sequence[float] = SIGMAS,
    ) -> Vectors:
        """From the embedders among `tensors` (canonical keys) and pooled texts [prompts, vector width].

        `importance` gives the weights of noise levels [n]; without it, all weigh 1.
        """
        embedders = Embedders.load(tensors, layout, device)
        weights = torch.ones(len(sigmas)) if importance is None else importance(torch.tensor(sigmas))
        count, total = 0.0, torch.zeros(layout.hidden, dtype=torch.float64, device=device)
        second = torch.zeros(layout.hidden, layout.hidden, dtype=torch.float64, device=device)
        for texts in pooled.to(device).float().split(BATCH):
            inputs = modulation_inputs(embedders, layout, texts, sigmas)
            for weight, (_, s) in zip(weights.tolist(), inputs, strict=True):
                s = s.double()
                count += weight * len(s)
                total += weight * s.sum(0)
                second.addmm_(s.T, s, alpha=weight)
        mean = total / count
        variance, directions = torch.linalg.eigh(second.div_(count).addr_(mean, mean, alpha=-1.0))
        kept = variance > NEGLIGIBLE * variance[-1]
        return cls(mean, directions[:, kept] * variance[kept].sqrt())

    @classmethod
    def mixed(cls, parts: Sequence[Vectors], weights: Sequence[float]) -> Vectors:
        """All of `parts` together, each with its weight."""
        shares = [weight / sum(weights) for weight in weights]
        mean = torch.stack([share * part.mean for part, share in zip(parts, shares, strict=True)]).sum(0)
        spreads = [torch.cat((part.spread, (part.mean - mean)[:, None]), dim=1) for part in parts]
        return cls(mean, torch.cat([share**0.5 * spread for spread, share in zip(spreads, shares, strict=True)], dim=1))

    def to(self, device: torch.device | str) -> Vectors:
        return Vectors(self.mean.to(device), self.spread.to(device))


@dataclass(frozen=True)
class LowRank:
    """A layer of rank r: up [out, r], down [r, hidden], bias [out], all float32."""

    up: Tensor
    down: Tensor
    bias: Tensor


def low_rank(weight: Tensor, bias: Tensor, vectors: Vectors, rank: int, stored: torch.dtype = torch.float32) -> LowRank:
    """The layer of `rank` that is nearest to y = W s + b over `vectors`; `weight` [out, hidden], `bias` [out].

    The factors are rounded to what they will be `stored` as before the bias makes up for the mean of what they lose, which is
    most of what rounding does.
    """
    wide = weight.double()
    up = _directions(wide, vectors)[:, :rank]
    up, down = up.to(stored).double(), (up.T @ wide).to(stored).double()
    lost = wide @ vectors.mean - up @ (down @ vectors.mean)
    return LowRank(up.float().contiguous(), down.float().contiguous(), (bias.double() + lost).float())


def rank_errors(weight: Tensor, vectors: Vectors, held_out: Vectors) -> Tensor:
    """E|y - y_r|^2 of layers that are fitted to `vectors`, over `held_out`, for r from 0 to the rank where no error is left on
    those fitted to; float64 [ranks + 1]."""
    wide = weight.double()
    seen = _directions(wide, vectors).T @ wide
    apart = (held_out.mean - vectors.mean)[:, None]
    away = torch.cat((held_out.spread, apart), dim=1)
    total = (wide @ away).square().sum()
    left = total - torch.cat((total.new_zeros(1), (seen @ away).square().sum(1).cumsum(0)))
    return left.clamp(min=0).cpu()


def regression(down: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """The best guess of s from what a truncated layer is left with of it, s ~ P z + c with z = down s; `down` [r, hidden].

    P = C down^T (down C down^T)^-1 [hidden, r] and c = mu - P down mu [hidden], float64.
    """
    seen = down.double() @ vectors.spread
    weights = vectors.spread @ torch.linalg.pinv(seen, rtol=NEGLIGIBLE**0.5)
    return weights, vectors.mean - weights @ (down.double() @ vectors.mean)


def _directions(weight: Tensor, vectors: Vectors) -> Tensor:
    """U of W C^(1/2), by falling S [out, k]; from the k x k Gram matrix, since there are far more channels than k."""
    outputs = weight @ vectors.spread
    strength, turned = torch.linalg.eigh(outputs.T @ outputs)
    kept = strength > NEGLIGIBLE * strength[-1]
    return ((outputs @ turned[:, kept]) / strength[kept].sqrt()).flip(1)
