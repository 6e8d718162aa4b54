"""`flux-poke cluster retrain`: one task for each layer, or for each group of layers that are trained together.

    done = retrain(source, plan, Options(method="both"), "retrained_layers/portraits", terms, layers="0-18")
    stats_of(done)                                   # of all layers, as `retrain.layers` gives them

The folder is the one that one machine fills, in one that all machines reach, or at a URL.
"""

from __future__ import annotations

import hashlib
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import write_picture
from ..flux.blocks import blocks_of
from ..flux.layout import Layout
from ..pruning.plan import PruningPlan
from ..recording.recording import CACHE
from ..retrain.distill import DISTILL
from ..retrain.files import PICTURE, STATS, LayerStats, draw_stats, stats_figure, stats_text
from ..retrain.layers import Layerwise, open_data
from ..retrain.options import Options
from .connect import Needs
from .copies import absolute, copies_folder, folder_at_hand, is_remote
from .memory import retraining_bytes
from .shared import Shared
from .sites import SiteWorker, Source, truncate
from .tasks import Done, Task, Terms, carry_out

On = Literal["auto", "blocks", "rows"]


class Retrainer(SiteWorker):
    """Trains groups of layers on what was recorded of them."""

    kinds = ("rows", "blocks")

    def __init__(self, source: Source, plan: PruningPlan, options: Options, folder: str, layers: str, on: On, threads: int):
        super().__init__(source, options.device, threads)
        self.plan, self.options, self.folder, self.layers, self.on = plan, options, folder, layers, on

    @cached_property
    def own(self) -> Path:
        """Where this machine writes layers: into the folder itself, or one whose files go to the URL."""
        if not is_remote(self.folder):
            return Path(self.folder)
        return copies_folder() / f"layers_{hashlib.sha256(self.folder.encode()).hexdigest()[:16]}"

    @cached_property
    def layerwise(self) -> Layerwise:
        if self.source.remote:  # truncated modulation layers
            folder_at_hand(self.source.recording, lambda name: name.startswith(f"{CACHE}/modulation/"))
        data = open_data(self.recording, self.on)
        return Layerwise(self.dense, self.plan, data, self.layers, self.own, self.options, self.recording)

    def do(self, task: Task) -> list[LayerStats]:
        group = range(*task.what)
        names = [f"{index}.safetensors" for index in group]
        shared = Shared(self.folder) if is_remote(self.folder) else None
        if shared is not None:
            for name in names:
                if shared.exists(name):
                    shared.fetch(name, self.own / name)
        found = self.layerwise.finished(group)
        if found is None:
            found = self.layerwise.train(group)
            if shared is not None and not self.options.just_evaluate:
                for name in names:
                    shared.put(self.own / name, name)
        return found


def retrain(
    source: Source,
    plan: PruningPlan,
    options: Options,
    folder: str,
    terms: Terms,
    layers: str = "all",
    on: On = "auto",
) -> Done:
    """Trains every layer that `plan` cuts something of, and writes them to `folder`, with their stats and the picture.

    Raises `UserError` where plan, data and model do not belong together, the folder holds something else, or there is nothing
    to do, and as `carry_out`.
    """
    folder = absolute(folder)
    dense, recording = source.dense(), source.recorded(*Retrainer.kinds)
    data = open_data(recording, on)
    with tempfile.TemporaryDirectory() as nothing:
        here = nothing if is_remote(folder) else folder
        work = Layerwise(dense, plan, data, layers, here, options, recording)
        truncated_by = source
        if plan.ranks and work.cut.repairs.low_ranks.recording.folder != recording.folder:  # block states have no texts
            truncated_by = Source(source.checkpoint, str(work.cut.repairs.low_ranks.recording.folder))
        truncate(truncated_by, plan, work.cut.repairs, terms, options.device)
        names, known = {group: _name(dense.layout, group) for group in work.groups}, dict[str, list[LayerStats]]()
        if not is_remote(folder):
            found = {name: work.finished(group) for group, name in names.items()}
            known = {name: stats for name, stats in found.items() if stats is not None}
    tasks = [
        Task(name, retraining_bytes(dense, group, data), (group.start, group.stop))
        for group, name in names.items()
        if name not in known
    ]

    def worker(needs: Needs) -> tuple[type, tuple[Any, ...]]:
        return Retrainer, (source, plan, options, folder, layers, on, needs.threads)

    done = carry_out(tasks, worker, terms, len(known), f"Finished layers are in {folder}.")
    done.results |= known
    if not options.just_evaluate:
        _describe(folder, stats_of(done))
    return done


def layer_options(method: str, **given: Any) -> Options:
    """How to train; raises `UserError` where layers cannot be trained apart from each other so."""
    if method == DISTILL or given.get("sequential"):
        what = "trains all layers at once" if method == DISTILL else "trains one layer after the other"
        name = DISTILL if method == DISTILL else "sequential"
        raise UserError(f"{name} {what}, which one machine does: use `flux-poke retrain`, or another method here.")
    return Options(method=method, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def stats_of(done: Done) -> list[LayerStats]:
    """Of all layers, in their order."""
    return sorted((layer for stats in done.results.values() for layer in stats), key=lambda stats: stats.layer)


def _describe(folder: str, stats: list[LayerStats]) -> None:
    """The picture of all layers; at a URL, their list too, which a worker writes where it has the folder itself."""
    if not is_remote(folder):
        draw_stats(folder)
    elif stats:
        shared = Shared(folder)
        shared.write(STATS, stats_text(stats))
        with tempfile.TemporaryDirectory() as here:
            write_picture(Path(here) / PICTURE, stats_figure(stats))
            shared.put(Path(here) / PICTURE, PICTURE)


def _name(layout: Layout, group: range) -> str:
    blocks = blocks_of(layout)
    return " to ".join(dict.fromkeys((blocks[group.start].name, blocks[group[-1]].name)))
