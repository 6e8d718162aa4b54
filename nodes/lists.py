"""What is chosen from lists: checkpoints by what is in them, and the files in output/flux_poke.

    dense_names(), pruned_names()            # FLUX files first, damaged ones last
    named_files(LENS)                        # "tiny/lens.safetensors", ...

The page reads lists anew when "r" is pressed. Files are told apart by their headers, each of which is read once as long as its
file stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from ..flux.checkpoint import open_safetensors
from ..flux.layout import read_layout
from ..pruning.checkpoint import WhenAsked
from ..pruning.dense import PRUNED_FORMAT
from . import host, loading


class Kind(IntEnum):
    """What a file of models/ is, in the order in which they are listed where a dense FLUX is asked for."""

    DENSE, OTHER, PRUNED, DAMAGED = range(4)


def dense_names() -> list[str]:
    """Dense FLUX files, also those in models/checkpoints; the tiny ones that ship; then all else in models/diffusion_models."""
    kinds = {name: kind_of(name) for name in loading.checkpoint_names()}
    flux = [name for name, kind in kinds.items() if kind == Kind.DENSE]
    others = sorted(kinds.keys() - {*flux}, key=lambda name: (kinds[name], name))
    in_checkpoints = [name for name in loading.all_in_one_names() if kind_of(name) == Kind.DENSE]
    return [*flux, *in_checkpoints, *loading.SHIPPED_NAMES, *others]


def pruned_names() -> list[str]:
    """Pruned checkpoints in models/diffusion_models."""
    return [name for name in loading.checkpoint_names() if kind_of(name) == Kind.PRUNED]


def kind_of(name: str) -> Kind:
    """What the checkpoint of a name is, by its header alone; never raises."""
    path = loading.find_checkpoint(name)
    found = None if path is None else _header(Path(path))
    return Kind.DAMAGED if found is None else found[1]


def named_files(format: str) -> list[str]:
    """Names of the safetensors files in output/flux_poke whose header names `format`, also of those one folder deeper."""
    found = _listed(path for depth in ("*", "*/*") for path in host.output_folder().glob(f"{depth}.safetensors"))
    return [name for name in found if (header := _header(host.output_folder() / name)) and header[0] == format]


def layer_folders() -> list[str]:
    """Names of the folders in output/flux_poke that hold retrained layers."""
    files = (path for depth in ("*", "*/*") for path in host.output_folder().glob(f"{depth}/[0-9]*.safetensors"))
    return _listed(path.parent for path in files if path.stem.isdecimal())


def preview_folders() -> list[str]:
    """Names of the folders in output/flux_poke that hold decoded previews, newest first."""
    root = host.output_folder()
    decoded = {path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/decoded")}
    folders = {folder.parent if folder.name == "intermediates" else folder for folder in decoded}
    return sorted(_listed(folders), key=lambda name: -(root / name).stat().st_mtime)


def _listed(paths: Iterable[Path]) -> list[str]:
    """Names of what nodes take: no part hidden, and no link."""
    names = {host.name_of(path) for path in paths if not path.is_symlink()}
    return sorted(name for name in names if not any(part.startswith(".") for part in Path(name).parts))


def _header(path: Path) -> tuple[str, Kind] | None:
    """A file's format, and what kind of model it is; None where it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _read(str(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4096)
def _read(path: str, changed: int, size: int) -> tuple[str, Kind] | None:
    if os.path.splitext(path)[1] not in (".safetensors", ".sft"):
        return "", Kind.OTHER
    try:
        file = open_safetensors(path)
    except UserError:
        return None
    with file:
        format = (file.metadata() or {}).get("format", "")
        if format == PRUNED_FORMAT:
            return format, Kind.PRUNED
        try:
            read_layout(WhenAsked(file.keys(), lambda key: file.get_slice(key).get_shape()))
        except (ValueError, LookupError, TypeError, ArithmeticError, OSError, SafetensorError):
            return format, Kind.OTHER
        return format, Kind.DENSE
