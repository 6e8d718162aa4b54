"""Recording without a host: draw prompts with a FLUX of the tiny kind and record what it does on the way.

    recording = Recording.at("digits")
    notes = record(checkpoint, prompts, recording, Wanted(internals=True, rows=RowChoice(), trajectories=StateChoice()))

All kinds are recorded in one pass. What was drawn stays where a recording is stopped: every batch is added when it is done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.blocks import choose_blocks
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..flux.integrators import euler
from ..flux.layout import Layout
from ..progress import Progress, part, renamed, silent, whole
from ..tiny.model import TinyFlux
from ..tiny.words import words_of
from .amplification import AmplificationProbe, probed_steps
from .atlas import Atlas, add_to_atlas
from .calibration import AskedImage, Effort, batches, drawn_name
from .call import Call
from .internals import Internals, add_to_file, replace_in_file
from .lens_rows import LensRecorder, estimated_lens_bytes
from .manifest import Kind, Limit
from .neurons import InternalsRecorder
from .places import PlacesRecorder
from .recording import Recording
from .rows import RowChoice, RowRecorder, estimated_bytes
from .run import Recorder, Run
from .states import StateChoice, StateKind, StateRecorder, estimated_state_bytes, indices_around
from .store import HiddenStates

#: On how many images of the first batch, and at how many of their steps and the last, amplifications are measured.
PROBED_IMAGES = 8
PROBED_STEPS = 10


@dataclass(frozen=True)
class Wanted:
    """What is recorded: counts of neurons, their strongest places (`atlas`), and each kind that a choice is given for.

    `blocks_of_states`, as `choose_blocks` takes it, is for `blocks`; `limit` is for each kind by itself.
    """

    internals: bool = False
    atlas: bool = False
    rows: RowChoice | None = None
    lens: RowChoice | None = None
    blocks: StateChoice | None = None
    trajectories: StateChoice | None = None
    blocks_of_states: str = "all"
    limit: Limit | None = None

    def __post_init__(self) -> None:
        if not (self.internals or self.atlas or self.states):
            raise UserError(
                "Nothing is to be recorded: choose internals, atlas, rows, lens rows, block states or trajectories."
            )

    @property
    def states(self) -> bool:
        """Whether anything is recorded that has a choice."""
        return any((self.rows, self.lens, self.blocks, self.trajectories))

    def indices(self, layout: Layout) -> frozenset[int]:
        return indices_around(choose_blocks(self.blocks_of_states, layout), layout)

    def estimated_bytes(self, tiny: TinyFlux, steps: int, images: int) -> dict[Kind, int]:
        """What `images` images of `tiny` take on disk at most, by kind; internals have one size whatever is drawn."""
        layout, tokens = tiny.flux.layout, tiny.tokens
        found: dict[Kind, int] = {}
        if self.rows:
            found["rows"] = estimated_bytes(layout, self.rows, steps, images)
        if self.lens:
            found["lens"] = 2 * estimated_lens_bytes(layout, self.lens, steps, images)  # it runs in float32
        choices: dict[StateKind, StateChoice | None] = {"blocks": self.blocks, "trajectories": self.trajectories}
        for kind, choice in choices.items():
            if choice:
                calls = images * choice.count(steps)
                found[kind] = estimated_state_bytes(
                    kind, layout, self.indices(layout), choice, calls, tokens["img"], tokens["txt"]
                )
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
    append: bool = True,
) -> tuple[str, ...]:
    """Draws every prompt once (image n from seed + n) and adds what is wanted to `recording`; sentences on what was left out.

    Without `append`, internals take the place of those that the recording holds. With rows, amplifications are measured
    once. Raises `UserError`, before anything is drawn, where the checkpoint is not of the tiny kind, or the recording is of
    another model or cannot be written.
    """
    tiny = TinyFlux.load(checkpoint)
    fingerprint = Fingerprint.of_checkpoint(Checkpoint(checkpoint))
    recording.check_writable(fingerprint, str(checkpoint), wanted.internals)
    recorders = _recorders(recording, tiny.flux.layout, fingerprint, wanted)
    parts = [Together(tuple(prompts[start : start + batch]), seed + start) for start in range(0, len(prompts), batch)]
    return _record(
        tiny, fingerprint, recording, recorders, wanted.internals, parts, steps, progress, wanted.atlas, append=append
    )


def record_some(
    tiny: TinyFlux,
    fingerprint: Fingerprint,
    images: Together,
    first: int,
    recording: Recording,
    wanted: Wanted,
    steps: int = 20,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """As `record` does with one of its batches, whose images are number `first` and those after it of all: what is recorded of
    every batch by itself is what is recorded of all, to the bit. With rows, the batch of image 0 measures amplifications."""
    recorders = _recorders(recording, tiny.flux.layout, fingerprint, wanted, first)
    return _record(
        tiny, fingerprint, recording, recorders, wanted.internals, [images], steps, progress, wanted.atlas, first == 0
    )


def calibrate(
    tiny: TinyFlux,
    fingerprint: Fingerprint,
    recording: Recording,
    images: Sequence[AskedImage],
    effort: Effort,
    batch: int = 16,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Draws `images` and adds internals, rows as `effort` says, and amplifications to `recording`, where these are not known;
    sentences on what was left out. `missing_images` knows from then on that they are there."""
    layout = tiny.flux.layout
    store = HiddenStates.for_model(recording.states_folder, layout.family, fingerprint)
    choice = RowChoice(effort.rows << store.manifest.halvings, effort.steps)
    recorders = [RowRecorder(layout.sites, store, choice, shard_bytes=math.inf)]
    parts = [Together(tuple(image.prompt for image in some), some[0].seed, drawn_name(some)) for some in batches(images, batch)]
    return _record(tiny, fingerprint, recording, recorders, True, parts, effort.steps, progress)


@dataclass(frozen=True)
class Together:
    """Images that are drawn at once, number n from `seed` + n; `name` tells them from others, where that is known before."""

    prompts: tuple[str, ...]
    seed: int
    name: str = ""


def _record(
    tiny: TinyFlux,
    fingerprint: Fingerprint,
    recording: Recording,
    recorders: Sequence[Recorder],
    internals: bool,
    parts: Sequence[Together],
    steps: int,
    progress: Progress,
    atlas: bool = False,
    amplification: bool = True,
    append: bool = True,
) -> tuple[str, ...]:
    layout, store = tiny.flux.layout, next((recorder.store for recorder in recorders if recorder.kind == "rows"), None)
    probe = AmplificationProbe(layout, store.amplification) if store and amplification else None
    sigmas, total, done = tiny.sigmas(steps), sum(len(images.prompts) for images in parts), 0
    what, notes = f"drawing and recording {total} prompts", dict[str, None]()
    for images in parts:
        within = renamed(part(progress, done, total, len(images.prompts)), what)
        runs = [recorder.begin() for recorder in recorders]
        neurons = InternalsRecorder(layout.sites if internals else ())
        places = PlacesRecorder(layout, layout.sites if atlas else (), maps=True)
        latents = _draw(tiny, images, sigmas, [neurons, places, *runs], None if done else probe, within)
        with whole():  # rows come last: by them it is known that these images are there
            if strongest := places.results():
                known = [replace(image, texts=tuple(words_of(image.prompt or ""))) for image in places.images]
                recording.write_atlas_pictures(known, tiny.autoencoder.decode(latents))
                add_to_atlas(recording.atlas_file, Atlas.new(layout.family, fingerprint, strongest, known))
            if found := neurons.results():
                new = Internals.new(layout.family, fingerprint, found, neurons.calls, padded=neurons.padded, drawn=images.name)
                (add_to_file if append or done else replace_in_file)(recording.internals_file, new)
            if not done and store and probe is not None:
                store.add_amplification(probe.results())
            for run in runs:
                run.finish()
        notes |= dict.fromkeys(filter(None, (neurons.note, places.note, *(run.note for run in runs))))
        done += len(images.prompts)
        if not (internals or atlas) and all(recorder.full for recorder in recorders):
            break
    progress(what, 1, 1)
    return tuple(notes)


@torch.no_grad()
def _draw(
    tiny: TinyFlux,
    images: Together,
    sigmas: Tensor,
    watchers: Sequence[InternalsRecorder | PlacesRecorder | Run],
    probe: AmplificationProbe | None,
    progress: Progress,
) -> Tensor:
    """Draws one batch of images, whose latents come back; at some steps of it, `probe` measures before the others look on."""
    flux, prompts, steps = tiny.flux, images.prompts, len(sigmas) - 1
    context, vector = tiny.words(prompts)
    probed = probed_steps(steps, PROBED_STEPS) if probe is not None and probe.calls else ()
    seeds = tuple(range(images.seed, images.seed + len(prompts)))
    count = itertools.count()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        step = next(count)
        progress("", step, steps)
        model = partial(flux, x, sigma, context, vector)
        if probe is not None and step in probed:
            few = partial(flux, *(given if given is None else given[:PROBED_IMAGES] for given in (x, sigma, context, vector)))
            probe.measure(flux, sigmas[step].item(), few)
        told = {"context": context, "prompts": prompts, "seed": seeds, "known_drawn": images.name}
        call = Call.at(x, sigma, sigmas, step, padded=True, **told)  # its texts are filled up to 8 words
        with ExitStack() as watching:
            for watcher in watchers:
                watching.enter_context(watcher.watching(flux, call))
            return model()

    return euler(velocity, tiny.noise(len(prompts), images.seed), sigmas)


def _recorders(
    recording: Recording, layout: Layout, fingerprint: Fingerprint, wanted: Wanted, first: int = 0
) -> list[Recorder]:
    if not wanted.states:
        return []
    store, limit = HiddenStates.for_model(recording.states_folder, layout.family, fingerprint, first), wanted.limit
    found: list[Recorder] = []
    if wanted.rows:
        found.append(RowRecorder(layout.sites, store, wanted.rows, limit))
    if wanted.lens:
        found.append(LensRecorder(layout, store, wanted.lens, limit))
    if wanted.blocks:
        found.append(StateRecorder("blocks", store, wanted.blocks, limit, wanted.indices(layout)))
    if wanted.trajectories:
        found.append(StateRecorder("trajectories", store, wanted.trajectories, limit))
    return found
