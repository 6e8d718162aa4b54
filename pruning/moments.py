"""Means and covariances of what a down projection reads, over rows: everything that ranking and repair need of them.

    moments = gather_recorded(weights, store, images)
    moments.second, moments.mean                     # over [attention | neurons] in single blocks, [neurons] elsewhere

Products are taken in float32 with TF32 off, and added up in float64, about a first guess of the mean so that nothing cancels.
Rows are taken in pieces, so that no more than `PIECE` activations of all neurons are in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.weights import SiteWeights
from ..progress import Progress, silent
from ..recording.store import HiddenStates, Rows
from .symmetric import add_product, exact_products, mirror

#: Rows that are worked on together.
PIECE = 4096


@dataclass(frozen=True)
class Moments:
    """Of rows of regressors [attention | neurons].

    Attributes:
        count: sum of the rows' weights.
        squares: sum of their squares.
        attn: how many of the regressors are attention channels (0 in double blocks).
        mean: float64 [regressors].
        second: float64 [regressors, regressors]: their covariance if `centred`; in an MLP without bias, which cannot make up
            for a mean, the uncentred second moment.
    """

    count: float
    squares: float
    attn: int
    centred: bool
    mean: Tensor
    second: Tensor

    @property
    def rows(self) -> float:
        """Effective number of rows: of equal weight, so many would tell as much (Kish 1965)."""
        return self.count**2 / self.squares

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows together (Chan et al. 1979), in the memory of these."""
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        second = self.second.lerp_(other.second, share)
        if self.centred:
            second.addr_(apart, apart, alpha=share * (1 - share))
        return Moments(count, self.squares + other.squares, self.attn, self.centred, self.mean + share * apart, second)


def gather(
    weights: SiteWeights,
    rows: Iterable[Rows],
    importance: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = silent,
    expected: int = 0,
    up: bool = False,
) -> Moments:
    """Moments of a site over `rows`, about `expected` of them, on the device of `weights`; raises `UserError` where there are
    none.

    `importance` gives the weights of rows [n] from their noise levels [n]; without it, all weigh 1. `up`: moments of what the
    up projection reads, instead of the down projection.
    """
    count = squares = 0.0
    seen = 0
    with exact_products():
        for part in (some[start : start + PIECE] for some in rows for start in range(0, len(some), PIECE)):
            z = part.x.to(weights.down) if up else weights.activations(part.x.to(weights.down.device))
            if not (up or weights.attn is None or part.attn is None):
                z = torch.cat((part.attn.to(z), z), dim=1)
            if not seen:
                guess = z.mean(0)
                total = torch.zeros_like(guess, dtype=torch.float64)
                second = total.new_zeros(len(total), len(total))
            z -= guess
            weight = z.new_ones(len(z)) if importance is None else importance(part.sigma).to(z)
            count += weight.double().sum().item()
            squares += weight.double().square().sum().item()
            total += (weight @ z).double()
            z *= weight.sqrt()[:, None]
            add_product(second, z, z)
            seen += len(z)
            progress(f"reading rows of {weights.site.name}", seen, max(seen, expected))
    if not seen:
        raise UserError(f"There are no rows of {weights.site.name}: record hidden states of all MLPs that are to be cut.")
    offset = total / count
    mean = guess.double() + offset
    mirror(second).div_(count)
    second.addr_(offset, offset, alpha=-1.0)
    if weights.bias is None:
        second.addr_(mean, mean)
    attn = 0 if up else len(mean) - weights.down.shape[1]
    return Moments(count, squares, attn, weights.bias is not None, mean, second)


def gather_recorded(weights: SiteWeights, store: HiddenStates, images: Set[int], progress: Progress = silent) -> Moments:
    """Moments of a site over what was recorded of `images`, weighted by importance."""
    name = weights.site.name
    return gather(weights, store.rows(name, images), partial(store.importance, name), progress, store.count(name))
