"""What a MODEL is: its layout, its identity, and its weights with every LoRA merged.

layout, fingerprint = flux_layout(model), model_fingerprint(model)
weights = MergedWeights(model)                   # {"img_in.weight": ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.model_management
import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..errors import UserError
from ..flux.fingerprint import Fingerprint, row_scale
from ..flux.layout import Layout, canonical_key, read_layout
from .loading import file_key


def flux_layout(model: ModelPatcher) -> Layout:
    """The layout of a MODEL; raises `UserError` where it is not a FLUX."""
    weights = model.model.diffusion_model.state_dict()
    return read_layout({key: tuple(tensor.shape) for key, tensor in weights.items()}, source="The model")


def model_fingerprint(model: ModelPatcher) -> Fingerprint:
    """Fingerprint of a MODEL as it was loaded, beneath any LoRA that is applied at the moment."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.model.diffusion_model.state_dict().items()}
    names = {canonical_key(key): key for key in shapes}

    def weight(key: str) -> Tensor:
        name = f"diffusion_model.{names[key]}"
        if name in model.hook_backup:
            return model.hook_backup[name][0]
        if name in model.backup:
            return model.backup[name].weight
        return comfy.utils.get_attr(model.model, name)

    def row(key: str, index: int) -> Tensor:
        stored = getattr(weight(key), "_qdata", weight(key))
        if not stored.is_floating_point() or stored.shape != shapes[names[key]]:
            raise UserError(f"{key} is quantised to {stored.dtype}: expected a bf16, fp16 or fp8 model.")
        return stored[index].cpu()

    def scale(key: str, index: int) -> float:
        quantised: Any = weight(key)
        return row_scale(quantised._params.scale, index, key) if hasattr(quantised, "_qdata") else 1.0

    return Fingerprint.of({canonical_key(key): shape for key, shape in shapes.items()}, row, scale)


class MergedWeights(Mapping[str, Tensor]):
    """The tensors of a MODEL by their keys in a checkpoint, with all patches (LoRAs) applied.

    Each is read into main memory when it is asked for.
    """

    def __init__(self, model: ModelPatcher):
        inner = model.model.diffusion_model
        if hasattr(model, "model_state_dict_for_saving"):  # newer hosts leave on disk what is not in use
            comfy.model_management.load_models_gpu([model])
            stored = model.model_state_dict_for_saving(inner, "diffusion_model.")
        else:
            comfy.model_management.load_models_gpu([model], force_patch_weights=True)
            stored = inner.state_dict()
        self._stored = {file_key(key): tensor for key, tensor in stored.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._stored[key].to("cpu").detach().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
