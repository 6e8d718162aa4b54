"""Which weights are trained, and what they become in a file.

    keys = mlp_parameters(model, sites)              # requires_grad is set on these, and on nothing else
    rounded(weight, torch.bfloat16)                  # what a reader of the saved weight will find

The MLPs alone are trained: both projections in a double block; in a single block the MLP's rows of linear1, and linear2 whole,
since the attention's half of it takes part in making up for cut neurons (as in repair).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..flux.layout import Site


def mlp_parameters(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Names of the MLPs' parameters, which from now on are the only ones of `model` to require gradients."""
    model.requires_grad_(False)
    keys = []
    for site in sites:
        for path in (site.up, site.down):
            for name, weight in model.get_submodule(path).named_parameters():
                weight.requires_grad_(True)
                keys.append(f"{path}.{name}")
                if path == site.up and site.up_row:
                    weight.register_hook(_only_rows_from(site.up_row))
    return keys


def _only_rows_from(first: int):
    """A gradient without the rows before `first`, which make q, k and v. AdamW without decay leaves those where they are."""

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:first] = 0
        return gradient

    return hook


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A copy of `weight` as `dtype`; 8-bit floats with a scale [] that brings the largest number to the end of their range."""
    if dtype.itemsize > 1:
        return weight.to(dtype, copy=True), None
    limit = torch.finfo(dtype).max
    scale = (weight.abs().amax().float() / limit).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).clamp(-limit, limit).to(dtype), scale


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of `weight` after storing it: in `dtype`, or float32 where that is an 8-bit one."""
    value, scale = stored(weight, dtype)
    return value if scale is None else value.float() * scale
