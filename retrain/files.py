"""`retrained_layers/`: a folder with one file per retrained block of one plan.

    require_own_folder(folder, plan)                 # before any work: nothing of another plan or another kind is in there
    write_layer(folder, layer)                       # 3.safetensors, layer_stats.yaml
    print(stats_table(read_stats(folder)))
    draw_stats(folder)                               # layer_stats.png

`{n}.safetensors` holds the changed tensors of block n, keyed relative to the block ("img_mlp.0.weight"); single blocks count on
from the double ones. 8-bit weights stand beside a `scale_weight` each, and `flux_poke.kept.S` int32 are the kept neurons of
site S. The header has the block's part of the plan, with the dense model's fingerprint, `plan_digest` of the whole plan, and
what is known of the training. How such a folder takes the place of dense layers is in `replaced.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import UserError
from ..files import locked, replacing, write_safetensors, write_text
from ..flux.blocks import blocks_of, sites_at
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Layout
from ..pruning.dense import KEPT, Dense
from ..pruning.plan import PruningPlan
from .loop import Losses
from .options import Options, stored

FORMAT = "flux-poke retrained layer 1"
STATS, PICTURE = "layer_stats.yaml", "layer_stats.png"


@dataclass(frozen=True)
class LayerStats:
    """What became of one layer. Losses ending in `_loss` are plain squared errors, as the original's; `relative_` ones are
    divided by the mean square of what is to be predicted: as cut, as training began, at the end.

    `lines` are neurons kept, by stream; thresholds are those of the plan, if it was made by any. `together` are the layers
    that the losses are of, this one among them; `start` is what training started from: "cut", "closed form", "bias repair" or
    "affine repair".
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
    together: list[int] = field(default_factory=list)
    start: str = "cut"

    @property
    def kept(self) -> int:
        return sum(count for count in (self.img_lines, self.txt_lines, self.single_lines) if count is not None)

    @classmethod
    def of(
        cls,
        dense: Dense,
        plan: PruningPlan,
        block_index: int,
        options: Options,
        losses: Losses,
        seconds: float,
        images: Set[int],
        **more: Any,
    ) -> LayerStats:
        """Of a block that `plan` cuts; `images` are those held out, `more` are the other fields."""
        sites = sites_at(dense.layout, block_index)
        lines: dict[str, Any] = {"img_lines": None, "txt_lines": None, "single_lines": None}
        lines |= {f"{site.stream}_lines": len(plan.kept.get(site.name, range(site.width))) for site in sites}
        thresholds = plan.settings if plan.settings.get("by") == "threshold" else {}
        return cls(
            layer=block_index,
            name=blocks_of(dense.layout)[block_index].name,
            **lines,
            img_threshold=thresholds.get("img"),
            txt_threshold=thresholds.get("txt"),
            initial_loss=losses.cut.mse,
            final_loss=losses.final.mse,
            train_loss=losses.train.mse if losses.train else None,
            relative_cut=losses.cut.relative,
            relative_start=losses.start.relative,
            relative_final=losses.final.relative,
            steps=losses.steps,
            seconds=round(seconds, 3),
            held_out_images=sorted(images),
            save_dtype=options.save_dtype,
            **more,
        )

    @classmethod
    def read(cls, path: Path) -> LayerStats | None:
        """Of the layer in a file, None where it is the original flux-poke's; raises `UserError` where it is damaged."""
        header = read_header(path)
        if "stats" not in header:
            return None
        try:
            return cls(**json.loads(header["stats"]))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is a damaged retrained layer ({error}): remove it, and retrain it.") from error


@dataclass(frozen=True)
class Layer:
    """One retrained block: its changed tensors (keys relative to the block, float32), its part of the plan, and its stats.

    `plan_digest` is the whole plan's. `key` tells one way of making it from another: model, plan, data, options.
    """

    block_index: int
    tensors: Mapping[str, Tensor]
    plan: PruningPlan
    plan_digest: str
    stats: LayerStats
    key: str

    @classmethod
    def of(
        cls, dense: Dense, plan: PruningPlan, block_index: int, tensors: Mapping[str, Tensor], stats: LayerStats, key: str
    ) -> Layer:
        """The block's share of `tensors` (canonical keys)."""
        prefix = f"{blocks_of(dense.layout)[block_index].path}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        part = plan.part({site.name for site in sites_at(dense.layout, block_index)})
        return cls(block_index, own, part, plan.digest, stats, key)


def default_folder(plan: PruningPlan) -> str:
    """A name for the folder of a plan's layers; another one for every plan."""
    return f"retrained_layers/{plan.digest[:8]}"


def require_own_folder(folder: str | os.PathLike[str], plan: PruningPlan) -> None:
    """Raises `UserError` where `folder` is a file, or holds layers of another plan or other safetensors files: what is written
    there would replace them, or be taken for one model with them."""
    folder = Path(folder)
    advice = f"Choose another folder, such as {default_folder(plan)}."
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder is needed for the layers. {advice}")
    files = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(".")]
    for path in files:
        header = read_header(path)
        if header.get("format") != FORMAT:
            found = header.get("format", "a safetensors file of another kind")
            raise UserError(f"{path} is not a layer of this plan: expected '{FORMAT}', found '{found}'. {advice}")
        if header.get("plan_digest") != plan.digest:
            raise UserError(f"{path} was retrained for another plan, and layers of two plans do not go together. {advice}")
    if not files and (folder / STATS).exists():
        raise UserError(f"{folder / STATS} tells of layers that are not there: it would be replaced. {advice}")


def write_layer(folder: str | os.PathLike[str], layer: Layer) -> None:
    """Writes the layer's file, then the stats of all layers in the folder; raises `UserError` where a number is not finite as
    it would be saved."""
    folder = Path(folder)
    dtype = getattr(torch, layer.stats.save_dtype)
    tensors: dict[str, Tensor] = {}
    for key, tensor in layer.tensors.items():
        value, scale = stored(tensor, dtype if tensor.ndim > 1 or dtype.itemsize > 1 else torch.bfloat16)
        if not value.float().isfinite().all():
            raise UserError(
                f"{layer.stats.name}: {key} holds numbers that are not finite as {layer.stats.save_dtype}: choose another save "
                "dtype, or a lower learning rate."
            )
        tensors[key] = value
        if scale is not None:
            tensors[f"{key.removesuffix('.weight')}.scale_weight"] = scale
    tensors |= {f"{KEPT}{name}": indices.int() for name, indices in layer.plan.kept.items()}
    about = {"key": layer.key, "plan_digest": layer.plan_digest, "stats": json.dumps(asdict(layer.stats))}
    with locked(folder / STATS):
        path = folder / f"{layer.block_index}.safetensors"
        write_safetensors(path, tensors, {**layer.plan.header(), **about, "format": FORMAT})
        write_stats(folder)


def read_stats(folder: Path) -> list[LayerStats]:
    """Of all layers in `folder` that this program trained, from their headers."""
    found = (LayerStats.read(path) for path in layer_files(folder).values())
    return [stats for stats in found if stats is not None]


def write_stats(folder: Path) -> None:
    """`layer_stats.yaml`, made anew from the layers, so that it cannot fall behind them."""
    content = {f"layer{layer.layer}": asdict(layer) for layer in read_stats(folder)}
    write_text(folder / STATS, yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False))


def layer_files(folder: Path) -> dict[int, Path]:
    """The layers in a folder, by block index, ascending."""
    found = {int(path.stem): path for path in folder.glob("*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def read_header(path: Path) -> dict[str, str]:
    with open_safetensors(path) as file:
        return file.metadata() or {}


def finished_stats(folder: Path, block_indices: Sequence[int], key: str) -> list[LayerStats] | None:
    """The stats of the layers of these blocks, if they are all there and were made in the way that `key` tells; else None."""
    files = layer_files(folder)
    paths = [files[index] for index in block_indices if index in files and read_header(files[index]).get("key") == key]
    stats = [stats for path in paths if (stats := LayerStats.read(path)) is not None]
    return stats if len(stats) == len(block_indices) else None


def cut_blocks(layout: Layout, plan: PruningPlan) -> set[int]:
    """Indices of the blocks that the plan cuts something of."""
    blocks = range(len(blocks_of(layout)))
    return {index for index in blocks if any(site.name in plan.kept for site in sites_at(layout, index))}


_STARTS = {
    "affine repair": "Training started from affine repair.",
    "bias repair": "Training started from repaired biases, since the recording holds no rows: with rows it starts nearer.",
    "cut": "Training started from the cut without repair, since the recording holds neither rows nor internals: with rows it "
    "starts much nearer.",
}


def stats_table(stats: Sequence[LayerStats]) -> str:
    """Text, one line per layer, or per group of layers that were trained together: neurons kept, and the relative held-out
    losses as cut, as training began, at the end."""
    lines = [f"{'layer':<24}{'kept':>16}{'cut only':>11}{'start':>11}{'retrained':>11}{'steps':>7}{'seconds':>9}"]
    for group in _groups(stats):
        layer = group[0]
        kept = " + ".join(str(n) for n in (layer.img_lines, layer.txt_lines, layer.single_lines) if n is not None)
        if len(group) > 1:
            kept = f"{sum(each.kept for each in group):,}"
        losses = (layer.relative_cut, layer.relative_start, layer.relative_final)
        lines.append(
            f"{_title(group):<24}{kept:>16}"
            + "".join(f"{loss:>11.3g}" for loss in losses)
            + f"{layer.steps:>7}{layer.seconds:>9.1f}"
        )
    starts = {layer.start for layer in stats if layer.method == "distill"}
    return "\n".join([*lines, *(_STARTS[start] for start in sorted(starts & _STARTS.keys()))])


def stats_figure(stats: Sequence[LayerStats]) -> Figure:
    """Held-out error of every layer, or group of layers that were trained together: as cut, as training began, at the end."""
    groups = _groups(stats)
    figure = Figure(figsize=(max(6.0, 0.45 * len(groups) + 2), 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, color in (
        ("relative_cut", "as cut", "tab:gray"),
        ("relative_start", "as training began", "tab:orange"),
        ("relative_final", "retrained", "tab:blue"),
    ):
        axes.plot(range(len(groups)), [getattr(group[0], name) for group in groups], "o-", color=color, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(groups)), [_title(group) for group in groups], rotation=90 if len(groups) > 4 else 0)
    axes.set_ylabel("relative squared error, held-out images")
    axes.set_title("Before and after retraining, layer by layer" if len(groups) > 1 else "Before and after retraining")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_stats(folder: str | os.PathLike[str]) -> Path | None:
    """The picture of all layers in the folder; None where there are none."""
    stats = read_stats(Path(folder))
    if not stats:
        return None
    path = Path(folder) / PICTURE
    with replacing(path) as new:
        stats_figure(stats).savefig(new, format="png", dpi=110)
    return path


def _groups(stats: Sequence[LayerStats]) -> list[list[LayerStats]]:
    """Layers whose losses are those of all of them together; each other one by itself."""
    groups: dict[tuple[int, ...], list[LayerStats]] = {}
    for layer in stats:
        groups.setdefault(tuple(layer.together) or (layer.layer,), []).append(layer)
    return list(groups.values())


def _title(group: Sequence[LayerStats]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"
