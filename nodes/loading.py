"""Loading a FLUX of any MLP widths and modulation ranks through ComfyUI's own detection and memory management.

    model = load_flux(cut, "default")                # a MODEL whose layers have the shapes of the tensors
    model = load_pruned(Pruned.open(path), "default")

ComfyUI builds its model at the dense widths. Its linear layers here take no memory until they are loaded, those of the MLPs
take the width of what is loaded, and a modulation layer of low rank becomes two linear layers of ComfyUI's in an nn.Sequential,
`lin.down` (without a bias) and `lin.up`: the dense model is never allocated, in memory or on the device, and no layer is of
another kind than the host's own. `weight_dtype` rounds all but these thin factors to 8 bits.
"""

from __future__ import annotations

from collections import OrderedDict
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
from ..flux.layout import canonical_key, read_layout
from ..pruning.checkpoint import Pruned
from ..tiny.model import SHIPPED

#: What the loaders offer beside the files in models/diffusion_models.
TINY = "tiny FLUX (ships with the pack)"
TINY_FLUX2 = "tiny FLUX.2 (ships with the pack)"
SHIPPED_NAMES = (TINY, TINY_FLUX2)
#: What names of files in models/checkpoints begin with: all-in-one files, of which the transformer alone is read.
_ALL_IN_ONE = "checkpoints/"
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
#: What the bias of a layer of low rank is called after its name: in a file, it is `.bias`.
_UP_BIAS = ".up.bias"


def checkpoint_names() -> list[str]:
    """Names of the files in models/diffusion_models."""
    return folder_paths.get_filename_list("diffusion_models")


def all_in_one_names() -> list[str]:
    """Names of the files in models/checkpoints, which may hold a FLUX beside text encoders and autoencoder."""
    return [f"{_ALL_IN_ONE}{name}" for name in folder_paths.get_filename_list("checkpoints")]


def checkpoint_path(name: str) -> str:
    """The file of a name that loaders list; raises `UserError` where there is none."""
    if (found := find_checkpoint(name)) is None:
        raise UserError(f"There is no model {name!r} in models/diffusion_models: put it there, press R, and choose it.")
    return found


def find_checkpoint(name: str) -> str | None:
    """As `checkpoint_path`, or None."""
    if name in SHIPPED_NAMES:
        return str(SHIPPED["flux1" if name == TINY else "flux2"] / "flux.safetensors")
    found = folder_paths.get_full_path("diffusion_models", name)
    if found is None and name.startswith(_ALL_IN_ONE):
        found = folder_paths.get_full_path("checkpoints", name.removeprefix(_ALL_IN_ONE))
    return found


def checkpoint_folder() -> Path:
    """Where checkpoints are saved: models/diffusion_models (ComfyUI also looks in others, such as the older models/unet)."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    return next((folder for folder in folders if folder.name == "diffusion_models"), folders[-1])


def load_flux(tensors: Mapping[str, Tensor], weight_dtype: str, metadata: Mapping[str, str] | None = None) -> ModelPatcher:
    """A MODEL from a FLUX's tensors (canonical keys), each read when it is needed; `weight_dtype` as UNETLoader's.

    Raises `UserError` where ComfyUI does not know the model, or would run it with other rotary axes than it has.
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
    layout = read_layout({key: tensor.shape for key, tensor in state.items()})
    if layout.own_axes:
        raise UserError(
            f"The checkpoint has rotary axes of its own ({', '.join(map(str, layout.own_axes))}); ComfyUI runs a family's own "
            "axes only. Use it with the flux-poke commands, which need no ComfyUI."
        )
    low_rank = [layout.site(name).modulation for name in layout.ranks]
    for layer in low_rank:
        state[layer + _UP_BIAS] = state.pop(f"{layer}.bias")
    options: dict[str, Any] = {}
    if weight_dtype != "default":
        options["dtype"] = torch.float8_e5m2 if weight_dtype == "fp8_e5m2" else torch.float8_e4m3fn
        options["fp8_optimizations"] = weight_dtype.endswith("fast")
    options["custom_operations"] = of_any_width(
        _operations(state, metadata, options), {path for site in layout.sites for path in (site.up, site.down)}
    )
    dynamic = {"disable_dynamic": True} if disable_dynamic else {}  # older hosts do not know the option
    model = comfy.sd.load_diffusion_model_state_dict(state, options, metadata=metadata, **dynamic)
    transformer = model.model.diffusion_model
    for layer in low_rank:
        parent, _, name = layer.rpartition(".")
        factors = transformer.get_submodule(layer).named_children()
        setattr(transformer.get_submodule(parent), name, nn.Sequential(OrderedDict(factors)))
    for block in transformer.single_blocks:
        block.mlp_hidden_dim = block.mlp_hidden_dim_first = block.linear1.out_features - 3 * block.linear1.in_features
    return model


def file_key(key: str) -> str:
    """What the tensor that a MODEL's transformer has as `key` is called in a checkpoint."""
    return f"{key.removesuffix(_UP_BIAS)}.bias" if key.endswith(f".lin{_UP_BIAS}") else canonical_key(key)


def _operations(state: dict[str, Tensor], metadata: dict[str, str], options: dict[str, Any]) -> type:
    """The operations that ComfyUI would choose."""
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
    return comfy.ops.pick_operations(
        stored, computed, load_device=device, fp8_optimizations=options.get("fp8_optimizations", False), model_config=config
    )


def of_any_width(operations: type, layers: Collection[str]) -> type:
    """ComfyUI operations whose linear layers are empty until they are loaded; then those in `layers` fit what is loaded.

    Others stay as they were asked for: the shape in which a file packs a weight need not be the weight's own. One that is
    stored as two factors gets them as its children `down` and `up`, which load themselves, and is nothing itself.
    """

    class Linear(operations.Linear):  # type: ignore[name-defined]
        def __init__(self, in_features: int, out_features: int, *args, **kwargs):
            super().__init__(0, 0, *args, **kwargs)
            self.in_features, self.out_features = in_features, out_features

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if f"{prefix}down.weight" in state_dict:
                self._divide(state_dict[f"{prefix}down.weight"])
                return
            if prefix.removesuffix(".") in layers:
                self.out_features, self.in_features = state_dict[f"{prefix}weight"].shape
            self._orig_shape = self.out_features, self.in_features
            for name, shape in (("weight", self._orig_shape), ("bias", self._orig_shape[:1])):
                empty = getattr(self, name, None)
                if empty is not None:
                    setattr(self, name, nn.Parameter(empty.new_empty(shape), requires_grad=False))
            super()._load_from_state_dict(state_dict, prefix, *rest)

        def _divide(self, down):
            # Rounded to 8 bits, thin factors lose more than truncation did, and that would save next to nothing.
            dtype = down.dtype if self.bias.dtype.itemsize == 1 else self.bias.dtype
            options = {"device": self.bias.device, "dtype": dtype}
            self._parameters.clear()
            self.down = type(self)(self.in_features, len(down), bias=False, **options)
            self.up = type(self)(len(down), self.out_features, bias=True, **options)
            if hasattr(comfy.model_management, "archive_model_dtypes"):  # newer hosts cast a file's weights to these when used
                comfy.model_management.archive_model_dtypes(self)

    return type("AnyWidth", (operations,), {"Linear": Linear})


def read_tensors(path: str) -> dict[str, Tensor]:
    """All tensors of a file, as ComfyUI reads files."""
    return comfy.utils.load_torch_file(path, safe_load=True)


def load_lora(model: ModelPatcher, tensors: Mapping[str, Tensor], strength: float) -> ModelPatcher:
    """A clone of MODEL with a LoRA on it."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]
