"""Tensors of one model in several safetensors files, with the index that Hugging Face's libraries write.

listed(folder)                                   # {"proj_out.weight": folder / "...-00002-of-00002.safetensors", ...}
shards_of(kinds, limit)                          # which tensors go into which file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import UserError
from ..files import bytes_of
from ..flux.checkpoint import open_safetensors
from ..parsing import from_json, read_text
from .source import Kind

#: A file of ours beside the model's.
BESIDE = "flux_poke.safetensors"


def listed(folder: Path) -> dict[str, Path]:
    """Every tensor in a folder and the file that holds it."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    single = sorted(file for file in folder.glob("*.safetensors") if file.name != BESIDE)
    if len(indices) > 1 or (not indices and len(single) != 1):
        names = [file.name for file in indices or single] or ["none"]
        raise UserError(f"{folder}: expected one .safetensors file, or several and one index; found {', '.join(names)}.")
    if not indices:
        return contents(single)
    try:
        weight_map = {str(key): str(name) for key, name in from_json(read_text(indices[0]))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{indices[0]} is not an index of safetensors files ({error}): copy it again.") from error
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or not name]:
        raise UserError(f"{indices[0]} names {outside[0]!r}, which is not a file beside it.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} is incomplete: {len(missing)} of the {len(names)} files in its index are missing, first {missing[0]}. "
            "Copy or download them."
        )
    files = contents(folder / name for name in names)
    wrong = [key for key in sorted({*files, *weight_map}) if key not in files or weight_map.get(key) != files[key].name]
    if wrong:
        raise UserError(
            f"{indices[0]} and the files beside it disagree on {len(wrong)} tensors, first {wrong[0]}: they do not belong "
            "together. Copy the folder again."
        )
    return files


def contents(files: Iterable[Path]) -> dict[str, Path]:
    """Every tensor in files and the file that holds it."""
    found: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    """By file, the tensors that it holds."""
    found: dict[Path, list[str]] = {}
    for key, file in files.items():
        found.setdefault(file, []).append(key)
    return found


def shards_of(kinds: Mapping[str, Kind], limit: float) -> list[dict[str, Kind]]:
    """The tensors of each file, none larger than `limit` bytes but for one tensor that is."""
    found: list[dict[str, Kind]] = [{}]
    size = 0
    for name, kind in kinds.items():
        if found[-1] and size + bytes_of(kind) > limit:
            found.append({})
            size = 0
        found[-1][name] = kind
        size += bytes_of(kind)
    return found
