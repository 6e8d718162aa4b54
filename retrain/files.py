"""`retrained_layers/`: a folder with one file per retrained block of one plan.

    output = Output(folder, cut, options, "rows", digest)            # nothing of another plan or another kind is in there
    key = output.key([3])
    stats = output.finished([3], key) or output.write([3], key, trained, ...)    # 3.safetensors, layer_stats.yaml
    print(stats_table(read_stats(folder)))
    draw_stats(folder)                               # layer_stats.png

`{n}.safetensors` holds the changed tensors of block n, keyed relative to the block ("img_mlp.0.weight"); single blocks count on
from the double ones. 8-bit weights stand beside a `scale_weight` each, and `flux_poke.kept.S` int32 are the kept neurons of
site S. Modulation layers that the plan truncates stand there as in a pruned checkpoint ("img_mod.lin.down.weight", `.up.weight`
and `.bias`), in the dense model's precision whatever the MLPs are saved in. The header has the block's part of the plan, with
the dense model's fingerprint, `plan_digest` of the whole plan, and what is known of the training. How such a folder takes the
place of dense layers is in `replaced.py`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor

from ..analysis.charts import line_chart
from ..errors import UserError
from ..files import locked, write_picture, write_safetensors, write_text
from ..flux.blocks import blocks_of, sites_at
from ..flux.checkpoint import open_safetensors
from ..parsing import from_json
from ..pruning.cache import cache_key
from ..pruning.dense import KEPT, Dense
from ..pruning.plan import PruningPlan
from ..pruning.surgery import Cut
from .loop import Trained
from .options import Options, stored

FORMAT = "flux-poke retrained layer 1"
STATS, PICTURE = "layer_stats.yaml", "layer_stats.png"
ERROR = "relative squared error, held-out images"


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
    def kept(self) -> list[int]:
        """Neurons kept, by stream."""
        return [count for count in (self.img_lines, self.txt_lines, self.single_lines) if count is not None]

    @classmethod
    def read(cls, path: Path) -> LayerStats | None:
        """Of the layer in a file, None where it is the original flux-poke's; raises `UserError` where it is damaged."""
        header = read_header(path)
        if "stats" not in header:
            return None
        try:
            return cls(**from_json(header["stats"]))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is a damaged retrained layer ({error}): remove it, and retrain it.") from error


class Output:
    """The folder of one training; a layer that it made before, in the very same way, is known again by its `key`.

    `cut` is what training starts from, `made_of` what else the layers depend on. Raises `UserError` where something else stands
    in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], cut: Cut, options: Options, data: str, *made_of: str):
        self.dense, self.plan, truncated = cut.dense, cut.plan, cut.repairs.low_ranks.digest
        if not options.just_evaluate:
            require_own_folder(folder, self.plan)
        self.folder, self.cut, self.options, self.data = Path(folder), cut, options, data
        described = str(replace(options, device="", tensorboard=None))
        self._made_of = cache_key(self.dense.fingerprint.to_json(), self.plan.digest, described, *made_of, truncated)

    def key(self, block_indices: Sequence[int]) -> str:
        """Tells one way of making the layers of these blocks from another."""
        return cache_key(self._made_of, str(block_indices))

    def saved(self, key: str, name: str) -> Path:
        """Where the state of a training in progress is kept."""
        return self.folder / f".{name}.{key}.training.safetensors"

    def finished(self, block_indices: Sequence[int], key: str) -> list[LayerStats] | None:
        """The stats of layers that were made before; None where that is not all of them, or nothing is to be written."""
        if self.options.just_evaluate:
            return None
        files = layer_files(self.folder)
        paths = [files[index] for index in block_indices if index in files and read_header(files[index]).get("key") == key]
        stats = [stats for path in paths if (stats := LayerStats.read(path)) is not None]
        if len(stats) < len(block_indices):
            return None
        with locked(self.folder / STATS):
            self._list()  # a run that was killed may not have come to it
        return stats

    def write(
        self, block_indices: Sequence[int], key: str, trained: Trained, method: str, start: str, begun: float
    ) -> list[LayerStats]:
        """A layer for each block, whose losses are those of all of them together; nothing is written by `just_evaluate`.

        Raises `UserError` where a number is not finite as it would be saved.
        """
        seconds, settings = round(time.monotonic() - begun, 3), self.plan.settings
        thresholds = settings if settings.get("by") == "threshold" else {}
        stats = []
        for index in block_indices:
            sites = sites_at(self.dense.layout, index)
            lines = {site.stream: len(self.plan.kept.get(site.name, range(site.width))) for site in sites}
            layer = LayerStats(
                layer=index, name=blocks_of(self.dense.layout)[index].name,
                img_lines=lines.get("img"), txt_lines=lines.get("txt"), single_lines=lines.get("single"),
                img_threshold=thresholds.get("img"), txt_threshold=thresholds.get("txt"),
                initial_loss=trained.cut.mse, final_loss=trained.final.mse,
                train_loss=trained.train.mse if trained.train else None, relative_cut=trained.cut.relative,
                relative_start=trained.start.relative, relative_final=trained.final.relative,
                method=method, data=self.data, steps=trained.steps, seconds=seconds,
                held_out_images=sorted(trained.images), save_dtype=self.options.save_dtype,
                together=list(block_indices), start=start,
            )  # fmt: skip
            if not self.options.just_evaluate:
                self._write_layer(layer, key, trained.tensors)
            stats.append(layer)
        return stats

    def _write_layer(self, layer: LayerStats, key: str, tensors: Mapping[str, Tensor]) -> None:
        """The layer's share of `tensors` (canonical keys), its truncated modulation, and the stats of all in the folder."""
        prefix, dtype = f"{blocks_of(self.dense.layout)[layer.layer].path}.", self.options.dtype
        plan = self.plan.part({site.name for site in sites_at(self.dense.layout, layer.layer)})
        found = {f"{KEPT}{name}": indices.int() for name, indices in plan.kept.items()}
        found |= {key.removeprefix(prefix): self.cut[key] for key in self.cut.thin if key.startswith(prefix)}
        for name in [name for name in tensors if name.startswith(prefix)]:
            own, wide = name.removeprefix(prefix), tensors[name].ndim > 1 or dtype.itemsize > 1
            found[own], scale = stored(tensors[name], dtype if wide else torch.bfloat16)
            if not found[own].float().isfinite().all():
                raise UserError(
                    f"{layer.name}: {own} holds numbers that are not finite as {layer.save_dtype}: choose another save dtype, "
                    "or a lower learning rate."
                )
            if scale is not None:
                found[f"{own.removesuffix('.weight')}.scale_weight"] = scale
        about = {"format": FORMAT, "key": key, "plan_digest": self.plan.digest, "stats": json.dumps(asdict(layer))}
        header = {**self.options.graph, **plan.header(), **about}
        with locked(self.folder / STATS):
            write_safetensors(self.folder / f"{layer.layer}.safetensors", found, header)
            self._list()

    def _list(self) -> None:
        """Writes down the stats of all layers in the folder, unless they are."""
        text, path = stats_text(read_stats(self.folder)), self.folder / STATS
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text(path, text)


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


def read_stats(folder: Path) -> list[LayerStats]:
    """Of all layers in `folder` that this program trained, from their headers."""
    found = (LayerStats.read(path) for path in layer_files(folder).values())
    return [stats for stats in found if stats is not None]


def stats_text(stats: Sequence[LayerStats]) -> str:
    """What `layer_stats.yaml` holds."""
    content = {f"layer{layer.layer}": asdict(layer) for layer in stats}
    return yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


def layer_files(folder: Path) -> dict[int, Path]:
    """The layers in a folder, by block index, ascending."""
    found = {int(path.stem): path for path in folder.glob("*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def cut_blocks(dense: Dense, plan: PruningPlan) -> list[int]:
    """Indices of the blocks that the plan cuts something of, ascending."""
    blocks, touched = range(len(blocks_of(dense.layout))), plan.kept.keys() | plan.ranks.keys()
    return [index for index in blocks if any(site.name in touched for site in sites_at(dense.layout, index))]


def read_header(path: Path) -> dict[str, str]:
    with open_safetensors(path) as file:
        return file.metadata() or {}


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
    for title, group in _groups(stats).items():
        layer = group[0]
        kept = " + ".join(map(str, layer.kept)) if len(group) == 1 else f"{sum(sum(each.kept) for each in group):,}"
        losses = f"{layer.relative_cut:>11.3g}{layer.relative_start:>11.3g}{layer.relative_final:>11.3g}"
        lines.append(f"{title:<24}{kept:>16}{losses}{layer.steps:>7}{layer.seconds:>9.1f}")
    starts = {layer.start for layer in stats if layer.method == "distill"}
    return "\n".join([*lines, *(_STARTS[start] for start in sorted(starts & _STARTS.keys()))])


def stats_chart(stats: Sequence[LayerStats]) -> dict[str, Any]:
    """As `stats_figure`, for a page (`analysis/charts.py`)."""
    title, names, errors = _errors(stats)
    return line_chart(title, range(len(names)), errors, "", ERROR, labels=names, log=True)


def stats_figure(stats: Sequence[LayerStats]) -> Figure:
    """Held-out error of every layer, or group of layers that were trained together: as cut, as training began, at the end."""
    title, groups, errors = _errors(stats)
    figure = Figure(figsize=(max(6.0, 0.45 * len(groups) + 2), 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (label, values), color in zip(errors.items(), ("tab:blue", "tab:orange", "tab:gray"), strict=True):
        axes.plot(range(len(groups)), values, "o-", color=color, label=label)
    axes.set(yscale="log", ylabel=ERROR, title=title)
    axes.set_xticks(range(len(groups)), groups, rotation=90 if len(groups) > 4 else 0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_stats(folder: str | os.PathLike[str]) -> Path | None:
    """The picture of all layers in the folder; None where there are none."""
    stats, path = read_stats(Path(folder)), Path(folder) / PICTURE
    if not stats:
        return None
    write_picture(path, stats_figure(stats))
    return path


def _errors(stats: Sequence[LayerStats]) -> tuple[str, list[str], dict[str, list[float]]]:
    """A title, what layers or groups of them are called, and their errors by when they were measured."""
    groups = _groups(stats)
    measured = {"retrained": "relative_final", "as training began": "relative_start", "as cut": "relative_cut"}
    errors = {label: [getattr(group[0], name) for group in groups.values()] for label, name in measured.items()}
    return "Before and after retraining" + (", layer by layer" if len(groups) > 1 else ""), list(groups), errors


def _groups(stats: Sequence[LayerStats]) -> dict[str, list[LayerStats]]:
    """Layers whose losses are those of all of them together, and each other one by itself, by what to call them."""
    groups: dict[tuple[int, ...], list[LayerStats]] = {}
    for layer in stats:
        groups.setdefault(tuple(layer.together) or (layer.layer,), []).append(layer)
    return {" to ".join(dict.fromkeys((group[0].name, group[-1].name))): group for group in groups.values()}
