"""Training one MLP by itself, on rows of what it reads.

    problem = RowProblem(dense_weights, weights, store, options)
    train_best(problem, ("up", "down"), None, options)
    weights = problem.module.site_weights()
    repaired = closed_form(dense_weights, kept, fitted_rows, held_out_rows)

Rows of one MLP are small enough to be held in memory. The goal is the dense MLP's own output, in a single block together with
what linear2 makes of the attention; the loss is relative to that output's mean square.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..flux.weights import SiteWeights, full_precision
from ..progress import Progress, part, silent
from ..pruning.moments import gather
from ..pruning.refit import Repaired, affine, bias, choose
from ..recording.split import held_out
from ..recording.store import HiddenStates, Rows
from .options import Options
from .problem import samples_of, squared

#: Rows that count as one sample of a batch.
ROWS_PER_SAMPLE = 64


def closed_form(
    weights: SiteWeights, kept: Tensor, fitted: Iterable[Rows], held_out: Iterable[Rows], progress: Progress = silent
) -> Repaired:
    """Least squares on some rows, with the ridge that does best on others; the bias alone where no ridge does better."""
    moments = gather(weights, fitted, progress=part(progress, 0, 3))
    found = choose(
        weights, kept, moments, gather(weights, held_out, progress=part(progress, 1, 3)), progress=part(progress, 2, 3)
    )
    if found.ridge is None:
        return bias(weights, kept, moments.mean[moments.attn :])
    return affine(weights, kept, moments, found.ridge)


class Neurons(nn.Module):
    """One MLP with all of its weights trainable."""

    def __init__(self, weights: SiteWeights):
        super().__init__()
        self.weights = weights
        down = weights.down if weights.attn is None else torch.cat((weights.attn, weights.down), dim=1)
        self.up, self.down = nn.Parameter(weights.up.clone()), nn.Parameter(down.clone())
        self.up_bias = None if weights.up_bias is None else nn.Parameter(weights.up_bias.clone())
        self.bias = None if weights.bias is None else nn.Parameter(weights.bias.clone())

    def forward(self, x: Tensor, attn: Tensor | None) -> Tensor:
        """[n, hidden] for rows x, attn [n, hidden]."""
        h = replace(self.weights, up=self.up, up_bias=self.up_bias).activations(x)
        return F.linear(h if attn is None else torch.cat((attn, h), dim=-1), self.down, self.bias)

    def site_weights(self) -> SiteWeights:
        """As they are now."""
        column = self.weights.site.down_column
        return replace(
            self.weights,
            up=self.up.detach(),
            up_bias=None if self.up_bias is None else self.up_bias.detach(),
            down=self.down.detach()[:, column:],
            attn=self.down.detach()[:, :column] if column else None,
            bias=None if self.bias is None else self.bias.detach(),
        )


class RowProblem:
    """A cut MLP against the dense one, split by image; a `Problem`."""

    def __init__(self, dense: SiteWeights, weights: SiteWeights, store: HiddenStates, options: Options):
        self.name, self.options = weights.site.name, options
        self.dense, self.module = Neurons(dense).requires_grad_(False), Neurons(weights)
        parts = list(store.rows(self.name))
        self.x = torch.cat([part.x for part in parts])
        self.attn = torch.cat([part.attn for part in parts if part.attn is not None]) if parts[0].attn is not None else None
        self.image = torch.cat([part.image for part in parts])
        self.images = held_out(self.image, options.eval_share, options.seed)
        everything = [torch.arange(len(self.image))]
        self.train, self.held_out = (samples_of(images, self.image, everything) for images in self.images)

    def errors(self, samples: Tensor) -> Tensor:
        device = self.module.up.device
        x = self.x[samples].to(device).float()
        attn = None if self.attn is None else self.attn[samples].to(device).float()
        with torch.no_grad():
            expected = self.dense(x, attn)
        return squared(self.module(x, attn), expected)[None]


def checkpoint_tensors(dense: Mapping[str, Tensor], weights: SiteWeights) -> dict[str, Tensor]:
    """The weights of an MLP under the checkpoint's keys; in a single block with q, k and v as in `dense`."""
    site, up, up_bias = weights.site, weights.up, weights.up_bias
    if site.up_row:
        up = torch.cat((full_precision(dense, f"{site.up}.weight", up.device)[: site.up_row], up))
        if up_bias is not None:
            up_bias = torch.cat((dense[f"{site.up}.bias"][: site.up_row].to(up_bias), up_bias))
    down = weights.down if weights.attn is None else torch.cat((weights.attn, weights.down), dim=1)
    tensors = {f"{site.up}.weight": up, f"{site.down}.weight": down}
    biases = {f"{site.up}.bias": up_bias, f"{site.down}.bias": weights.bias}
    return tensors | {key: tensor for key, tensor in biases.items() if tensor is not None}
