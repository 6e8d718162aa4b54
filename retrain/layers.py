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
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.blocks import blocks_of, choose_blocks, sites_at
from ..flux.layout import Layout, Site
from ..flux.weights import SiteWeights, full_precision
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.refit import Repaired
from ..pruning.scores import require_rows
from ..pruning.surgery import Cut
from ..recording.block_states import BlockStates
from ..recording.store import MANIFEST, HiddenStates, Manifest
from .best import Losses, closed_form, together, train_best
from .blocks import BlockProblem, Chain
from .files import Layer, made_before, write_layer
from .options import Options, Progress, Report
from .replaced import Replaced, RetrainedLayers
from .rows import ROWS_PER_SAMPLE, RowProblem
from .stats import LayerStats, cut_places, plan_stats
from .trainable import mlp_parameters

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
    touched = cut_places(dense.layout, plan)
    groups = [group for group in grouped(choose_layers(layers, dense.layout), options.thickness) if touched & {*group}]
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


class _Trainer:
    """What both kinds of data have in common: where layers go, and how one that was made before is known again."""

    data_name: str

    def __init__(self, dense: Dense, plan: PruningPlan, digest: str, options: Options, folder: Path):
        self.dense, self.plan, self.options, self.folder = dense, plan, options, folder
        self.cut = Cut(dense, plan)
        different = {"device": "", "tensorboard": None, "just_evaluate": False}
        described = {name: value for name, value in asdict(options).items() if name not in different}
        self._key = json.dumps([dense.fingerprint.to_json(), plan.digest, digest, described], sort_keys=True)

    def made(self, group: range) -> str:
        return hashlib.sha256(f"{self._key} {group}".encode()).hexdigest()[:16]

    def done(self, group: range) -> list[LayerStats] | None:
        """The stats of layers that were made before, in the very same way; None where that is not all of them."""
        return None if self.options.just_evaluate else made_before(self.folder, group, self.made(group))

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

    def stats(self, place: int, losses: Losses, seconds: float, images: Set[int]) -> LayerStats:
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


class _OnBlocks(_Trainer):
    """Whole blocks, on block states."""

    data_name = "block states"

    def __init__(self, dense: Dense, plan: PruningPlan, states: BlockStates, options: Options, folder: Path):
        states.require(dense.fingerprint, dense.layout.hidden, dense.source)
        super().__init__(dense, plan, states.digest, options, folder)
        self.states = states
        self.before: list[Chain] = []

    def made(self, group: range) -> str:
        """In sequential training, where the retrained blocks begin that lead up to the group is part of it."""
        return super().made(range(self.before[0].places.start, group.stop) if self.before else group)

    def done(self, group: range) -> list[LayerStats] | None:
        if self.before and self.before[-1].places.stop != group.start:
            self.before.clear()  # across a gap it goes on from the recorded states
        stats = super().done(group)
        if stats:
            self._follow(group)
        return stats

    def retrain(self, group: range, report: Report) -> list[LayerStats]:
        begun = time.monotonic()
        options = self.options
        student = Chain.load(self.cut, group, options.device)
        name = "_".join(blocks_of(self.dense.layout)[place].name for place in group)
        problem = BlockProblem(name, student, self.states, options, self.before)
        keys = mlp_parameters(student, student.sites)
        losses = train_best(problem, keys, lambda: self._closed_form(problem), options, self.state_file(group, name), report)
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
        super().__init__(dense, plan, rows.digest("rows", "amplification"), options, folder)
        self.rows = rows

    def retrain(self, group: range, report: Report) -> list[LayerStats]:
        begun = time.monotonic()
        sites = [site for site in sites_at(self.dense.layout, group.start) if site.name in self.plan.kept]
        store = require_rows(self.rows, self.dense, sites, "retraining on rows")
        options = replace(self.options, batch=self.options.batch * ROWS_PER_SAMPLE)
        tensors: dict[str, Tensor] = {}
        found: list[Losses] = []
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
            found.append(train_best(problem, keys, start, options, self.state_file(group, site.name), report))
            tensors |= self._tensors(site, problem.module.site_weights())
        stats = self.stats(group.start, together(found), time.monotonic() - begun, held_out)
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


def _down(site: Site, repaired: Repaired) -> dict[str, Tensor]:
    tensors = {f"{site.down}.weight": repaired.down}
    return tensors if repaired.bias is None else tensors | {f"{site.down}.bias": repaired.bias}
