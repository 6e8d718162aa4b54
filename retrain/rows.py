"""Training one MLP by itself, on rows of what it reads.

    trained = train_rows(cut, store, block_index, options, saved, report, progress)

Rows of one MLP are small enough to be held in memory. The goal is the dense MLP's own output, in a single block together with
what linear2 makes of the attention; the loss is relative to that output's mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import Linear

from ..flux.blocks import sites_at
from ..flux.layout import Site
from ..flux.model import activation
from ..flux.weights import SiteWeights, full_precision
from ..progress import Progress, part
from ..pruning.moments import gather
from ..pruning.refit import affine, bias, choose
from ..pruning.scores import require_rows
from ..pruning.surgery import Cut
from ..recording.store import HiddenStates, Rows
from .loop import Trained, train_best
from .options import Options, Report
from .problem import Problem, squared

#: Rows that count as one sample of a batch.
ROWS_PER_SAMPLE = 64


def closed_form(weights: SiteWeights, kept: Tensor, fitted: Rows, held_out: Rows, progress: Progress) -> dict[str, Tensor]:
    """The down projection's `weight` and, where it has one, `bias`: least squares on some rows, with the ridge that does best
    on others; the bias alone where no ridge does better."""
    moments = gather(weights, [fitted], progress=part(progress, 0, 3))
    others = gather(weights, [held_out], progress=part(progress, 1, 3))
    ridge = choose(weights, kept, moments, others, progress=part(progress, 2, 3)).ridge
    mean = moments.mean[moments.attn :]
    repaired = bias(weights, kept, mean) if ridge is None else affine(weights, kept, moments, ridge)
    return {"weight": repaired.down} | ({} if repaired.bias is None else {"bias": repaired.bias})


class Neurons(nn.Module):
    """One MLP; `up` has the rows that are its own, in a single block without those of q, k and v."""

    def __init__(self, weights: SiteWeights):
        super().__init__()
        down = weights.down if weights.attn is None else torch.cat((weights.attn, weights.down), dim=1)
        self.up, self.down = _linear(weights.up, weights.up_bias), _linear(down, weights.bias)
        self.activation = activation(weights.site)

    def forward(self, x: Tensor, attn: Tensor | None) -> Tensor:
        """[n, hidden] for rows x, attn [n, hidden]."""
        h = self.activation(self.up(x))
        return self.down(h if attn is None else torch.cat((attn, h), dim=-1))


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """With copies of the given parameters."""
    layer = Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    given = {"weight": weight.clone()} | ({} if bias is None else {"bias": bias.clone()})
    layer.load_state_dict(given, assign=True)
    return layer


class RowProblem(Problem):
    """A cut MLP against the dense one, split by image."""

    module: Neurons

    def __init__(self, dense: SiteWeights, weights: SiteWeights, store: HiddenStates, options: Options):
        name = weights.site.name
        (self.rows,) = store.rows(name, size=store.count(name))
        self.weights, self.dense = dense, Neurons(dense).requires_grad_(False)
        super().__init__(name, Neurons(weights), self.rows.image, [torch.arange(len(self.rows))], options)

    def errors(self, samples: Tensor) -> Tensor:
        rows, device = self.rows[samples], self.options.device
        x = rows.x.to(device).float()
        attn = None if rows.attn is None else rows.attn.to(device).float()
        with torch.no_grad():
            expected = self.dense(x, attn)
        return squared(self.module(x, attn), expected)[None]

    def closed_form(self, kept: Tensor, progress: Progress) -> dict[str, Tensor]:
        fitted, held_out = (self.rows[torch.cat(groups)] for groups in (self.train, self.held_out))
        found = closed_form(self.weights, kept, fitted, held_out, progress)
        return {f"down.{name}": value for name, value in found.items()}


def train_rows(
    cut: Cut,
    store: HiddenStates,
    block_index: int,
    options: Options,
    saved: Callable[[str], Path],
    report: Report | None,
    progress: Progress,
) -> Trained:
    """The MLPs of one block, one after the other; `saved(name)` is where a training's state is kept.

    Rows are of what the dense model's MLPs read: modulation layers, truncated or not, make no difference to them.
    """
    dense, kept = cut.dense, cut.plan.kept
    sites = [site for site in sites_at(dense.layout, block_index) if site.name in kept]
    if not sites:  # of the block, modulation alone is truncated
        return Trained.nothing()
    require_rows(store, dense, sites, "retraining on rows")
    options = replace(options, batch=options.batch * ROWS_PER_SAMPLE)
    found = []
    for number, site in enumerate(sites):
        weights, narrow = (SiteWeights.read(tensors, site, options.device) for tensors in (dense.tensors, cut))
        problem = RowProblem(weights, narrow, store, options)
        repair, within = partial(problem.closed_form, kept[site.name]), part(progress, number, len(sites))
        trained = train_best(problem, repair, saved(site.name), report, within)
        found.append(replace(trained, tensors=_checkpoint_tensors(dense.tensors, site, trained.tensors)))
    return Trained.together(found)


def _checkpoint_tensors(dense: Mapping[str, Tensor], site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of `Neurons` under the checkpoint's keys; in a single block with q, k and v as in `dense`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, kind = name.split(".")
        key = f"{getattr(site, layer)}.{kind}"
        if layer == "up" and site.up_row:
            tensor = torch.cat((full_precision(dense, key, tensor.device)[: site.up_row], tensor))
        found[key] = tensor
    return found
