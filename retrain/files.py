"""`retrained_layers/`: a folder with one file per retrained block, which runs take the place of the dense ones.

    write_layer(folder, layer)                       # 3.safetensors, layer_stats.yaml
    draw_stats(folder)                               # layer_stats.png
    layers = RetrainedLayers.open(folder, dense, first=0, last=18)
    replaced = Replaced(dense, layers)
    model = Flux.load(replaced)
    save_replaced("replaced.safetensors", replaced)

`{n}.safetensors` holds the changed tensors of block n, keyed relative to the block ("img_mlp.0.weight"); single blocks count on
from the double ones. 8-bit weights stand beside a `scale_weight` each, and `flux_poke.kept.S` int32 are the kept neurons of
site S. The header has the dense model's fingerprint and what is known of the training. Files that hold a whole block, as the
original flux-poke wrote them, are read like them; of those it cannot be told which model they belong to but by their shapes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from ..analysis.blocks import Block, blocks_of
from ..errors import UserError
from ..files import kind_of, locked, replacing, stream_safetensors, write_safetensors, write_text
from ..flux.checkpoint import Checkpoint, open_safetensors, scale_key
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Layout, Site, canonical_key
from ..pruning.dense import KEPT, Dense
from ..pruning.plan import PruningPlan
from ..pruning.surgery import shape_of
from ..pruning.weights import full_precision, stored_like
from .trainable import stored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "flux-poke retrained layer 1"
FORMAT_REPLACED = "flux-poke replaced 1"
STATS, PICTURE = "layer_stats.yaml", "layer_stats.png"


@dataclass(frozen=True)
class LayerStats:
    """What became of one layer. Losses ending in `_loss` are plain squared errors, as the original's; `relative_` ones are
    divided by the mean square of what is to be predicted: as cut, as training began (after the closed form), at the end.

    `lines` are neurons kept, by stream; thresholds are those of the plan, if it was made by any.
    """

    layer: int
    name: str
    img_lines: int | None
    txt_lines: int | None
    single_lines: int | None
    img_threshold: float | None
    txt_threshold: float | None
    initial_loss: float
    final_loss: float
    train_loss: float | None
    relative_cut: float
    relative_start: float
    relative_final: float
    method: str
    data: str
    steps: int
    seconds: float
    held_out_images: list[int]
    save_dtype: str


@dataclass(frozen=True)
class Layer:
    """One retrained block: its changed tensors (keys relative to the block, float32), kept neurons by site, and its story.

    `made` tells one way of making it from another: model, plan, data, options.
    """

    place: int
    tensors: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    stats: LayerStats
    fingerprint: Fingerprint
    made: str

    @classmethod
    def of(
        cls, dense: Dense, plan: PruningPlan, place: int, tensors: Mapping[str, Tensor], stats: LayerStats, made: str
    ) -> Layer:
        """The block's share of `tensors` (canonical keys)."""
        sites = block_sites(dense.layout, place)
        prefix = f"{sites[0].block}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        kept = {site.name: plan.kept[site.name] for site in sites if site.name in plan.kept}
        return cls(place, own, kept, stats, dense.fingerprint, made)


def block_sites(layout: Layout, place: int) -> list[Site]:
    """The MLPs of the block at a place."""
    block = blocks_of(layout)[place]
    return [site for site in layout.sites if site.block == f"{block.kind}_blocks.{block.index}"]


def plan_stats(layout: Layout, plan: PruningPlan, place: int) -> dict[str, Any]:
    """What the plan says of a block, as fields of `LayerStats`."""
    lines = {site.stream: len(plan.kept.get(site.name, range(site.width))) for site in block_sites(layout, place)}
    limits = re.search(r"by threshold on \w+, img (\S+) txt (\S+)", plan.made)
    return {
        "img_lines": lines.get("img"),
        "txt_lines": lines.get("txt"),
        "single_lines": lines.get("single"),
        "img_threshold": float(limits[1]) if limits else None,
        "txt_threshold": float(limits[2]) if limits else None,
    }


def write_layer(folder: str | os.PathLike[str], layer: Layer) -> None:
    """Writes the layer's file, then the stats of all layers in the folder."""
    folder = Path(folder)
    dtype = getattr(torch, layer.stats.save_dtype)
    tensors: dict[str, Tensor] = {}
    for key, tensor in layer.tensors.items():
        value, scale = stored(tensor, dtype if tensor.ndim > 1 or dtype.itemsize > 1 else torch.bfloat16)
        tensors[key] = value
        if scale is not None:
            tensors[f"{key.removesuffix('.weight')}.scale_weight"] = scale
    tensors |= {f"{KEPT}{name}": indices.int() for name, indices in layer.kept.items()}
    header = {
        "format": FORMAT,
        "model": layer.fingerprint.to_json(),
        "made": layer.made,
        "stats": json.dumps(asdict(layer.stats)),
    }
    with locked(folder / STATS):
        write_safetensors(folder / f"{layer.place}.safetensors", tensors, header)
        write_stats(folder)


def read_stats(folder: Path) -> list[LayerStats]:
    """Of all layers in `folder` that this program trained, from their headers."""
    headers = [read_header(path) for path in layer_files(folder).values()]
    return [LayerStats(**json.loads(header["stats"])) for header in headers if "stats" in header]


def write_stats(folder: Path) -> None:
    """`layer_stats.yaml`, made anew from the layers, so that it cannot fall behind them."""
    content = {f"layer{layer.layer}": asdict(layer) for layer in read_stats(folder)}
    write_text(folder / STATS, yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False))


def draw_stats(folder: str | os.PathLike[str]) -> Path | None:
    """The picture of all layers in the folder; None where there are none."""
    stats = read_stats(Path(folder))
    if not stats:
        return None
    path = Path(folder) / PICTURE
    with replacing(path) as new:
        stats_figure(stats).savefig(new, format="png", dpi=110)
    return path


def stats_figure(stats: list[LayerStats]) -> Figure:
    """Held-out error of every layer: as it was cut, after the closed form, after training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.45 * len(stats) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(stats))
    for name, label, color in (
        ("relative_cut", "as cut", "tab:gray"),
        ("relative_start", "as training began", "tab:orange"),
        ("relative_final", "retrained", "tab:blue"),
    ):
        axes.plot(places, [getattr(layer, name) for layer in stats], "o-", color=color, label=label)
    axes.set_yscale("log")
    axes.set_xticks(list(places), [layer.name for layer in stats], rotation=90)
    axes.set_ylabel("relative squared error, held-out images")
    axes.set_title("Before and after retraining, layer by layer")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def layer_files(folder: Path) -> dict[int, Path]:
    """The layers in a folder, by place, ascending."""
    found = {int(path.stem): path for path in folder.glob("*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def read_header(path: Path) -> dict[str, str]:
    with open_safetensors(path) as file:
        return file.metadata() or {}


@dataclass(frozen=True)
class RetrainedLayers:
    """Layers from a folder that fit one dense model, by place; `missing` are places of the range that have no file."""

    folder: Path
    files: Mapping[int, Path]
    missing: tuple[int, ...]

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], dense: Dense, first: int | None = None, last: int | None = None
    ) -> RetrainedLayers:
        """Raises `UserError` where the folder holds no layer in the range, another model's, or one whose shapes do not fit."""
        folder = Path(folder)
        blocks = blocks_of(dense.layout)
        files = layer_files(folder)
        if not files:
            raise UserError(f"{folder} holds no retrained layers: expected files such as 0.safetensors in it.")
        low = 0 if first is None else first
        high = max(files) if last is None else last
        if not 0 <= low <= high < len(blocks):
            raise UserError(f"Layers {low} to {high} are asked for, but {dense.source} has blocks 0 to {len(blocks) - 1}.")
        chosen = {place: path for place, path in files.items() if low <= place <= high}
        if not chosen:
            raise UserError(f"{folder} holds no layer from {low} to {high}; it has {', '.join(map(str, files))}.")
        for place, path in chosen.items():
            _check(path, blocks[place], dense)
        return cls(folder, chosen, tuple(place for place in range(low, high + 1) if place not in chosen))

    def describe_missing(self, layout: Layout) -> str:
        """A sentence about the missing layers, or nothing."""
        names = [blocks_of(layout)[place].title for place in self.missing]
        return f"{self.folder} has no file for {', '.join(names)}: left dense." if names else ""


def _check(path: Path, block: Block, dense: Dense) -> None:
    """Raises `UserError` where the file is no layer that can stand in for `block`."""
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        shapes = {canonical_key(key): tuple(file.get_slice(key).get_shape()) for key in file.keys() if not key.startswith(KEPT)}
    if header.get("format") == FORMAT:
        found = Fingerprint.from_json(header["model"])
        if not found.matches(dense.fingerprint):
            raise UserError(
                f"{path} was trained for another model than {dense.source}: {found.difference(dense.fingerprint)}. Choose the "
                "checkpoint it was made from, or retrain."
            )
    prefix = f"{'single' if block.kind == 'single' else 'double'}_blocks.{block.index}."
    sites = [site for site in dense.layout.sites if site.block == prefix.removesuffix(".")]
    widths: dict[str, set[int]] = {site.name: set() for site in sites}
    for key, shape in shapes.items():
        if key.endswith(("scale_weight", "weight_scale")):
            continue
        if prefix + key not in dense.tensors:
            raise UserError(f"{path} has {key}, which {block.title} of {dense.source} has not: it is no layer of such a model.")
        expected = shape_of(dense.tensors, prefix + key)
        site, part = _part_of(prefix + key, sites)
        if site is None:
            fits = shape == expected
        elif part == "up":
            ratio = 2 if site.gated else 1
            fits = shape[1:] == expected[1:] and (shape[0] - site.up_row) % ratio == 0
            widths[site.name].add((shape[0] - site.up_row) // ratio)
        elif part == "down":
            fits = len(shape) == 2 and shape[0] == expected[0]
            widths[site.name].add(shape[1] - site.down_column)
        else:
            fits = shape == expected
        if not fits:
            raise UserError(
                f"{path}: {key} has the shape {shape}, {block.title} of {dense.source} {expected}: the layer does not fit."
            )
    for name, found_widths in widths.items():
        if len(found_widths) > 1 or any(width < 1 for width in found_widths):
            raise UserError(
                f"{path}: the projections of {name} disagree about its width ({sorted(found_widths)}): it is damaged."
            )


class Replaced(Mapping[str, Tensor]):
    """The tensors of `dense` with the retrained layers in place; each is read when it is asked for.

    Weights come back in what `dense` stores them as, with new scales where it has any.
    """

    def __init__(self, dense: Dense, layers: RetrainedLayers):
        self.dense, self.layers = dense, layers
        self._file_of: dict[str, tuple[Path, str]] = {}
        for place, path in layers.files.items():
            block = blocks_of(dense.layout)[place]
            prefix = f"{'single' if block.kind == 'single' else 'double'}_blocks.{block.index}."
            with open_safetensors(path) as file:
                for key in file.keys():
                    if not key.startswith(KEPT) and not key.endswith(("scale_weight", "weight_scale")):
                        self._file_of[prefix + canonical_key(key)] = path, key

    def __iter__(self) -> Iterator[str]:
        return iter(self.dense.tensors)

    def __len__(self) -> int:
        return len(self.dense.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.dense.tensors

    def __getitem__(self, key: str) -> Tensor:
        weight_key = self._scaled.get(key, key)
        if weight_key not in self._file_of:
            return self.dense.tensors[key]
        value = self._read(*self._file_of[weight_key])
        if not weight_key.endswith(".weight"):
            return value.to(self.dense.tensors[key].dtype)
        like = {weight_key: self.dense.tensors[weight_key]}
        scale = scale_key(self.dense.tensors, weight_key)
        if scale is not None:
            old = self.dense.tensors[scale]
            like[scale] = old if old.numel() == 1 else old[: len(value)]
        weight, new_scale = stored_like(value, like, weight_key)
        return weight if key == weight_key or new_scale is None else new_scale

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Type (in safetensors' words) and shape of a tensor, read from the header alone where it is the dense one's."""
        tensors = self.dense.tensors
        if self._scaled.get(key, key) not in self._file_of and isinstance(tensors, Checkpoint):
            return tensors.dtype(key), tensors.shape(key)
        return kind_of(self[key])

    @property
    def masked_count(self) -> str:
        """How many neurons are gone, by stream: "img{n}_txt{n}_single{n}"."""
        gone = {"img": 0, "txt": 0, "single": 0}
        for site in self.dense.layout.sites:
            key = f"{site.down}.weight"
            if key in self._file_of:
                path, name = self._file_of[key]
                with open_safetensors(path) as file:
                    gone[site.stream] += site.width - (file.get_slice(name).get_shape()[1] - site.down_column)
        return "_".join(f"{stream}{count}" for stream, count in gone.items())

    @cached_property
    def _scaled(self) -> dict[str, str]:
        """Keys of the dense scales of replaced weights, and those weights."""
        found = {}
        for key in self._file_of:
            scale = scale_key(self.dense.tensors, key) if key.endswith(".weight") else None
            if scale is not None:
                found[scale] = key
        return found

    def _read(self, path: Path, key: str) -> Tensor:
        with open_safetensors(path) as file:
            there = set(file.keys())
            layer = key.removesuffix(".weight")
            names = [key, *(name for name in (f"{layer}.scale_weight", f"{layer}.weight_scale") if name in there)]
            tensors = {name: file.get_tensor(name) for name in names}
        return full_precision(tensors, key) if key.endswith(".weight") else tensors[key].float()


def save_replaced(
    path: str | os.PathLike[str], replaced: Replaced, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Writes one checkpoint that needs no other file, one tensor in memory at a time; `progress` is told after each."""
    kinds = {key: replaced.kind(key) for key in replaced}
    files = {str(place): file.name for place, file in replaced.layers.files.items()}
    header = {**replaced.dense.metadata, "format": FORMAT_REPLACED, "replaced": json.dumps(files)}
    done = 0

    def tensor(key: str) -> Tensor:
        nonlocal done
        value = replaced[key]
        done += 1
        if progress is not None:
            progress(key, done, len(kinds))
        return value

    stream_safetensors(path, kinds, tensor, header)


def _part_of(key: str, sites: list[Site]) -> tuple[Site | None, str]:
    """The MLP that a tensor belongs to, and as what."""
    for site in sites:
        if key.startswith(f"{site.up}."):
            return site, "up"
        if key.startswith(f"{site.down}."):
            return site, "down" if key.endswith(".weight") else "bias"
    return None, ""
