"""Retraining what a plan leaves of a model: layer by layer, or all layers at once (`distill.py`).

    stats = retrain("both", dense, plan, recording, Path("retrained_layers"), layers="0-18", steps=400)

    data = BlockStates.open(folder)                  # or HiddenStates.open(folder), for rows
    stats = retrain_layers(dense, plan, data, "0-18", Path("retrained_layers"), Options())

One layer is in memory at a time, and is saved as soon as it is done. A layer starts from the cut, or from the closed form on
the same data (`pruning/refit.py`), and is trained from there. What is saved is what did best on images that neither was fitted
to, the start included. Called again after a kill, layers that are done are not done again, and one that was under way goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from ..errors import UserError
from ..flux.blocks import blocks_of, choose_blocks
from ..progress import Progress, part, silent
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.planning import require_device
from ..recording.block_states import BlockStates
from ..recording.recording import Recording
from ..recording.store import HiddenStates
from .blocks import Chain, train_blocks
from .cutting import start
from .distill import DEFAULT, DISTILL, distill_layers
from .files import LayerStats, Output, cut_blocks
from .options import Method, Options, Report
from .replaced import Replaced, RetrainedLayers
from .rows import train_rows

Data = BlockStates | HiddenStates

METHODS = (*get_args(Method), DISTILL)


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
    """`retrain_layers` or `distill_layers` on what was recorded.

    `options` are fields of `Options`, None where they are left to the method: a layer takes fewer and smaller steps than the
    whole model. Raises `UserError` also where a choice makes no sense with the method.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if method != DISTILL:
        chosen = Options(method=method, **given)  # type: ignore[arg-type]
        require_device(chosen.device)
        return retrain_layers(dense, plan, open_data(recording, on), layers, folder, chosen, report, progress, recording)
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
    recording: Recording | None = None,
) -> list[LayerStats]:
    """Retrains the chosen layers that `plan` cuts something of, one after the other, and writes them to `folder`.

    Modulation layers are truncated by `recording`, or by the plan's own. Blocks in which nothing else is cut are measured and
    not trained: what whole MLPs learn there brings the block nearer to the dense one, and the velocity further away (on the
    tiny FLUX at rank 1, .017 against .007).

    An exception from `report` or `progress` cancels: finished layers stay. Raises `UserError` where plan, data and model do not
    belong together, the folder holds something else, or there is nothing to do.
    """
    work = Layerwise(dense, plan, data, layers, folder, options or Options(), recording)
    stats: list[LayerStats] = []
    for number, group in enumerate(work.groups):
        told = report and _numbered(report, number, len(work.groups)), part(progress, number, len(work.groups))
        stats += work.finished(group) or work.train(group, *told)
    return stats


class Layerwise:
    """The training of chosen layers, a group of `thickness` of them at a time: what `retrain_layers` goes through, and what
    others may give out, where it is not `sequential`.

        work = Layerwise(dense, plan, data, "0-18", folder, options)
        for group in work.groups:
            stats = work.finished(group) or work.train(group)

    Raises `UserError` as `retrain_layers`.
    """

    def __init__(
        self,
        dense: Dense,
        plan: PruningPlan,
        data: Data,
        layers: str,
        folder: str | os.PathLike[str],
        options: Options,
        recording: Recording | None = None,
    ):
        plan.require(dense)
        blocks = blocks_of(dense.layout)
        chosen = [blocks.index(block) for block in choose_blocks(layers, dense.layout)]
        longest = max(map(len, grouped(chosen, len(chosen))))
        if options.thickness > longest:
            raise UserError(
                f"thickness is {options.thickness}, but no more than {longest} consecutive layers are chosen ({layers}): "
                f"choose at most {longest}, or more layers."
            )
        touched = {*cut_blocks(dense, plan)}
        self.groups = [group for group in grouped(chosen, options.thickness) if touched & {*group}]
        if not self.groups:
            raise UserError(f"The plan cuts nothing of the layers {layers}: there is nothing to retrain. Choose other layers.")
        if isinstance(data, BlockStates):
            data.require(dense.fingerprint, dense.layout.hidden, dense.source)
            name, digest = "block states", data.digest
        elif options.thickness > 1 or options.sequential:
            raise UserError("Rows train each MLP by itself: for thickness or sequential training, record block states.")
        else:
            name, digest = "rows", data.digest("rows")
        self.dense, self.data, self.folder, self.options = dense, data, folder, options
        #: What training starts from.
        self.cut = start(dense, plan, recording, device=options.device)
        self.output = Output(folder, self.cut, options, name, digest)
        self.before: list[Chain] = []  # in sequential training, the retrained layers that lead up to the next

    def finished(self, group: range) -> list[LayerStats] | None:
        """The stats of layers that were made before, in the very same way; else None."""
        found = self.output.finished(group, self._key(group))
        if found is not None:
            self._go_on_after(group)
        return found

    def train(self, group: range, report: Report | None = None, progress: Progress = silent) -> list[LayerStats]:
        """Trains and writes them; modulation layers are truncated first, for all blocks, where that was not done."""
        key = self._key(group)
        if not self.cut.repairs.complete():
            self.cut.work_out(part(progress, 0, 1, 0.1))
        begun, saved = time.monotonic(), partial(self.output.saved, key)
        if isinstance(self.data, BlockStates):
            trained = train_blocks(self.cut, self.data, group, self.options, self.before, saved, report, progress)
        else:
            trained = train_rows(self.cut, self.data, group.start, self.options, saved, report, progress)
        origin = "cut" if trained.start == trained.cut else "closed form"
        stats = self.output.write(group, key, trained, self.options.method, origin, begun)
        self._go_on_after(group)
        return stats

    def _key(self, group: range) -> str:
        if self.before and self.before[-1].span.stop != group.start:
            self.before.clear()  # across a gap it goes on from the recorded states
        return self.output.key(range(self.before[0].span.start if self.before else group.start, group.stop))

    def _go_on_after(self, group: range) -> None:
        if self.options.sequential and not self.options.just_evaluate:
            replaced = Replaced(self.dense, RetrainedLayers.open(self.folder, self.dense, group.start, group[-1]))
            self.before.append(Chain.load(replaced, group, self.options.device))


def _numbered(report: Report, done: int, layers: int) -> Report:
    return lambda status: report(replace(status, layers_done=done, layers=layers))


def open_data(recording: Recording, on: Literal["auto", "blocks", "rows"] = "auto") -> Data:
    """What is to be trained on; "auto" takes block states where there are any, else rows.

    A folder in which this program recorded nothing is opened as one of block states of the original flux-poke.
    """
    kinds = recording.kinds
    if on == "rows" or (on == "auto" and "rows" in kinds and "blocks" not in kinds):
        return recording.states()
    return BlockStates.open(recording.states_folder if kinds else recording.folder)


def grouped(block_indices: Sequence[int], thickness: int) -> list[range]:
    """Runs of consecutive indices, at most `thickness` long."""
    groups: list[range] = []
    for index in block_indices:
        if groups and groups[-1].stop == index and len(groups[-1]) < thickness:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
    return groups
