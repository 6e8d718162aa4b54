"""A FLUX as GGUF, named and tagged as the loader of ComfyUI-GGUF expects it.

    source = read("flux1-dev-Q8_0.gguf")             # any type that the gguf package can undo
    write(path, source, "Q8_0", progress)            # weights of linear layers in 8 bits, the rest as it is

Names are the checkpoint's, `general.architecture` is "flux". What stands in no block (embedders of image, text, noise level and
guidance; the final layer) is not quantised, nor are vectors and matrices whose rows are no multiple of the type's blocks.
A pruned file's plan is `flux_poke.header` (JSON), its kept neurons are tensors under their own names; `flux_poke.rounding` is
the relative squared error of what was quantised. Needs the gguf package (the extra "gguf").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import replacing, torch_type
from ..flux.layout import Layout, canonical_key, read_layout
from ..parsing import from_json
from ..progress import Progress, silent
from .source import OURS, Change, Kind, Source

#: Types that the gguf package quantises to, of blocks of 32 numbers; and numbers as they are stored.
STORED = "stored"
TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", STORED)
ARCHITECTURE, HEADER, ROUNDING = "flux", "flux_poke.header", "flux_poke.rounding"
#: Not quantised, as those who make GGUF files of FLUX leave them.
_FULL = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "distilled_guidance_layer.", OURS)
#: What stands for itself in both formats; numbers of 8 bits are the same in bf16.
_SAME = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")
_WIDENED = ("F8_E4M3", "F8_E5M2")
#: Numbers quantised at a time.
_PART = 1 << 24


def read(path: Path) -> Source:
    """A GGUF file; raises `UserError` where it is damaged, no FLUX, or of a type that cannot be undone."""
    reader = _open(path)
    found = {str(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(length) for length in reversed(tensor.shape)) for name, tensor in found.items()}
    layout = read_layout(shapes, str(path))
    others = [name for name in found if not name.startswith(layout.prefix)]
    tensors = {canonical_key(name, layout.prefix): tensor for name, tensor in found.items() if name not in set(others)}
    types = {key: str(tensor.tensor_type.name) for key, tensor in tensors.items()}
    rounded = [key for key, name in types.items() if name not in _SAME]
    kinds: dict[str, Kind] = {
        key: ("BF16" if key in set(rounded) else types[key], shapes[str(tensor.name)]) for key, tensor in tensors.items()
    }

    def undone(key: str, start: int = 0, stop: int | None = None) -> Tensor:
        data = np.array(tensors[key].data[start:stop])  # of the file's pages, these alone
        if types[key] in _SAME:
            return torch.from_numpy(data.view(np.uint8)).view(torch_type(types[key]))
        try:
            numbers = _package().quants.dequantize(data, tensors[key].tensor_type)
        except NotImplementedError:
            raise UserError(f"{path} has {key} as {types[key]}, which the gguf package cannot undo.") from None
        return torch.from_numpy(numbers).bfloat16()

    changes: list[Change] = []
    if others:
        changes.append(("left out, not of the transformer", len(others), others[0]))
    if rounded:
        changes.append((f"{types[rounded[0]]} undone, in bf16", len(rounded), rounded[0]))
    return Source(
        path, "GGUF", layout, kinds, lambda key: undone(key).reshape(kinds[key][1]),
        lambda key, index: undone(key, index, index + 1)[0], _header(reader, path), tuple(changes), len(found),
        path.stat().st_size, rounding=_rounding(reader),
    )  # fmt: skip


def write(path: Path, source: Source, type: str = TYPES[0], progress: Progress = silent) -> tuple[Change, ...]:
    """Writes `source`, which has no scales, with the weights of its blocks as `type`; what was done to its tensors."""
    gguf = _package()
    if type not in TYPES:
        raise UserError(f"{type!r} is not a type that is written; choose one of {', '.join(TYPES)}.")
    types = {key: _type(key, kind, type) for key, kind in source.kinds.items()}
    quantised = [key for key, name in types.items() if name == type]
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if type != STORED:
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type}"])
    if source.metadata:
        writer.add_string(HEADER, json.dumps(dict(source.metadata)))
    if quantised:
        writer.add_float64(ROUNDING, 0.0)  # told at the end
    for key, (_, shape) in source.kinds.items():
        own = gguf.GGMLQuantizationType[types[key]]
        size = gguf.quant_shape_to_byte_shape(shape, own)
        writer.add_tensor_info(key, size, np.dtype(np.uint8), math.prod(size), own)
    error = energy = 0.0
    with replacing(path) as new:
        writer.write_header_to_file(new)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for number, key in enumerate(source.kinds):
                progress(f"writing {key}", number, len(types))
                tensor = source.tensor(key)
                if types[key] == type:
                    data, missed, all = _quantised(tensor, gguf.GGMLQuantizationType[type], progress, number, len(types))
                    error, energy = error + missed, energy + all
                else:
                    wanted = tensor.to(torch_type(types[key])).contiguous()
                    data = wanted.reshape(-1).view(torch.uint8).numpy()
                writer.write_tensor_data(data)
        finally:
            writer.close()
        if quantised:
            told = gguf.GGUFReader(new, "r+")
            told.fields[ROUNDING].parts[-1][0] = error / energy if energy else 0.0
            told.data.flush()
            del told  # Windows renames no file that is mapped
    widened = [key for key, (dtype, _) in source.kinds.items() if dtype in _WIDENED and types[key] == "BF16"]
    blocks = [key for key in source.own if types[key] != type and key.endswith(".weight") and not key.startswith(_FULL)]
    changes: tuple[Change, ...] = ()
    if quantised:
        changes += ((f"quantised to {type}", len(quantised), quantised[0]),)
        kept = [key for key in blocks if len(source.kinds[key][1]) == 2]
        if kept:
            changes += (("kept, rows no multiple of 32", len(kept), kept[0]),)
    if widened:
        changes += (("widened to bf16", len(widened), widened[0]),)
    if unfit := unfit_for_comfyui_gguf(source.layout):
        changes += (("ComfyUI-GGUF cannot run", len(unfit), f"{unfit[0]}: not of the dense width or rank"),)
    return changes


def unfit_for_comfyui_gguf(layout: Layout) -> list[str]:
    """Layers that the loader of ComfyUI-GGUF cannot run.

    It takes widths from the file, but ComfyUI splits what a single block's linear1 gives at the width of the dense model, and
    a modulation layer of low rank is two, of which it knows none.
    """
    width = (3 if layout.family == "flux2" else 4) * layout.hidden
    narrow = [f"{site.up}.weight" for site in layout.sites if site.stream == "single" and site.width != width]
    return narrow + [f"{layout.site(name).modulation}.down.weight" for name in layout.ranks]


def _type(key: str, kind: Kind, type: str) -> str:
    """What GGUF calls the type that a tensor is written as."""
    dtype, shape = kind
    if type != STORED and len(shape) == 2 and key.endswith(".weight") and not key.startswith(_FULL):
        block, _ = _package().GGML_QUANT_SIZES[_package().GGMLQuantizationType[type]]
        if shape[1] % block == 0:
            return type
    if dtype not in (*_SAME, *_WIDENED):
        raise UserError(f"{key} is stored as {dtype}, which GGUF has no type for.")
    return "BF16" if dtype in _WIDENED else dtype


def _quantised(tensor: Tensor, type: Any, progress: Progress, done: int, total: int) -> tuple[np.ndarray, float, float]:
    """A matrix as bytes of `type`, its squared rounding error, and the sum of its squares."""
    quants = _package().quants
    parts, error, energy = [], 0.0, 0.0
    step = max(1, _PART // tensor.shape[1])
    for start in range(0, len(tensor), step):
        rows = tensor[start : start + step].float().numpy()
        parts.append(quants.quantize(rows, type))
        error += float(np.square(quants.dequantize(parts[-1], type) - rows, dtype=np.float64).sum())
        energy += float(np.square(rows, dtype=np.float64).sum())
        progress("quantising", done + min(1.0, (start + step) / len(tensor)), total)
    return np.concatenate(parts), error, energy


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UserError('GGUF needs the gguf package: pip install "flux-poke[gguf]", or pip install gguf.') from None
    return gguf


def _open(path: Path) -> Any:
    gguf = _package()
    try:
        return gguf.GGUFReader(path, "r")
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as GGUF ({str(error)[:200]}): it is damaged, cut short, or of another format. Copy or "
            "download it again."
        ) from error


def _header(reader: Any, path: Path) -> Mapping[str, str]:
    field = reader.get_field(HEADER)
    if field is None:
        return {}
    try:
        return {str(key): str(value) for key, value in from_json(field.contents()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} has a damaged {HEADER} ({error}): copy it again.") from error


def _rounding(reader: Any) -> float | None:
    field = reader.get_field(ROUNDING)
    return None if field is None else float(field.contents())
