"""Turned neurons as a LoRA file, which any ComfyUI loads without this pack.

    save_lora("without_three.safetensors", tensors, layout, [Poke(neurons, factor=-1.0)])

h_j <- c_j + f (h_j - c_j) changes what the down projection gives by W2[:, j] (f - 1) h_j, a change of its column j, and by
(1 - f) W2[:, j] c_j, a constant, which goes to its bias (`diff_b`). The LoRA is exact, of a rank as high as an MLP has chosen
neurons, for all noise levels and all tokens. FLUX.2's down projections have no bias: there neurons are scaled or cut alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..files import check_replaces, write_safetensors
from ..flux.layout import Layout
from ..flux.weights import full_precision
from .poke import Poke, Where, require_widths

FORMAT = "flux-poke poke lora 1"


def lora_of(tensors: Mapping[str, Tensor], layout: Layout, pokes: Sequence[Poke]) -> dict[str, Tensor]:
    """The LoRA of `pokes` one after the other, in ComfyUI's names, float32; `tensors` (canonical keys) are the dense model's.

    Raises `UserError` where a poke is for some noise levels, tokens or prompts alone, is of directions, pokes a neuron that an
    earlier one does, needs a bias that the model does not have, or where nothing is changed.
    """
    found: dict[str, Tensor] = {}
    for site in layout.sites:
        columns, ups, constant, seen = [], [], None, torch.empty(0, dtype=torch.long)
        for poke in pokes:
            _require_everywhere(poke)
            require_widths(poke.neurons, layout)
            own = poke.neurons.sites.get(site.name)
            if own is None or poke.factor == 1:
                continue
            if torch.isin(own.indices, seen).any():
                raise UserError(f"{site.name} has neurons that are poked twice: join them, or save one LoRA for each poke.")
            seen = torch.cat([seen, own.indices])
            weight = full_precision(tensors, f"{site.down}.weight")
            places = own.indices + site.down_column
            column = weight[:, places]
            centre, weights = poke.turning(own.measured)
            change = (poke.factor - 1) * weights
            down = torch.zeros(len(places), weight.shape[1])
            down[torch.arange(len(places)), places] = change
            columns.append(down)
            ups.append(column)
            shift = -column @ (change * centre)
            constant = shift if constant is None else constant + shift
        if constant is None:
            continue
        name = f"diffusion_model.{site.down}"
        found |= {f"{name}.lora_up.weight": torch.cat(ups, dim=1), f"{name}.lora_down.weight": torch.cat(columns)}
        if site.biased:
            found[f"{name}.diff_b"] = constant
        elif constant.any():
            raise UserError(
                f"{site.down} has no bias, which the means that neurons are turned about would go to: poke with the node, or "
                "scale or cut them about zero, where weights that were learned do not count."
            )
    if not found:
        raise UserError("Nothing is changed: expected neurons and a factor other than 1.")
    return {key: tensor.contiguous() for key, tensor in found.items()}


def save_lora(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    pokes: Sequence[Poke],
    graph: Mapping[str, str] | None = None,
) -> int:
    """Writes the LoRA, and returns its largest rank; raises `UserError` as `lora_of`, before anything is written."""
    check_replaces(path, FORMAT)
    lora = lora_of(tensors, layout, pokes)
    said = "; ".join(f"{poke.neurons.totals()}; factor {poke.factor:g}" for poke in pokes)
    write_safetensors(path, lora, {**(graph or {}), "format": FORMAT, "made": json.dumps(said)})
    return max(len(tensor) for key, tensor in lora.items() if key.endswith(".lora_down.weight"))


def _require_everywhere(poke: Poke) -> None:
    if poke.where != Where() or poke.neurons.directions:
        raise UserError(
            "A LoRA is for neurons, and for all noise levels, tokens and prompts: leave out the range, the mask, positive_only "
            "and directions, or poke with the node."
        )
