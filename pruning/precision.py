"""What a pruned file takes on disk, by the precision it is saved in.

    number_bytes(dense, key, "bf16")                 # of one number of a tensor
    dense_bytes(dense, "fp8")                        # of the whole file, were nothing cut

| precision | weights of the blocks' linear layers | all else |
|---|---|---|
| stored | as the dense file has them | as the dense file has it |
| bf16 | bf16 | bf16 |
| fp8 | float8_e4m3fn with one float32 scale | bf16 |

In fp8, layers are as ComfyUI quantises its own (`comfy/ops.py`, mixed_precision_ops): `X.weight`, `X.weight_scale` and
`X.comfy_quant`, which names the format. A layer whose sizes are no multiples of `ALIGNED` stays in bf16, and so do the factors
of low-rank modulation in models of less than `WIDE` channels; what the dense file has quantised already stays as it is.
`rounded.py` makes these numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import torch

from ..errors import UserError
from ..files import kind_of
from ..flux.checkpoint import Checkpoint, scale_key
from ..flux.layout import Layout, Site
from .dense import Dense
from .surgery import shape_of

PRECISIONS = ("stored", "bf16", "fp8")

FP8 = torch.float8_e4m3fn
#: What both sizes of a weight are multiples of where the hardware multiplies in 8 bits (torch._scaled_mm).
ALIGNED = 16
#: Channels of a model from which on the factors of low-rank modulation are worth 8 bits.
WIDE = 1024
#: Bytes that the scale and the format of a layer take in the header.
ENTRIES = 220

#: Bytes of a number by safetensors' word for its type.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
_MODULATION = re.compile(r"(_mod|\.modulation)\.lin\.")
_WEIGHT = re.compile(r"(double|single)_blocks\.\d+\.(?P<layer>.+)\.weight")


def require_precision(precision: str) -> str:
    """`precision`; raises `UserError` where there is none of that name."""
    if precision not in PRECISIONS:
        raise UserError(f"A file is saved in one of the precisions {', '.join(PRECISIONS)}; found {precision!r}.")
    return precision


def rounds_to_fp8(layout: Layout, key: str, shape: Sequence[int]) -> bool:
    """Whether precision fp8 stores a tensor of this shape, which is not quantised yet, in 8 bits."""
    found = _WEIGHT.fullmatch(key)
    if found is None or len(shape) != 2 or any(size % ALIGNED for size in shape):
        return False
    return layout.hidden >= WIDE or not found["layer"].endswith((".lin.down", ".lin.up"))


def comfy_quant(key: str) -> bytes:
    """What stands beside the float8 weight `key` as `X.comfy_quant`: JSON in ComfyUI's words.

    Where a GPU multiplies in 8 bits, ComfyUI rounds what layers read as well, but for modulation layers: they read one
    vector a picture, so that it gains no time, and it would move the velocity more than rounding all weights does.
    """
    config: dict[str, str | bool] = {"format": "float8_e4m3fn"}
    if _MODULATION.search(key):
        config["full_precision_matrix_mult"] = True
    return json.dumps(config).encode()


def quantised(dense: Dense, key: str) -> bool:
    """Whether the dense file has the weight `key` with a scale."""
    return key.endswith(".weight") and scale_key(dense.tensors, key) is not None


def number_bytes(dense: Dense, key: str, precision: str) -> int:
    """How many bytes one number of a tensor of `dense` takes in a file of `precision`."""
    tensors = dense.tensors
    dtype = tensors.dtype(key) if isinstance(tensors, Checkpoint) else kind_of(tensors[key])[0]
    if precision == "stored" or (precision == "fp8" and quantised(dense, key)):
        return _BYTES.get(dtype, 1)
    return 1 if precision == "fp8" and rounds_to_fp8(dense.layout, key, shape_of(tensors, key)) else torch.bfloat16.itemsize


def thin_bytes(dense: Dense, site: Site, precision: str) -> int:
    """How many bytes one number of a factor of the site's modulation layer takes, were that of low rank."""
    if precision == "fp8" and dense.layout.hidden >= WIDE:
        return FP8.itemsize
    return max(2, number_bytes(dense, f"{site.modulation}.bias", precision))  # 16 bits at least


def rank_multiple(dense: Dense, multiple: int, precision: str) -> int:
    """What ranks of modulation layers are multiples of: an eighth of `multiple`, and what 8 bits ask for."""
    eighth = max(1, multiple // 8)
    return math.lcm(eighth, ALIGNED) if precision == "fp8" and dense.layout.hidden >= WIDE else eighth


def rounded_layers(dense: Dense, precision: str) -> list[str]:
    """Weights of `dense` that a file of `precision` holds in 8 bits and the dense file does not."""
    if precision != "fp8":
        return []
    tensors = dense.tensors
    return [key for key in tensors if rounds_to_fp8(dense.layout, key, shape_of(tensors, key)) and not quantised(dense, key)]


def dense_bytes(dense: Dense, precision: str) -> int:
    """How many bytes all tensors of `dense` take in a file of `precision`, were nothing cut."""
    own = sum(number_bytes(dense, key, precision) * math.prod(shape_of(dense.tensors, key)) for key in dense.tensors)
    return own + sum(torch.float32.itemsize + len(comfy_quant(key)) for key in rounded_layers(dense, precision))
