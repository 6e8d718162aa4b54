"""The weights of one MLP out of a checkpoint, as numbers, whatever the file stores them as.

    weights = SiteWeights.read(checkpoint, layout.site("single-7"))
    h = weights.activations(x)                       # [n, width], as they enter the down projection
    stored_like(new_down, checkpoint, f"{site.down}.weight")     # back to what the file stores, with its scale
    Flux.load(Plain(checkpoint))                     # a quantised file to run without a host

Quantised weights with one scale for the tensor or one per row (scaled fp8 files, ComfyUI's float8 and int8 layers) are undone
on the way in and made again on the way out. Finer ones are refused: their blocks lie across the columns that are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..parsing import from_json
from .checkpoint import scale_key
from .layout import Site
from .model import activation

#: What may stand beside the weight of a quantised layer.
BESIDE_WEIGHT = ("weight_scale", "weight_scale_2", "scale_weight", "input_scale", "scale_input", "comfy_quant")
#: ComfyUI's layer formats whose numbers stand for themselves, but for a scale.
_PLAIN_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")


@dataclass(frozen=True)
class SiteWeights:
    """One MLP in float32.

    Attributes:
        up: [width, hidden]; gated: [2 * width, hidden], gates first. up_bias: as many, or None.
        down: [hidden, width]. attn: [hidden, hidden] in single blocks, what linear2 does with the attention; else None.
        bias: of the down projection [hidden], or None.
    """

    site: Site
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    attn: Tensor | None
    bias: Tensor | None

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], site: Site, device: torch.device | str = "cpu", up: bool = True
    ) -> SiteWeights:
        """Reads the site's tensors (canonical keys); raises `UserError` where they are quantised in blocks.

        Without `up`, the up projection is left out, as one of no rows, where no activations are asked for.
        """

        def read(key: str) -> Tensor | None:
            return full_precision(tensors, key, device) if key in tensors else None

        down, up_bias = full_precision(tensors, f"{site.down}.weight", device), read(f"{site.up}.bias")
        return cls(
            site=site,
            up=full_precision(tensors, f"{site.up}.weight", device)[site.up_row :] if up else down.new_empty(0, len(down)),
            up_bias=None if up_bias is None else up_bias[site.up_row :],
            down=down[:, site.down_column :],
            attn=down[:, : site.down_column] if site.down_column else None,
            bias=read(f"{site.down}.bias"),
        )

    def activations(self, x: Tensor) -> Tensor:
        """The neurons [n, width] for rows x [n, hidden]: GELU(tanh), or silu(gate) * value in a gated MLP; float32."""
        return activation(self.site)(F.linear(x.to(self.up), self.up, self.up_bias))


def require_plain(tensors: Mapping[str, Tensor], key: str) -> None:
    """Raises `UserError` where the weight `key` is quantised in a way that rows and columns cannot be taken from."""
    layer = key.removesuffix(".weight")
    name = scale_key(tensors, key)
    config: dict = {}
    if f"{layer}.comfy_quant" in tensors:
        config = from_json(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
    rotated = bool(config.get("convrot") or (config.get("params") or {}).get("convrot"))
    kind = "int8 with rotated columns" if rotated else config.get("format")
    fine = name is not None and tensors[name].squeeze().ndim > 1
    if rotated or fine or (kind and kind not in _PLAIN_FORMATS):
        raise UserError(
            f"{key} is quantised as {kind or 'blocks with a scale each'}, from which single neurons cannot be taken out; "
            "expected bf16, fp16, or 8 bits with one scale for the tensor or one per row. Use a bf16, fp16 or fp8 file."
        )


def full_precision(tensors: Mapping[str, Tensor], key: str, device: torch.device | str = "cpu") -> Tensor:
    """The tensor `key` in float32 on `device`, a weight with its scale undone."""
    require_plain(tensors, key)
    weight = tensors[key].to(device).float()
    name = scale_key(tensors, key)
    if name is None:
        return weight
    scale = tensors[name].to(device).float()
    return weight * (scale if scale.numel() == 1 else scale.reshape(-1, 1))


class Plain(Mapping[str, Tensor]):
    """Tensors as numbers that stand for themselves: quantised weights in float32, without the scales beside them."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._keys = dict.fromkeys(
            key for key in tensors if key != "scaled_fp8" and key.rpartition(".")[2] not in BESIDE_WEIGHT
        )

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return full_precision(self._tensors, key) if scale_key(self._tensors, key) else self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def stored_like(weight: Tensor, tensors: Mapping[str, Tensor], key: str) -> tuple[Tensor, Tensor | None]:
    """`weight` in the precision that `tensors` stores `key` in, and its new scale where it has one.

    A new scale brings the largest number to the end of the format's range, per tensor or per row as the old one did, of which
    there may have been more rows.
    """
    dtype, name = tensors[key].dtype, scale_key(tensors, key)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    scale = None
    if name is not None:
        old, size = tensors[name], weight.abs().float()
        largest = size.amax() if old.numel() == 1 else size.amax(1, keepdim=True)
        scale = (largest / limits.max).clamp(min=torch.finfo(torch.float32).tiny).to(old.dtype)
        weight = weight / scale.float()
        scale = scale.reshape(old.shape if old.numel() == 1 else [-1 if length > 1 else 1 for length in old.shape])
    if not dtype.is_floating_point:
        weight = weight.round()
    return weight.clamp(limits.min, limits.max).to(dtype), scale
