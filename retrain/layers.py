"""Retraining layer by layer: one in memory at a time, each saved as soon as it is done.

    data = BlockStates.open(folder)                  # or HiddenStates.open(folder), for rows
    stats = retrain_layers(dense, plan, data, "0-18", Path("retrained_layers"), Options(), report)

A layer starts from the cut, or from the closed form on the same data (`pruning/refit.py`), and is trained from there. What is
saved is what did best on images that neither was fitted to, the start included. Called again after a kill, layers that are
done are not done again, and one that was under way goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..analysis.block_states import BlockStates
from ..analysis.blocks import blocks_of, choose_blocks
from ..analysis.hidden_states import MANIFEST, HiddenStates, Manifest, Rows
from ..errors import UserError
from ..flux.layout import Layout, Site
from ..pruning.dense import Dense
from ..pruning.moments import gather
from ..pruning.plan import PruningPlan
from ..pruning.refit import Repaired, affine, bias, choose
from ..pruning.scores import require_rows
from ..pruning.surgery import Cut
from ..pruning.weights import SiteWeights, full_precision
from .blocks import BlockProblem, Chain
from .files import Layer, LayerStats, Replaced, RetrainedLayers, block_sites, layer_files, plan_stats, read_header, write_layer
from .loop import Loss, fit, held_out_loss
from .options import Options, Progress, Report
from .rows import ROWS_PER_SAMPLE, RowProblem
from .trainable import mlp_parameters, rounded

Data = BlockStates | HiddenStates

#: Tokens that the closed form is fitted to, in units of the MLP's width.
ROWS_PER_NEURON = 8


def retrain_layers(
    dense: Dense,
    plan: PruningPlan,
    data: Data,
    layers: str,
    folder: str | os.PathLike[str],
    options: Options | None = None,
    report: Report | None = None,
) -> list[LayerStats]:
    """Retrains the chosen layers that `plan` cuts something of, one after the other, and writes them to `folder`.

    An exception from `report` cancels: finished layers stay. Raises `UserError` where plan, data and model do not belong
    together, or there is nothing to do.
    """
    options = options or Options()
    plan.require(dense)
    groups = [group for group in grouped(choose_layers(layers, dense.layout), options.thickness) if _cut_in(dense, plan, group)]
    if not groups:
        raise UserError(f"The plan cuts nothing of the layers {layers}: there is nothing to retrain. Choose other layers.")
    trainer: _OnBlocks | _OnRows
    if isinstance(data, BlockStates):
        trainer = _OnBlocks(dense, plan, data, options, Path(folder))
    else:
        trainer = _OnRows(dense, plan, data, options, Path(folder))
    stats: list[LayerStats] = []
    for number, group in enumerate(groups):

        def tell(progress: Progress, number: int = number) -> None:
            if report is not None:
                report(replace(progress, layers_done=number, layers=len(groups)))

        stats += trainer.done(group) or trainer.retrain(group, tell)
    return stats


def open_data(folder: str | os.PathLike[str], what: Literal["auto", "blocks", "rows"] = "auto") -> Data:
    """What is to be trained on; "auto" takes block states where there are any, else rows."""
    path = Path(folder) / MANIFEST
    if what == "auto":
        recorded = {shard.kind for shard in Manifest.load(Path(folder)).shards} if path.exists() else {"blocks"}
        what = "blocks" if "blocks" in recorded else "rows"
    return BlockStates.open(folder) if what == "blocks" else HiddenStates.open(folder)


def stats_table(stats: Sequence[LayerStats]) -> str:
    """Text, one line per layer: neurons kept, and the relative held-out losses as cut, as training began, at the end."""
    lines = [f"{'layer':<12}{'kept':>16}{'cut only':>11}{'start':>11}{'retrained':>11}{'steps':>7}{'seconds':>9}"]
    for layer in stats:
        kept = " + ".join(str(n) for n in (layer.img_lines, layer.txt_lines, layer.single_lines) if n is not None)
        losses = (layer.relative_cut, layer.relative_start, layer.relative_final)
        lines.append(
            f"{layer.name:<12}{kept:>16}"
            + "".join(f"{loss:>11.3g}" for loss in losses)
            + f"{layer.steps:>7}{layer.seconds:>9.1f}"
        )
    return "\n".join(lines)


def choose_layers(text: str, layout: Layout) -> tuple[int, ...]:
    """Places from numbers ("0-18", "0, 3, 7-9"; single blocks count on from the double ones) or names ("double 3, single").

    Raises `UserError` where that is neither, or outside of the model.
    """
    blocks = blocks_of(layout)
    if not re.fullmatch(r"[\d,\s-]+", text):
        return tuple(blocks.index(block) for block in choose_blocks(text, layout))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < len(blocks):
            raise UserError(
                f"Layers {text!r}: {part.strip()!r} is no layer of this model, which has 0 to {len(blocks) - 1} (single blocks "
                f"from {layout.depth} on). Write numbers and ranges such as 0-18, or names such as 'double 3, single'."
            )
        chosen |= set(range(first, last + 1))
    return tuple(sorted(chosen))


def grouped(places: Sequence[int], thickness: int) -> list[range]:
    """Runs of consecutive places, at most `thickness` long."""
    groups: list[range] = []
    for place in places:
        if groups and groups[-1].stop == place and len(groups[-1]) < thickness:
            groups[-1] = range(groups[-1].start, place + 1)
        else:
            groups.append(range(place, place + 1))
    return groups


def closed_form(weights: SiteWeights, kept: Tensor, fit_rows: Iterable[Rows], judge_rows: Iterable[Rows]) -> Repaired:
    """Least squares on some rows, with the ridge that does best on others; the bias alone where no ridge does better."""
    moments = gather(weights, fit_rows)
    found = choose(weights, kept, moments, judge_rows)
    if found.ridge is None:
        return bias(weights, kept, moments.mean[moments.attn :])
    return affine(weights, kept, moments, found.ridge)


class _Trainer:
    """What both kinds of data have in common: where layers go, and how one that was made before is known again."""

    data_name: str

    def __init__(self, dense: Dense, plan: PruningPlan, digest: str, options: Options, folder: Path):
        self.dense, self.plan, self.options, self.folder = dense, plan, options, folder
        self.cut = Cut(dense, plan)
        different = {"device": "", "tensorboard": None, "just_evaluate": False}
        described = {name: value for name, value in asdict(options).items() if name not in different}
        self._key = json.dumps([plan.digest, digest, described], sort_keys=True)

    def made(self, group: range) -> str:
        return hashlib.sha256(f"{self._key} {group}".encode()).hexdigest()[:16]

    def done(self, group: range) -> list[LayerStats] | None:
        """The stats of layers that were made before, in the very same way; None where that is not all of them."""
        files = layer_files(self.folder)
        headers = [read_header(files[place]) if place in files else {} for place in group]
        if self.options.just_evaluate or any(header.get("made") != self.made(group) for header in headers):
            return None
        return [LayerStats(**json.loads(header["stats"])) for header in headers]

    def state_file(self, group: range, name: str) -> Path:
        """Where a training in progress is kept."""
        return self.folder / f".{name}.{self.made(group)}.training.safetensors"

    def write(self, group: range, tensors: Mapping[str, Tensor], stats: Sequence[LayerStats]) -> None:
        """One file for each block of the group, and nothing left of trainings in progress."""
        if self.options.just_evaluate:
            return
        for place, layer in zip(group, stats, strict=True):
            write_layer(self.folder, Layer.of(self.dense, self.plan, place, tensors, layer, self.made(group)))
        for path in self.folder.glob(f".*.{self.made(group)}.training.safetensors*"):
            path.unlink()

    def stats(self, place: int, losses: _Losses, seconds: float, images: Set[int]) -> LayerStats:
        return LayerStats(
            layer=place,
            name=blocks_of(self.dense.layout)[place].name,
            **plan_stats(self.dense.layout, self.plan, place),
            initial_loss=losses.cut.mse,
            final_loss=losses.final.mse,
            train_loss=losses.train.mse if losses.train else None,
            relative_cut=losses.cut.relative,
            relative_start=losses.start.relative,
            relative_final=losses.final.relative,
            method=self.options.method,
            data=self.data_name,
            steps=losses.steps,
            seconds=round(seconds, 3),
            held_out_images=sorted(images),
            save_dtype=self.options.save_dtype,
        )


@dataclass(frozen=True)
class _Losses:
    """Held out: as cut, as training began, at the end; on the last training batch; and the steps in between."""

    cut: Loss
    start: Loss
    final: Loss
    train: Loss | None
    steps: int


class _OnBlocks(_Trainer):
    """Whole blocks, on block states."""

    data_name = "block states"

    def __init__(self, dense: Dense, plan: PruningPlan, states: BlockStates, options: Options, folder: Path):
        states.require(dense.fingerprint, dense.layout.hidden, dense.source)
        super().__init__(dense, plan, states.digest, options, folder)
        self.states = states
        self.before: list[Chain] = []

    def done(self, group: range) -> list[LayerStats] | None:
        stats = super().done(group)
        if stats:
            self._follow(group)
        return stats

    def retrain(self, group: range, report: Report) -> list[LayerStats]:
        begun = time.monotonic()
        options = self.options
        student = Chain.load(self.cut, group, options.device)
        if self.before and self.before[-1].places.stop != group.start:
            self.before.clear()
        name = "_".join(blocks_of(self.dense.layout)[place].name for place in group)
        problem = BlockProblem(name, student, self.states, options, self.before)
        keys = mlp_parameters(student, student.sites)
        losses = _trained(problem, keys, lambda: self._closed_form(problem), options, self.state_file(group, name), report)
        weights = student.state_dict()
        seconds = time.monotonic() - begun
        stats = [self.stats(place, losses, seconds, problem.images[1]) for place in group]
        self.write(group, {key: weights[key] for key in keys}, stats)
        self._follow(group)
        return stats

    def _closed_form(self, problem: BlockProblem) -> dict[str, Tensor]:
        """Repaired down projections and biases of the chain's cut MLPs."""
        sites = [site for site in problem.module.sites if site.name in self.plan.kept]
        dense = Chain.load(self.dense.tensors, problem.module.places, self.options.device)
        samples = sum(map(len, problem.train))
        each = -(-ROWS_PER_NEURON * max(site.width for site in sites) // samples)
        fitted, judged = (dense.rows(problem.inputs(part), each) for part in (problem.train, problem.judge))
        found: dict[str, Tensor] = {}
        for site in sites:
            weights = SiteWeights.read(self.dense.tensors, site, self.options.device)
            repaired = closed_form(weights, self.plan.kept[site.name], [fitted[site.name]], [judged[site.name]])
            found |= _down(site, repaired)
        return found

    def _follow(self, group: range) -> None:
        """In sequential training, the layer as it was saved comes before the next."""
        if self.options.sequential and not self.options.just_evaluate:
            replaced = Replaced(self.dense, RetrainedLayers.open(self.folder, self.dense, group.start, group[-1]))
            self.before.append(Chain.load(replaced, group, self.options.device))


class _OnRows(_Trainer):
    """One MLP after the other, on rows."""

    data_name = "rows"

    def __init__(self, dense: Dense, plan: PruningPlan, rows: HiddenStates, options: Options, folder: Path):
        if options.thickness > 1 or options.sequential:
            raise UserError("Rows train each MLP by itself: for thickness or sequential training, record block states.")
        super().__init__(dense, plan, rows.digest, options, folder)
        self.rows = rows

    def retrain(self, group: range, report: Report) -> list[LayerStats]:
        begun = time.monotonic()
        sites = [site for site in block_sites(self.dense.layout, group.start) if site.name in self.plan.kept]
        store = require_rows(self.rows, self.dense, sites, "retraining on rows")
        options = replace(self.options, batch=self.options.batch * ROWS_PER_SAMPLE)
        tensors: dict[str, Tensor] = {}
        found: list[_Losses] = []
        held_out: set[int] = set()
        for site in sites:
            weights = SiteWeights.read(self.dense.tensors, site, options.device)
            problem = RowProblem(weights, SiteWeights.read(self.cut, site, options.device), store, options)
            held_out |= problem.images[1]

            def start(site: Site = site, weights: SiteWeights = weights, problem: RowProblem = problem) -> dict[str, Tensor]:
                rows = (store.rows(site.name, set(images)) for images in problem.images)
                repaired = closed_form(weights, self.plan.kept[site.name], *rows)
                return {"down": repaired.down} | ({} if repaired.bias is None else {"bias": repaired.bias})

            keys = [name for name, _ in problem.module.named_parameters()]
            found.append(_trained(problem, keys, start, options, self.state_file(group, site.name), report))
            tensors |= self._tensors(site, problem.module.site_weights())
        stats = self.stats(group.start, _together(found), time.monotonic() - begun, held_out)
        self.write(group, tensors, [stats])
        return [stats]

    def _tensors(self, site: Site, weights: SiteWeights) -> dict[str, Tensor]:
        """Under the checkpoint's keys; in a single block with q, k and v as they are."""
        up, up_bias = weights.up, weights.up_bias
        if site.up_row:
            up = torch.cat((full_precision(self.dense.tensors, f"{site.up}.weight", up.device)[: site.up_row], up))
            if up_bias is not None:
                up_bias = torch.cat((self.dense.tensors[f"{site.up}.bias"][: site.up_row].to(up_bias), up_bias))
        down = weights.down if weights.attn is None else torch.cat((weights.attn, weights.down), dim=1)
        tensors = {f"{site.up}.weight": up, f"{site.down}.weight": down}
        biases = {f"{site.up}.bias": up_bias, f"{site.down}.bias": weights.bias}
        return tensors | {key: tensor for key, tensor in biases.items() if tensor is not None}


def _trained(
    problem: BlockProblem | RowProblem,
    keys: Sequence[str],
    start: Callable[[], Mapping[str, Tensor]],
    options: Options,
    saved: Path,
    report: Report,
) -> _Losses:
    """Closed form, then gradient, as the options say; leaves in the module what does best as it will be saved."""
    weights = dict(problem.module.named_parameters())

    def judged(values: Mapping[str, Tensor]) -> tuple[Loss, dict[str, Tensor]]:
        """The held-out loss with `values` as they will be saved, which the module holds from now on."""
        values = {key: rounded(tensor.detach(), options.dtype).float() for key, tensor in values.items()}
        problem.module.load_state_dict(values, strict=False)
        return held_out_loss(problem, options), values

    at_first, best = judged({key: weights[key] for key in keys})
    began, final, train, steps = at_first, at_first, None, 0
    if options.method != "gradient":
        loss, values = judged({**best, **start()})
        if loss.relative < final.relative:
            began, final, best = loss, loss, values
        problem.module.load_state_dict(best, strict=False)
    if options.method != "closed form" and not options.just_evaluate:
        fitted = fit(problem, began, options, saved, report)
        train, steps = fitted.train, fitted.steps
        loss, values = judged({key: weights[key] for key in keys})
        if loss.relative < final.relative:
            final, best = loss, values
    problem.module.load_state_dict(best, strict=False)
    return _Losses(at_first, began, final, train, steps)


def _together(losses: Sequence[_Losses]) -> _Losses:
    """Means over the MLPs of one block."""

    def mean(which: str) -> Loss:
        parts: list[Loss] = [getattr(one, which) for one in losses]
        relative, squares = tuple(part.relative for part in parts), tuple(square for part in parts for square in part.squares)
        return Loss(sum(relative) / len(parts), sum(part.mse for part in parts) / len(parts), relative, squares)

    trained = all(one.train is not None for one in losses)
    return _Losses(mean("cut"), mean("start"), mean("final"), mean("train") if trained else None, max(o.steps for o in losses))


def _cut_in(dense: Dense, plan: PruningPlan, group: range) -> bool:
    return any(site.name in plan.kept for place in group for site in block_sites(dense.layout, place))


def _down(site: Site, repaired: Repaired) -> dict[str, Tensor]:
    tensors = {f"{site.down}.weight": repaired.down}
    return tensors if repaired.bias is None else tensors | {f"{site.down}.bias": repaired.bias}
