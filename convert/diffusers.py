"""A FLUX as diffusers keeps it: a folder with `config.json` and safetensors of its own tensor names, in one file or several.

    source = read("flux-klein/transformer")          # or a file with tensors of those names
    write(folder, source, progress)                  # what `Flux2Transformer2DModel.from_pretrained(folder)` loads

Tensors are read, put together or taken apart one at a time. What diffusers has no place for (the header of a ComfyUI file, a
pruned file's plan and kept neurons) lies in `flux_poke.safetensors` beside, which diffusers does not look at, so that nothing
is lost on the way back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import bytes_of, kind_of, stream_safetensors, write_text
from ..flux.checkpoint import open_safetensors, require_format
from ..flux.diffusers import CLASSES, SWAPPED, pieces, whole
from ..flux.layout import FAMILY_NAMES, ROTARY, Family, Layout, read_layout
from ..parsing import from_json, read_text
from ..progress import Progress, silent
from .shards import BESIDE, by_file, contents, listed, shards_of
from .source import OURS, Change, Kind, Source

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
BESIDE_FORMAT = "flux-poke beside diffusers 1"
#: Bytes of a file from which on another is begun, as diffusers does.
SHARD = 10_000_000_000
_FILES = re.compile(rf"{re.escape(WEIGHTS)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|{CONFIG}|{re.escape(BESIDE)}")


def read(path: Path) -> Source:
    """A transformer's folder (or that of a pipeline around it), or one file of such tensors.

    Raises `UserError` where it is no FLUX, or files or tensors of it are missing.
    """
    if path.is_dir():
        path = path / "transformer" if (path / "transformer" / CONFIG).is_file() else path
        family: Family | None = _family(path)
        files = listed(path)
    else:
        family, files = None, contents([path])
    kinds: dict[str, Kind] = {}
    for file, keys in by_file(files).items():
        with open_safetensors(file) as opened:
            slices = {key: opened.get_slice(key) for key in keys}
            kinds |= {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    family = family or ("flux2" if any(key.startswith("double_stream_modulation_img.") for key in kinds) else "flux1")
    fused, unknown = _fused(kinds, family, path)
    layout = read_layout({key: shape for key, (_, shape) in fused.items()}, str(path))
    beside, metadata = _beside(path) if path.is_dir() else ({}, {})

    def part(key: str) -> Tensor:
        with open_safetensors(files[key]) as opened:
            return opened.get_tensor(key)

    def tensor(key: str) -> Tensor:
        if key in beside:
            with open_safetensors(path / BESIDE) as opened:
                return opened.get_tensor(key)
        if key in unknown:
            return part(key)
        found = [part(name) for name in pieces(family, key)]
        together = torch.cat([piece.view(torch.uint8) for piece in found]).view(found[0].dtype) if found[1:] else found[0]
        return swapped(together) if key.startswith(SWAPPED) else together

    def row(key: str, index: int) -> Tensor:
        if key.startswith(SWAPPED):
            rows = fused[key][1][0]
            index = (index + rows // 2) % rows
        for name in pieces(family, key):
            if index < kinds[name][1][0]:
                with open_safetensors(files[name]) as opened:
                    return opened.get_slice(name)[index : index + 1][0]
            index -= kinds[name][1][0]
        raise IndexError(key)

    every = set(by_file(files))
    return Source(
        path, "diffusers", layout, {**fused, **unknown, **beside}, tensor, row, metadata,
        renamings(family, fused, "fused"), len(kinds), sum(file.stat().st_size for file in every), len(every),
    )  # fmt: skip


def write(folder: Path, source: Source, progress: Progress = silent, shard: float = SHARD) -> tuple[Change, ...]:
    """Writes `source`, which is not quantised, into the empty `folder`; what was done to its tensors.

    Raises `UserError`, before anything is written, where diffusers' class has no place for the model.
    """
    layout = source.layout
    require_expressible(layout, source.path)
    own, family = source.own, layout.family
    wanted: dict[str, tuple[str, int, int, Kind]] = {}
    for key, (dtype, shape) in own.items():
        start = 0
        names = pieces(family, key)
        for number, name in enumerate(names):
            rows = shape[0] - start if number == len(names) - 1 else shape[0] // 3 if len(names) == 3 else layout.hidden
            wanted[name] = (key, start, start + rows, (dtype, (rows, *shape[1:])))
            start += rows

    def tensor(name: str) -> Tensor:
        key, start, stop, _ = wanted[name]
        found = source.tensor(key)
        progress(f"writing {name}", next(done), len(wanted))
        return swapped(found) if key.startswith(SWAPPED) else found[start:stop]

    done = iter(range(1, len(wanted) + 1))
    shards = shards_of({name: kind for name, (_, _, _, kind) in wanted.items()}, shard)
    index: dict[str, str] = {}
    for number, kinds in enumerate(shards, 1):
        file = f"{WEIGHTS}{f'-{number:05}-of-{len(shards):05}' if len(shards) > 1 else ''}.safetensors"
        stream_safetensors(folder / file, kinds, tensor, {"format": "pt"})
        index |= dict.fromkeys(kinds, file)
    if len(shards) > 1:
        total = sum(bytes_of(kind) for kinds in shards for kind in kinds.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
        write_text(folder / f"{WEIGHTS}.safetensors.index.json", text + "\n")
    beside = {key: kind for key, kind in source.kinds.items() if key.startswith(OURS)}
    header = {key: value for key, value in source.metadata.items() if (key, value) != ("format", "pt")}
    if beside or header:
        metadata = {"format": BESIDE_FORMAT, "header": json.dumps(dict(source.metadata))}
        stream_safetensors(folder / BESIDE, beside, source.tensor, metadata)
    write_text(folder / CONFIG, json.dumps(config(layout), indent=2) + "\n")
    changes = renamings(family, own, "split")
    return (*changes, (f"kept in {BESIDE}", len(beside), ", ".join([*beside, *header][:2]))) if beside or header else changes


def config(layout: Layout) -> dict[str, Any]:
    """What diffusers makes the model from."""
    common = {
        "_class_name": CLASSES[layout.family], "patch_size": 1, "in_channels": layout.in_channels,
        "out_channels": layout.out_channels, "num_layers": layout.depth, "num_single_layers": layout.depth_single,
        "attention_head_dim": layout.head_dim, "num_attention_heads": layout.heads, "joint_attention_dim": layout.context,
        "guidance_embeds": layout.guidance, "axes_dims_rope": list(layout.axes),
    }  # fmt: skip
    if layout.family == "flux1":
        return {**common, "pooled_projection_dim": layout.vector}
    width = layout.sites[0].width
    ratio = width / layout.hidden
    if int(layout.hidden * ratio) < width:  # diffusers cuts off what is behind the point
        ratio = math.nextafter(ratio, math.inf)
    return {**common, "timestep_guidance_channels": 256, "mlp_ratio": ratio, "rope_theta": layout.theta, "eps": 1e-6}


def require_expressible(layout: Layout, source: Path) -> None:
    """Raises `UserError`, naming tensors, where diffusers' class cannot be made to hold a model of this layout."""
    family = layout.family
    advice = "Keep it in ComfyUI's layout, or write GGUF (-o NAME.gguf)."
    if family not in CLASSES:
        raise UserError(f"{source} is a {FAMILY_NAMES[family]}; FLUX.1 and FLUX.2 are converted for diffusers. {advice}")
    if family == "flux1" and not layout.vector:
        raise UserError(f"{source} has no vector_in (pooled text), which {CLASSES[family]} of diffusers always has. {advice}")
    width = 4 * layout.hidden if family == "flux1" else layout.sites[0].width
    other = [f"{site.up}.weight" for site in layout.sites if site.width != width]
    low = [f"{layout.site(name).modulation}.down.weight" for name in layout.ranks]
    said = []
    if other:
        one = "one width for all MLPs" if family == "flux2" else f"MLPs of four times its {layout.hidden} channels"
        said.append(f"{_some(other)} of other widths, where {CLASSES[family]} of diffusers has {one}")
    if low:
        said.append(f"{_some(low)} of low-rank modulation, which it does not have")
    if said:
        raise UserError(f"{source} cannot be written for diffusers: it has {', and '.join(said)}. {advice}")


def replaceable(folder: Path) -> str | None:
    """What in a folder is not a FLUX transformer of diffusers, and so would be lost with it; None where all of it is."""
    found = sorted(entry.name for entry in folder.iterdir())
    foreign = next((name for name in found if not _FILES.fullmatch(name)), None)
    if foreign is None and found:
        try:
            _family(folder)
        except UserError:
            return CONFIG if CONFIG in found else found[0]
    return foreign


def renamings(family: Family, keys: Iterable[str], together: str) -> tuple[Change, ...]:
    """What is renamed, `together` ("split" or "fused") and swapped between a checkpoint's keys and diffusers' names."""
    named = {key: names for key in sorted(keys, key=lambda key: not key.endswith("weight")) if (names := pieces(family, key))}
    several = {key: names for key, names in named.items() if len(names) > 1}
    single = {key: names for key, names in named.items() if len(names) == 1 and not key.startswith(SWAPPED)}
    halves = [key for key in named if key.startswith(SWAPPED)]
    changes: list[Change] = []
    for what, found in (("renamed", single), (together, several)):
        if found:
            key, names = next(iter(found.items()))
            pair = (key, _short(names)) if together == "split" else (_short(names), key)
            count = sum(map(len, found.values())) if what == "fused" else len(found)
            changes.append((what, count, " -> ".join(pair)))
    return (*changes, ("halves swapped", len(halves), halves[0])) if halves else tuple(changes)


def _short(names: tuple[str, ...]) -> str:
    """Names with what they begin and end with in common said once."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    alike = sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False)))
    others = ", ".join(".".join(words[alike:-1]) for words in parts)
    return f"{'.'.join(parts[0][:alike])}.{{{others}}}.{parts[0][-1]}"


def swapped(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(tensor.chunk(2)[::-1])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _family(folder: Path) -> Family:
    """The family that a folder's configuration names; raises `UserError` where it is not FLUX, or turns positions otherwise."""
    try:
        found = from_json(read_text(folder / CONFIG))
        name = found["_class_name"]
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: expected the folder of a transformer, as diffusers saves it.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is not the configuration of a model ({error}): copy it again.") from error
    family = next((family for family, known in CLASSES.items() if known == name), None)
    if family is None:
        raise UserError(f"{folder} holds a {name}; expected one of {', '.join(CLASSES.values())}.")
    axes, theta = ROTARY[family]
    turned = found.get("axes_dims_rope", axes)
    given = tuple(turned) if isinstance(turned, list) else turned, found.get("rope_theta", theta), found.get("patch_size", 1)
    if given != (axes, theta, 1):
        raise UserError(
            f"{folder / CONFIG} asks for axes_dims_rope, rope_theta and patch_size of {given}; in {FAMILY_NAMES[family]} "
            f"checkpoints they are {(axes, theta, 1)}, and nothing in them could say otherwise."
        )
    return family


def _fused(kinds: Mapping[str, Kind], family: Family, path: Path) -> tuple[dict[str, Kind], dict[str, Kind]]:
    """Type and shape of the checkpoint's tensors that diffusers' ones make, and those that make none."""
    unknown = {key: kind for key, kind in kinds.items() if whole(family, key) is None}
    fused: dict[str, Kind] = {}
    for key in kinds:
        found = whole(family, key)
        if found is None or found[0] in fused:
            continue
        names = pieces(family, found[0])
        if missing := [name for name in names if name not in kinds]:
            raise UserError(
                f"{path} has no {missing[0]}, without which {found[0]} is not whole. Where it is one of several files, name "
                "their folder."
            )
        if not all(kinds[name][1] for name in names):
            raise UserError(f"{path}: {names[0]} is a single number, expected a vector or matrix: the file is damaged.")
        types = {kinds[name][0] for name in names}
        below = {kinds[name][1][1:] for name in names}
        if len(types) > 1 or len(below) > 1:
            raise UserError(
                f"{path}: {', '.join(names)} differ in type or width ({', '.join(map(str, (*types, *below)))}); in a "
                "checkpoint they are one tensor."
            )
        fused[found[0]] = types.pop(), (sum(kinds[name][1][0] for name in names), *below.pop())
    return fused, unknown


def _beside(folder: Path) -> tuple[dict[str, Kind], dict[str, str]]:
    """What lies in `BESIDE`: our tensors, and the header of the ComfyUI file that it came from."""
    file = folder / BESIDE
    if not file.is_file():
        return {}, {}
    with open_safetensors(file) as opened:
        header = require_format(opened.metadata(), file, BESIDE_FORMAT, "file of ours beside a transformer", "Remove it.")
        kinds = {key: kind_of(opened.get_tensor(key)) for key in opened.keys()}
    try:
        metadata = {str(key): str(value) for key, value in from_json(header["header"]).items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): copy it again, or remove it.") from error
    return kinds, metadata
