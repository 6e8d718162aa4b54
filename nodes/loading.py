"""Loading a FLUX of any MLP widths through ComfyUI's own detection and memory management.

    model = load_flux(cut, "default")                # a MODEL whose MLPs have the widths of the tensors
    model = load_pruned(Pruned.open(path), "default")

ComfyUI builds its model at the dense widths. Its linear layers here take no memory until they are loaded, and those of the
MLPs take the width of what is loaded: the dense model is never allocated, in memory or on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import read_layout
from ..pruning.checkpoint import Pruned
from ..tiny.model import FOLDER as TINY_FOLDER

#: What the loaders offer beside the files in models/diffusion_models.
TINY = "tiny FLUX (ships with the pack)"
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")


def checkpoint_names() -> list[str]:
    """What a loader can be asked for."""
    return [*folder_paths.get_filename_list("diffusion_models"), TINY]


def checkpoint_path(name: str) -> str:
    """The file of a name from `checkpoint_names`."""
    if name == TINY:
        return str(TINY_FOLDER / "flux.safetensors")
    return folder_paths.get_full_path_or_raise("diffusion_models", name)


def checkpoint_folder() -> Path:
    """Where checkpoints are saved: models/diffusion_models (ComfyUI also looks in others, such as the older models/unet)."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    return next((folder for folder in folders if folder.name == "diffusion_models"), folders[-1])


def load_flux(tensors: Mapping[str, Tensor], weight_dtype: str, metadata: Mapping[str, str] | None = None) -> ModelPatcher:
    """A MODEL from a FLUX's tensors (canonical keys), each read when it is needed; `weight_dtype` as UNETLoader's.

    Raises `UserError` where ComfyUI does not know the model.
    """
    return _reloadable(lambda: dict(tensors), weight_dtype, metadata or {})


def load_pruned(pruned: Pruned, weight_dtype: str) -> ModelPatcher:
    """As `load_flux`, from a file that ComfyUI reads itself: so its own options for reading files hold for this one."""

    def read() -> dict[str, Tensor]:
        stored = read_tensors(str(pruned.path))
        return {key: stored[key] for key in pruned.tensors}

    return _reloadable(read, weight_dtype, pruned.metadata)


def _reloadable(read: Callable[[], dict[str, Tensor]], weight_dtype: str, metadata: Mapping[str, str]) -> ModelPatcher:
    def load(disable_dynamic: bool = False) -> ModelPatcher:
        return _load(read(), weight_dtype, dict(metadata), disable_dynamic)

    model = load()
    # torch.compile and hooked conditioning ask for the model again.
    model.cached_patcher_init = (load, ())
    return model


def _load(state: dict[str, Tensor], weight_dtype: str, metadata: dict[str, str], disable_dynamic: bool) -> ModelPatcher:
    # ComfyUI leaves these to itself where the operations are its own; here they are not.
    state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    options: dict[str, Any] = {}
    if weight_dtype != "default":
        options["dtype"] = torch.float8_e5m2 if weight_dtype == "fp8_e5m2" else torch.float8_e4m3fn
        options["fp8_optimizations"] = weight_dtype.endswith("fast")
    options["custom_operations"] = _operations(state, metadata, options)
    model = comfy.sd.load_diffusion_model_state_dict(state, options, metadata=metadata, **_dynamic(disable_dynamic))
    for block in model.model.diffusion_model.single_blocks:
        block.mlp_hidden_dim = block.mlp_hidden_dim_first = block.linear1.out_features - 3 * block.linear1.in_features
    return model


def _operations(state: dict[str, Tensor], metadata: dict[str, str], options: dict[str, Any]) -> type:
    """The operations that ComfyUI would choose, with linear layers of any width."""
    device = comfy.model_management.get_torch_device()
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=metadata)
    if config is None:
        raise UserError(
            "ComfyUI does not recognise this FLUX: update ComfyUI, or check that the file loads in Load Diffusion Model."
        )
    supported = list(config.supported_inference_dtypes)
    quantised = getattr(config, "quant_config", None) is not None
    stored = options.get("dtype") or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=None if quantised else comfy.utils.weight_dtype(state),
    )
    computed = comfy.model_management.unet_manual_cast(None if quantised else stored, device, supported)
    chosen = comfy.ops.pick_operations(
        stored, computed, load_device=device, fp8_optimizations=options.get("fp8_optimizations", False), model_config=config
    )
    sites = read_layout({key: tensor.shape for key, tensor in state.items()}).sites
    return of_any_width(chosen, {path for site in sites for path in (site.up, site.down)})


def of_any_width(operations: type, layers: Collection[str]) -> type:
    """ComfyUI operations whose linear layers are empty until they are loaded; then those in `layers` fit what is loaded.

    Others stay as they were asked for: the shape in which a file packs a weight need not be the weight's own.
    """

    class Linear(operations.Linear):  # type: ignore[name-defined]
        def __init__(self, in_features: int, out_features: int, *args, **kwargs):
            super().__init__(0, 0, *args, **kwargs)
            self.in_features, self.out_features = in_features, out_features

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if prefix.removesuffix(".") in layers:
                self.out_features, self.in_features = state_dict[f"{prefix}weight"].shape
            self._orig_shape = self.out_features, self.in_features
            for name, shape in (("weight", self._orig_shape), ("bias", self._orig_shape[:1])):
                empty = getattr(self, name, None)
                if empty is not None:
                    setattr(self, name, nn.Parameter(empty.new_empty(shape), requires_grad=False))
            super()._load_from_state_dict(state_dict, prefix, *rest)

    return type("AnyWidth", (operations,), {"Linear": Linear})


def _dynamic(disable: bool) -> dict[str, bool]:
    """Older hosts do not know the option."""
    return {"disable_dynamic": True} if disable else {}


def read_tensors(path: str) -> dict[str, Tensor]:
    """All tensors of a file, as ComfyUI reads files."""
    return comfy.utils.load_torch_file(path, safe_load=True)


def load_lora(model: ModelPatcher, tensors: Mapping[str, Tensor], strength: float) -> ModelPatcher:
    """A clone of MODEL with a LoRA on it."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]
