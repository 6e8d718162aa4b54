"""Recording without a host: draw prompts with a FLUX of the tiny kind and record what it does on the way.

    recording = Recording.at("digits")
    notes = record(checkpoint, prompts, recording, Wanted(internals=True, rows=RowChoice(), trajectories=StateChoice()))

All kinds are recorded in one pass. What was drawn stays where a recording is stopped: every batch is added when it is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import choose_blocks
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Layout
from ..flux.sampling import FluxTimer, euler
from ..progress import Progress, part, renamed, silent
from ..tiny.model import LATENT_SIDE, TinyFlux
from ..tiny.words import PADDED
from .amplification import AmplificationProbe, probed_steps
from .call import Call
from .internals import Internals, add_to_file
from .lens_rows import LensRecorder, estimated_lens_bytes
from .manifest import Kind, Limit
from .neurons import InternalsRecorder
from .recording import Recording
from .rows import RowChoice, RowRecorder, estimated_bytes
from .run import Run
from .states import StateChoice, StateRecorder, estimated_state_bytes, indices_around
from .store import HiddenStates

#: At how many steps of the first batch the amplification of every MLP is measured.
PROBED_STEPS = 10


@dataclass(frozen=True)
class Wanted:
    """What is recorded: counts of neurons, and each kind that a choice is given for.

    `blocks_of_states`, as `choose_blocks` takes it, is for `blocks`; `limit` is for each kind by itself.
    """

    internals: bool = False
    rows: RowChoice | None = None
    lens: RowChoice | None = None
    blocks: StateChoice | None = None
    trajectories: StateChoice | None = None
    blocks_of_states: str = "all"
    limit: Limit | None = None

    def __post_init__(self) -> None:
        if not self.internals and not any((self.rows, self.lens, self.blocks, self.trajectories)):
            raise UserError("Nothing is to be recorded: choose internals, rows, lens rows, block states or trajectories.")

    def estimated_bytes(self, layout: Layout, steps: int, images: int) -> dict[Kind, int]:
        """What `images` images of a tiny FLUX take on disk at most, by kind; internals have one size whatever is drawn."""
        tokens = (LATENT_SIDE // layout.patch) ** 2
        found: dict[Kind, int] = {}
        if self.rows:
            found["rows"] = estimated_bytes(layout.sites, layout.hidden, self.rows, steps, images)
        if self.lens:
            found["lens"] = 2 * estimated_lens_bytes(layout, self.lens, steps, images)  # it runs in float32
        for kind, choice in (("blocks", self.blocks), ("trajectories", self.trajectories)):
            if choice:
                indices = indices_around(choose_blocks(self.blocks_of_states, layout), layout)
                calls = images * choice.count(steps)
                found[kind] = estimated_state_bytes(kind, layout, indices, choice, calls, tokens, PADDED)  # type: ignore
        return found


def record(
    checkpoint: Path,
    prompts: Sequence[str],
    recording: Recording,
    wanted: Wanted,
    seed: int = 0,
    steps: int = 20,
    batch: int = 16,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Draws every prompt once (image n from seed + n) and adds what is wanted to `recording`; sentences on what was left out.

    With rows, the amplification of every MLP is measured once. Raises `UserError`, before anything is drawn, where the
    checkpoint is not of the tiny kind, or the recording is of another model or cannot be written.
    """
    tiny = TinyFlux.load(checkpoint)
    layout = tiny.flux.layout
    fingerprint = Fingerprint.of_checkpoint(Checkpoint(checkpoint))
    recording.check_writable(fingerprint, str(checkpoint), wanted.internals)
    recorders = _recorders(recording, layout, fingerprint, wanted)
    probe = _probe(recorders, layout)
    sigmas = FluxTimer(steps).sigmas()
    what, notes = f"drawing and recording {len(prompts)} prompts", dict[str, None]()
    for start in range(0, len(prompts), batch):
        texts = tuple(prompts[start : start + batch])
        within = renamed(part(progress, start, len(prompts), len(texts)), what)
        run = _Drawn(tiny, texts, tuple(range(seed + start, seed + start + len(texts))), sigmas, within)
        if start == 0 and probe.sites:
            run.probe = probe
        runs: list[Run] = [recorder.begin() for recorder in recorders]
        neurons = InternalsRecorder(layout.sites if wanted.internals else ())
        run.draw([neurons, *runs])
        for finished in runs:
            finished.finish()
        if run.probe is not None:
            recorders[0].store.add_amplification(probe.results())
        if found := neurons.results():
            add_to_file(recording.internals_file, Internals.new(layout.family, fingerprint, found, neurons.calls))
        notes |= dict.fromkeys(note for note in (neurons.note, *(finished.note for finished in runs)) if note)
        if not wanted.internals and all(recorder.full for recorder in recorders):
            break
    progress(what, 1, 1)
    return tuple(notes)


class _Watching(Protocol):
    def watching(self, model: nn.Module, call: Call) -> AbstractContextManager[None]: ...


@dataclass
class _Drawn:
    """One batch of prompts being drawn; at some steps of it, `probe` measures before the others look on."""

    tiny: TinyFlux
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sigmas: Tensor
    progress: Progress
    probe: AmplificationProbe | None = None

    @torch.no_grad()
    def draw(self, watchers: Sequence[_Watching]) -> None:
        flux, steps = self.tiny.flux, len(self.sigmas) - 1
        context, vector = self.tiny.words(self.prompts)
        probed = probed_steps(steps, PROBED_STEPS)
        count = itertools.count()

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            step = next(count)
            self.progress("", step, steps)

            def model() -> Tensor:
                return flux(x, sigma, context, vector)

            if self.probe is not None and step in probed:
                self.probe.measure(flux, self.sigmas[step].item(), model)
            call = Call.at(x, sigma, self.sigmas, step, context=context, prompts=self.prompts, seed=self.seeds)
            with ExitStack() as watching:
                for watcher in watchers:
                    watching.enter_context(watcher.watching(flux, call))
                return model()

        euler(velocity, self.tiny.noise(len(self.prompts), self.seeds[0]), self.sigmas)


def _recorders(
    recording: Recording, layout: Layout, fingerprint: Fingerprint, wanted: Wanted
) -> list[RowRecorder | LensRecorder | StateRecorder]:
    if not any((wanted.rows, wanted.lens, wanted.blocks, wanted.trajectories)):
        return []
    store = HiddenStates.for_model(recording.states_folder, layout.family, fingerprint)
    limit = wanted.limit
    found: list[RowRecorder | LensRecorder | StateRecorder] = []
    if wanted.rows:
        found.append(RowRecorder(layout.sites, store, wanted.rows, limit))
    if wanted.lens:
        found.append(LensRecorder(layout, store, wanted.lens, limit))
    if wanted.blocks:
        indices = indices_around(choose_blocks(wanted.blocks_of_states, layout), layout)
        found.append(StateRecorder("blocks", store, wanted.blocks, limit, indices))
    if wanted.trajectories:
        found.append(StateRecorder("trajectories", store, wanted.trajectories, limit))
    return found


def _probe(recorders: Sequence[RowRecorder | LensRecorder | StateRecorder], layout: Layout) -> AmplificationProbe:
    """Of the MLPs whose amplification was not measured yet; of none where no rows are recorded."""
    measured = [recorder.store.amplification for recorder in recorders if isinstance(recorder, RowRecorder)]
    return AmplificationProbe([site for site in layout.sites if measured and site.name not in measured[0]])
