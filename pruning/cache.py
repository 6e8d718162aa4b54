"""Files of what takes long to work out and can be worked out again: rankings and repairs in a recording's `cache` folder.

    key = cache_key(FORMAT, recorded_rows(recording), plan.digest)   # in the name of the file or its folder
    found = read_cached(path, FORMAT, {"order": (width,)})           # None where it is not there or not sound
    write_cached(path, FORMAT, tensors)                              # in place of whatever stood there

A file that is damaged, of another format, of other shapes, or holds a number that is not finite is worked out again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import open_safetensors
from ..recording.recording import Recording

#: By name; None where any shape will do.
Shapes = Mapping[str, tuple[int, ...] | None]


def cache_key(*parts: str) -> str:
    """16 hexadecimal digits that change with any of `parts`."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def recorded_rows(recording: Recording) -> str:
    """Changes whenever rows are added or thinned, or amplification is measured: all that rankings and repairs are made from."""
    return recording.digest("rows", "amplification")


def cached_header(path: Path, format: str, shapes: Shapes) -> dict[str, str] | None:
    """The header of a cached file that has tensors of these shapes (others may be there too), else None; no number is read."""
    try:
        with open_safetensors(path) as file:
            header = file.metadata() or {}
            sound = all(shape in (None, tuple(file.get_slice(name).get_shape())) for name, shape in shapes.items())
    except (UserError, SafetensorError, OSError):
        return None
    return header if sound and header.get("format") == format else None


def read_cached(path: Path, format: str, shapes: Shapes) -> dict[str, Tensor] | None:
    """The tensors named in `shapes`, or None where they are not all there, of these shapes and finite."""
    if cached_header(path, format, shapes) is None:
        return None
    try:
        with open_safetensors(path) as file:
            found = {name: file.get_tensor(name) for name in shapes}
    except (UserError, SafetensorError, OSError, RuntimeError):
        return None
    return found if all(torch.isfinite(tensor).all() for tensor in found.values()) else None


def write_cached(path: Path, format: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes the file as a whole, in place of what stood at `path`, whatever it was."""
    if cached_header(path, format, {}) is None:
        path.unlink(missing_ok=True)
    write_safetensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {**(header or {}), "format": format})
