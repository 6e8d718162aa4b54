"""Retraining what a plan leaves of a model: layer by layer, or all layers at once (`distill.py`).

    stats = retrain("both", dense, plan, recording, Path("retrained_layers"), layers="0-18", steps=400)

    data = BlockStates.open(folder)                  # or HiddenStates.open(folder), for rows
    stats = retrain_layers(dense, plan, data, "0-18", Path("retrained_layers"), Options())

One layer is in memory at a time, and is saved as soon as it is done. A layer starts from the cut, or from the closed form on
the same data (`pruning/refit.py`), and is trained from there. What is saved is what did best on images that neither was fitted
to, the start included. Called again after a kill, layers that are done are not done again, and one that was under way goes on.
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
from typing import Any, Literal, get_args

from torch import Tensor

from ..errors import UserError
from ..flux.blocks import blocks_of, choose_blocks, sites_at
from ..flux.layout import Layout, Site
from ..flux.weights import SiteWeights
from ..progress import Progress, part, silent
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.planning import require_device
from ..pruning.scores import require_rows
from ..pruning.surgery import Cut
from ..recording.block_states import BlockStates
from ..recording.recording import Recording
from ..recording.store import HiddenStates
from .blocks import BlockProblem, Chain, mlp_parameters
from .distill import DEFAULT, distill_layers
from .files import Layer, LayerStats, cut_blocks, finished_stats, require_own_folder, write_layer
from .loop import Losses, mean_losses, train_best
from .options import Method, Options, Report, TrainingStatus
from .replaced import Replaced, RetrainedLayers
from .rows import ROWS_PER_SAMPLE, RowProblem, checkpoint_tensors, closed_form

Data = BlockStates | HiddenStates

DISTILL = "distill"
METHODS = (*get_args(Method), DISTILL)

#: Tokens that the closed form is fitted to, in units of the MLP's width.
ROWS_PER_NEURON = 8


def retrain(
    method: str,
    dense: Dense,
    plan: PruningPlan,
    recording: Recording,
    folder: str | os.PathLike[str],
    layers: str = "all",
    on: Literal["auto", "blocks", "rows"] = "auto",
    report: Report | None = None,
    progress: Progress = silent,
    **options: Any,
) -> list[LayerStats]:
    """Retrains what `plan` leaves of `layers` on what was recorded, and writes them to `folder`.

    `options` are fields of `Options`, None where they are left to the method: a layer takes fewer and smaller steps than the
    whole model. An exception from `report` or `progress` cancels: finished layers stay. Raises `UserError` where plan, data and
    model do not belong together, the folder holds something else, or a choice makes no sense with the method.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if method != DISTILL:
        chosen = Options(method=method, **given)  # type: ignore[arg-type]
        require_device(chosen.device)
        return retrain_layers(dense, plan, open_data(recording, on), layers, folder, chosen, report, progress)
    if layers != "all" or on != "auto" or given.get("thickness", 1) > 1 or given.get("sequential"):
        raise UserError(
            "distill trains all layers at once, on trajectories: leave layers at 'all', the data at 'auto', thickness at 1 and "
            "sequential off, or choose another method."
        )
    chosen = replace(DEFAULT, **given)
    require_device(chosen.device)
    return distill_layers(dense, plan, recording, folder, chosen, report, progress)


def retrain_layers(
    dense: Dense,
    plan: PruningPlan,
    data: Data,
    layers: str,
    folder: str | os.PathLike[str],
    options: Options | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> list[LayerStats]:
    """Retrains the chosen layers that `plan` cuts something of, one after the other, and writes them to `folder`.

    An exception from `report` or `progress` cancels: finished layers stay. Raises `UserError` where plan, data and model do not
    belong together, the folder holds something else, or there is nothing to do.
    """
    options = options or Options()
    plan.require(dense)
    chosen = choose_layers(layers, dense.layout)
    longest = max(map(len, grouped(chosen, len(chosen))))
    if options.thickness > longest:
        raise UserError(
            f"thickness is {options.thickness}, but no more than {longest} consecutive layers are chosen ({layers}): choose at "
            f"most {longest}, or more layers."
        )
    touched = cut_blocks(dense.layout, plan)
    groups = [group for group in grouped(chosen, options.thickness) if touched & {*group}]
    if not groups:
        raise UserError(f"The plan cuts nothing of the layers {layers}: there is nothing to retrain. Choose other layers.")
    if not options.just_evaluate:
        require_own_folder(folder, plan)
    trainer: _OnBlocks | _OnRows
    if isinstance(data, BlockStates):
        trainer = _OnBlocks(dense, plan, data, options, Path(folder))
    else:
        trainer = _OnRows(dense, plan, data, options, Path(folder))
    stats: list[LayerStats] = []
    for number, group in enumerate(groups):

        def tell(status: TrainingStatus, number: int = number) -> None:
            if report is not None:
                report(replace(status, layers_done=number, layers=len(groups)))

        stats += trainer.finished(group) or trainer.retrain(group, tell, part(progress, number, len(groups)))
    return stats


def open_data(recording: Recording, on: Literal["auto", "blocks", "rows"] = "auto") -> Data:
    """What is to be trained on; "auto" takes block states where there are any, else rows.

    A folder in which this program recorded nothing is opened as one of block states of the original flux-poke.
    """
    kinds = recording.kinds
    if on == "rows" or (on == "auto" and "rows" in kinds and "blocks" not in kinds):
        return recording.states()
    return BlockStates.open(recording.states_folder if kinds else recording.folder)


def choose_layers(text: str, layout: Layout) -> tuple[int, ...]:
    """Block indices from numbers ("0-18", "0, 3, 7-9"; single blocks count on from the double ones) or names ("double 3,
    single").

    Raises `UserError` where that is neither, or outside of the model.
    """
    blocks = blocks_of(layout)
    if not re.fullmatch(r"[\d,\s-]+", text):
        return tuple(blocks.index(block) for block in choose_blocks(text, layout))
    chosen: set[int] = set()
    for some in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", some)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < len(blocks):
            raise UserError(
                f"Layers {text!r}: {some.strip()!r} is not a layer of this model, which has 0 to {len(blocks) - 1} (single "
                f"blocks from {layout.depth} on). Write numbers and ranges such as 0-18, or names such as 'double 3, single'."
            )
        chosen |= set(range(first, last + 1))
    return tuple(sorted(chosen))


def grouped(block_indices: Sequence[int], thickness: int) -> list[range]:
    """Runs of consecutive indices, at most `thickness` long."""
    groups: list[range] = []
    for index in block_indices:
        if groups and groups[-1].stop == index and len(groups[-1]) < thickness:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
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

    def key(self, group: range) -> str:
        """Tells one way of making the layers of `group` from another."""
        return hashlib.sha256(f"{self._key} {group}".encode()).hexdigest()[:16]

    def finished(self, group: range) -> list[LayerStats] | None:
        """The stats of layers that were made before, in the very same way; None where that is not all of them."""
        return None if self.options.just_evaluate else finished_stats(self.folder, group, self.key(group))

    def state_file(self, group: range, name: str) -> Path:
        """Where a training in progress is kept."""
        return self.folder / f".{name}.{self.key(group)}.training.safetensors"

    def write(self, group: range, tensors: Mapping[str, Tensor], stats: Sequence[LayerStats]) -> None:
        """One file for each block of the group, and nothing left of trainings in progress."""
        if self.options.just_evaluate:
            return
        for index, layer in zip(group, stats, strict=True):
            write_layer(self.folder, Layer.of(self.dense, self.plan, index, tensors, layer, self.key(group)))
        for path in self.folder.glob(f".*.{self.key(group)}.training.safetensors*"):
            path.unlink()

    def stats(self, group: range, losses: Losses, begun: float, images: Set[int]) -> list[LayerStats]:
        """Of every block in the group, whose losses are those of all of them together."""
        start = "cut" if losses.start == losses.cut else "closed form"
        seconds, method = time.monotonic() - begun, self.options.method
        more: dict[str, Any] = {"method": method, "data": self.data_name, "together": list(group), "start": start}
        given = self.options, losses, seconds, images
        return [LayerStats.of(self.dense, self.plan, index, *given, **more) for index in group]


class _OnBlocks(_Trainer):
    """Whole blocks, on block states."""

    data_name = "block states"

    def __init__(self, dense: Dense, plan: PruningPlan, states: BlockStates, options: Options, folder: Path):
        states.require(dense.fingerprint, dense.layout.hidden, dense.source)
        super().__init__(dense, plan, states.digest, options, folder)
        self.states = states
        self.before: list[Chain] = []

    def key(self, group: range) -> str:
        """In sequential training, where the retrained blocks begin that lead up to the group is part of it."""
        return super().key(range(self.before[0].span.start, group.stop) if self.before else group)

    def finished(self, group: range) -> list[LayerStats] | None:
        if self.before and self.before[-1].span.stop != group.start:
            self.before.clear()  # across a gap it goes on from the recorded states
        stats = super().finished(group)
        if stats:
            self._follow(group)
        return stats

    def retrain(self, group: range, report: Report, progress: Progress) -> list[LayerStats]:
        begun, options = time.monotonic(), self.options
        student = Chain.load(self.cut, group, options.device)
        name = "_".join(blocks_of(self.dense.layout)[index].name for index in group)
        problem = BlockProblem(name, student, self.states, options, self.before)
        keys = mlp_parameters(student, student.sites)
        saved = self.state_file(group, name)
        losses = train_best(problem, keys, lambda told: self._closed_form(problem, told), options, saved, report, progress)
        weights = student.state_dict()
        stats = self.stats(group, losses, begun, problem.images[1])
        self.write(group, {key: weights[key] for key in keys}, stats)
        self._follow(group)
        return stats

    def _closed_form(self, problem: BlockProblem, progress: Progress) -> dict[str, Tensor]:
        """Repaired down projections and biases of the chain's cut MLPs."""
        sites = [site for site in problem.module.sites if site.name in self.plan.kept]
        dense = Chain.load(self.dense.tensors, problem.module.span, self.options.device)
        samples = sum(map(len, problem.train))
        each = -(-ROWS_PER_NEURON * max(site.width for site in sites) // samples)
        steps = 2 + len(sites)
        fitted = dense.rows(problem.inputs(problem.train, part(progress, 0, steps)), each)
        held_out = dense.rows(problem.inputs(problem.held_out, part(progress, 1, steps)), each)
        found: dict[str, Tensor] = {}
        for number, site in enumerate(sites, start=2):
            weights = SiteWeights.read(self.dense.tensors, site, self.options.device)
            kept, told = self.plan.kept[site.name], part(progress, number, steps)
            repaired = closed_form(weights, kept, [fitted[site.name]], [held_out[site.name]], told)
            found[f"{site.down}.weight"] = repaired.down
            if repaired.bias is not None:
                found[f"{site.down}.bias"] = repaired.bias
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
        super().__init__(dense, plan, rows.digest("rows"), options, folder)
        self.rows = rows

    def retrain(self, group: range, report: Report, progress: Progress) -> list[LayerStats]:
        begun = time.monotonic()
        sites = [site for site in sites_at(self.dense.layout, group.start) if site.name in self.plan.kept]
        store = require_rows(self.rows, self.dense, sites, "retraining on rows")
        options = replace(self.options, batch=self.options.batch * ROWS_PER_SAMPLE)
        tensors: dict[str, Tensor] = {}
        found: list[Losses] = []
        held_out: set[int] = set()
        for number, site in enumerate(sites):
            weights = SiteWeights.read(self.dense.tensors, site, options.device)
            problem = RowProblem(weights, SiteWeights.read(self.cut, site, options.device), store, options)
            held_out |= problem.images[1]

            def repair(
                told: Progress, site: Site = site, weights: SiteWeights = weights, problem: RowProblem = problem
            ) -> dict[str, Tensor]:
                fitted, held_out = (store.rows(site.name, images) for images in problem.images)
                repaired = closed_form(weights, self.plan.kept[site.name], fitted, held_out, told)
                return {"down": repaired.down} | ({} if repaired.bias is None else {"bias": repaired.bias})

            keys = [name for name, _ in problem.module.named_parameters()]
            within = part(progress, number, len(sites))
            found.append(train_best(problem, keys, repair, options, self.state_file(group, site.name), report, within))
            tensors |= checkpoint_tensors(self.dense.tensors, problem.module.site_weights())
        stats = self.stats(group, mean_losses(found), begun, held_out)
        self.write(group, tensors, stats)
        return stats
