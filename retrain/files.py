"""`retrained_layers/`: a folder with one file per retrained block.

    write_layer(folder, layer)                       # 3.safetensors, layer_stats.yaml
    draw_stats(folder)                               # layer_stats.png

`{n}.safetensors` holds the changed tensors of block n, keyed relative to the block ("img_mlp.0.weight"); single blocks count on
from the double ones. 8-bit weights stand beside a `scale_weight` each, and `flux_poke.kept.S` int32 are the kept neurons of
site S. The header has the block's part of the plan, with the dense model's fingerprint, and what is known of the training. How
such a folder takes the place of dense layers is in `replaced.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ..files import locked, replacing, write_safetensors, write_text
from ..flux.blocks import blocks_of, sites_at
from ..flux.checkpoint import open_safetensors
from ..pruning.dense import KEPT, Dense
from ..pruning.plan import PruningPlan
from .stats import LayerStats, stats_figure
from .trainable import stored

FORMAT = "flux-poke retrained layer 1"
STATS, PICTURE = "layer_stats.yaml", "layer_stats.png"


@dataclass(frozen=True)
class Layer:
    """One retrained block: its changed tensors (keys relative to the block, float32), its part of the plan, and its story.

    `made` tells one way of making it from another: model, plan, data, options.
    """

    place: int
    tensors: Mapping[str, Tensor]
    plan: PruningPlan
    stats: LayerStats
    made: str

    @classmethod
    def of(
        cls, dense: Dense, plan: PruningPlan, place: int, tensors: Mapping[str, Tensor], stats: LayerStats, made: str
    ) -> Layer:
        """The block's share of `tensors` (canonical keys)."""
        prefix = f"{blocks_of(dense.layout)[place].path}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return cls(place, own, plan.part({site.name for site in sites_at(dense.layout, place)}), stats, made)


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
    tensors |= {f"{KEPT}{name}": indices.int() for name, indices in layer.plan.kept.items()}
    about = {"format": FORMAT, "made": layer.made, "stats": json.dumps(asdict(layer.stats))}
    with locked(folder / STATS):
        write_safetensors(folder / f"{layer.place}.safetensors", tensors, {**layer.plan.header(), **about})
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


def layer_files(folder: Path) -> dict[int, Path]:
    """The layers in a folder, by place, ascending."""
    found = {int(path.stem): path for path in folder.glob("*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def read_header(path: Path) -> dict[str, str]:
    with open_safetensors(path) as file:
        return file.metadata() or {}


def made_before(folder: Path, places: Iterable[int], made: str) -> list[LayerStats] | None:
    """The stats of the layers at `places`, if they are all there and were made in that very way; else None."""
    files = layer_files(folder)
    headers = [read_header(files[place]) if place in files else {} for place in places]
    if any(header.get("made") != made for header in headers):
        return None
    return [LayerStats(**json.loads(header["stats"])) for header in headers]
