"""Rounding weights to 8 bits so that what one number loses, the next ones make up for.

    rounded = compensated(weight, second, scale, ridge)        # float8 [out, in]
    found = round_site(cut, site, store, "cuda")               # both projections of an MLP, where rows of it were recorded
    found.up.weight, found.up.scale, found.up.bias, found.errors

Where the moments of what a layer reads are known, it is rounded column by column: the next one makes up for the error made in
those before, as far as the covariance lets one stand in for another (Frantar et al. 2022, arXiv 2210.17323, GPTQ), and the bias
takes over the mean of what is left. That is kept where it does better than plain rounding on images that were held out.

Errors are squared, per token, at the output of the MLP, as those of repairs: times the site's amplification, they are the
velocity's (`rounding_errors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..flux.layout import Site
from ..flux.model import activation
from ..flux.weights import SiteWeights, full_precision
from ..progress import Progress, part, silent
from ..recording.split import held_out
from ..recording.store import HiddenStates
from .curves import ridge_for
from .moments import PIECE, Moments, gather
from .precision import FP8
from .symmetric import blocks

#: Columns that are rounded one by one before what they lose is passed on to those after them.
COLUMNS = 128
#: Rows of held-out images that the error of an up projection is carried through its MLP with.
JUDGES = 4096
#: What attention leaves of an error of v, which it averages over tokens: a quarter in two trained models.
AVERAGED = 0.25
LIMIT = torch.finfo(FP8).max


@dataclass(frozen=True)
class RoundedLayer:
    """weight float8_e4m3fn [out, in], scale float32 [] that its numbers are multiplied by, bias float32 [out] or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def numbers(self) -> Tensor:
        """What the weight stands for, float32 [out, in]."""
        return self.weight.float() * self.scale


@dataclass(frozen=True)
class RoundingErrors:
    """What rounding adds at the output of an MLP per token, squared, on held-out rows: plain, and as it is kept.

    `attention` is what the rounded layers of the attention beside it add. In a single block: the energy of the attention half
    of linear2's output, times the share of v's energy that is lost, times `AVERAGED`. In a double block, of whose attention no
    rows are recorded: as much as plain rounding of its MLP, as was measured (benchmarks/README.md, rounding.py).
    """

    plain_up: float
    plain_down: float
    plain_attention: float
    up: float
    down: float
    attention: float


@dataclass(frozen=True)
class RoundedSite:
    up: RoundedLayer
    down: RoundedLayer
    errors: RoundingErrors


def scale_of(weight: Tensor) -> Tensor:
    """What brings the largest number of `weight` to the end of the format's range, float32 []."""
    return (weight.abs().amax().float() / LIMIT).clamp(min=torch.finfo(torch.float32).tiny)


def plain(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` as float8, each number rounded to the nearest."""
    return (weight.float() / scale).clamp(-LIMIT, LIMIT).to(FP8)


def compensated(weight: Tensor, second: Tensor, scale: Tensor, ridge: float) -> Tensor:
    """`weight` [out, in] as float8, so that E|(W - W') z|^2 is small where z has the second moment `second` [in, in].

    GPTQ: with S = R R^T, R upper triangular, the error is |D R|^2 for D = W - W', and column j of D R holds D_j R_jj and what
    the columns before j add to it: so W'_j rounds W_j + sum_{i<j} D_i R_ij / R_jj. (R^-1 is the Cholesky factor of S^-1 that
    the paper takes; this way nothing is inverted.) The column that varies most comes first.

    Args:
        ridge: in units of the mean variance of z.
    """
    order = second.diagonal().argsort(descending=True)
    system = second[order.flip(0)][:, order.flip(0)]
    diagonal = system.diagonal()
    diagonal += ridge * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(system).flip(0, 1).float()
    del system
    wide = weight.float()[:, order]
    rounded, lost = torch.empty_like(wide, dtype=FP8), torch.zeros_like(wide)
    for block in blocks(len(order), COLUMNS):
        before = lost[:, : block.start] @ factor[: block.start, block]
        for j in range(block.start, block.stop):
            own = slice(block.start, j)
            carried = before[:, j - block.start] + lost[:, own] @ factor[own, j]
            rounded[:, j] = plain(wide[:, j] + carried / factor[j, j], scale)
            lost[:, j] = wide[:, j] - rounded[:, j].float() * scale
    return rounded.view(torch.uint8)[:, order.argsort()].view(FP8)


def round_layer(weight: Tensor, bias: Tensor | None, fitted: Moments, held: Moments) -> RoundedLayer:
    """y = W z + b rounded to what leaves least error on the moments `held` of other images than those of `fitted`."""
    scale = scale_of(weight)
    ridge = ridge_for(len(fitted.mean), fitted.rows)
    choices = compensated(weight, fitted.second, scale, ridge), plain(weight, scale)
    found = min(choices, key=lambda rounded: left(weight - rounded.float() * scale, held, fitted.mean))
    if bias is not None:
        bias = (bias.double() + (weight - found.float() * scale).double() @ fitted.mean).float()
    return RoundedLayer(found, scale, bias)


def left(lost: Tensor, held: Moments, mean: Tensor | None = None) -> float:
    """E|D z|^2 over the moments `held`, where the bias makes up for D times `mean`; in an MLP without bias there is none."""
    wide = lost.double()
    error = ((wide @ held.second) * wide).sum()
    if held.centred:
        error += (wide @ (held.mean if mean is None else held.mean - mean)).square().sum()
    return error.item()


def round_site(
    tensors: Mapping[str, Tensor],
    site: Site,
    store: HiddenStates,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> RoundedSite:
    """Both projections of an MLP, cut or whole, from the rows that were recorded of the dense model."""
    weights = SiteWeights.read(tensors, site, device)
    fit, others = held_out(store.images(site.name))
    importance = partial(store.importance, site.name)

    def moments(images: set[int], done: int, up: bool) -> Moments:
        rows, count = store.rows(site.name, images), store.count(site.name)
        return gather(weights, rows, importance, part(progress, done, 4), count, up)

    whole = full_precision(tensors, f"{site.up}.weight", device)
    up_bias = full_precision(tensors, f"{site.up}.bias", device) if site.biased else None
    fitted, held = moments(fit, 0, True), moments(others, 1, True)
    up = round_layer(whole, up_bias, fitted, held)
    simple = RoundedLayer(plain(whole, up.scale), up.scale, up_bias)
    shares = [0.0, 0.0]
    if site.up_row:
        v = slice(site.up_row * 2 // 3, site.up_row)
        lost = left((whole - simple.numbers)[v], held), left((whole - up.numbers)[v], held, fitted.mean)
        shares = [AVERAGED * error / left(whole[v], held) for error in lost]

    fitted, held = moments(fit, 2, False), moments(others, 3, False)
    whole = full_precision(tensors, f"{site.down}.weight", device)
    down = round_layer(whole, weights.bias, fitted, held)
    by_up = [_carried(weights, layer, store, others) for layer in (simple, up)]
    by_down = left(whole - plain(whole, down.scale).float() * down.scale, held)
    if weights.attn is None:
        by_attention = [by_up[0] + by_down] * 2
    else:
        own, wide = held.second[: held.attn, : held.attn], weights.attn.double()
        by_attention = [share * ((wide @ own) * wide).sum().item() for share in shares]
    kept = left(whole - down.numbers, held, fitted.mean)
    return RoundedSite(up, down, RoundingErrors(by_up[0], by_down, by_attention[0], by_up[1], kept, by_attention[1]))


def _carried(weights: SiteWeights, up: RoundedLayer, store: HiddenStates, images: set[int]) -> float:
    """What a rounded up projection changes at the output of the MLP per token, squared, on rows of `images`."""
    site, act = weights.site, activation(weights.site)
    numbers, bias = up.numbers[site.up_row :], None if up.bias is None else up.bias[site.up_row :]
    total = count = seen = 0.0
    for rows in store.rows(site.name, images):
        for start in range(0, len(rows), PIECE):
            some = rows[start : start + PIECE]
            x = some.x.to(weights.up)
            change = (act(F.linear(x, numbers, bias)) - weights.activations(x)) @ weights.down.T
            weight = store.importance(site.name, some.sigma).to(change)
            total += (weight @ change.square().sum(1)).item()
            count, seen = count + weight.sum().item(), seen + len(some)
            if seen >= JUDGES:
                return total / count
    return total / count
