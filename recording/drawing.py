"""Recording without a host: draw prompts with a FLUX of the tiny kind and add what its neurons did to a file.

record_prompts(path, prompts, Path("internals.safetensors"))
record_prompts(path, prompts, Path("internals.safetensors"), rows=RowsTo(Path("hidden_states")))     # and rows beside it
record_states(path, prompts, "blocks", Path("hidden_states"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ..flux.blocks import choose_blocks
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..flux.sampling import FluxTimer, euler
from ..tiny.model import TinyFlux
from .amplification import AmplificationProbe, probed_steps
from .internals import Internals, add_to_file
from .neurons import InternalsRecorder
from .rows import RowChoice, RowRecorder
from .states import StateChoice, StateKind, StateRecorder, places_around
from .store import HiddenStates, Limit

#: At how many steps of the first batch the amplification of every MLP is measured.
PROBED_STEPS = 10


@dataclass(frozen=True)
class RowsTo:
    """A folder for rows, which of them, and how much it may take."""

    folder: Path
    choice: RowChoice = field(default_factory=RowChoice)
    limit: Limit | None = None


def record_prompts(
    checkpoint: Path,
    prompts: Sequence[str],
    out: Path,
    seed: int = 0,
    steps: int = 20,
    batch: int = 16,
    progress: Callable[[str, float], None] | None = None,
    rows: RowsTo | None = None,
) -> Internals:
    """Draws every prompt once (image n from seed + n) and returns the total now in `out`; sampled rows go to `rows`.

    Raises `UserError` where the checkpoint is none of the tiny kind, or `out` or the folder for rows is of another model.
    """
    tiny = TinyFlux.load(checkpoint)
    flux, sites = tiny.flux, tiny.flux.layout.sites
    fingerprint = Fingerprint.of_checkpoint(Checkpoint(checkpoint))
    internals = InternalsRecorder(sites)
    sampled, probe = None, AmplificationProbe(sites)
    if rows is not None:
        sampled = RowRecorder(
            sites, HiddenStates.for_model(rows.folder, flux.layout.family, fingerprint), rows.choice, rows.limit
        )
    noise, sigmas = tiny.noise(len(prompts), seed), FluxTimer(steps).sigmas()
    probed = probed_steps(steps, PROBED_STEPS) if sampled is not None else set()
    calls = 0
    for start in range(0, len(prompts), batch):
        if progress:
            progress(f"drawing and recording {len(prompts)} prompts", start / len(prompts))
        context, vector = tiny.words(prompts[start : start + batch])
        with ExitStack() as recording:
            what = f"{prompts[start : start + batch]} {seed + start}"
            run = recording.enter_context(sampled.run(sigmas, len(context), what)) if sampled is not None else None

            def velocity(x: Tensor, sigma: Tensor, context=context, vector=vector, run=run, first=calls) -> Tensor:
                nonlocal calls
                step, calls = calls - first, calls + 1
                if step in probed and first == 0:  # before the others look on: its calls are not to be recorded
                    probe.measure(flux, sigmas[step].item(), lambda: flux(x, sigma, context, vector))
                with ExitStack() as hooks:
                    hooks.enter_context(internals.watching(flux))
                    if run is not None:
                        hooks.enter_context(run.watching(flux, step))
                    return flux(x, sigma, context, vector)

            with torch.no_grad():
                euler(velocity, noise[start : start + batch], sigmas)
    if sampled is not None:
        sampled.store.add_amplification(probe.results())
    return add_to_file(out, Internals.new(flux.layout.family, fingerprint, internals.results(), steps=calls))


def record_states(
    checkpoint: Path,
    prompts: Sequence[str],
    kind: StateKind,
    folder: Path,
    blocks: str = "all",
    choice: StateChoice | None = None,
    limit: Limit | None = None,
    seed: int = 0,
    steps: int = 20,
    batch: int = 16,
    progress: Callable[[str, float], None] | None = None,
) -> HiddenStates:
    """Draws every prompt once (image n from seed + n) and keeps whole model calls in `folder`, until `limit` says stop.

    `blocks` as `choose_blocks` takes them. Raises `UserError` where the checkpoint is none of the tiny kind, or the folder is
    of another model.
    """
    tiny = TinyFlux.load(checkpoint)
    flux = tiny.flux
    store = HiddenStates.for_model(folder, flux.layout.family, Fingerprint.of_checkpoint(Checkpoint(checkpoint)))
    places = places_around(choose_blocks(blocks, flux.layout), flux.layout)
    recorder = StateRecorder(kind, store, choice, limit, places)
    noise, sigmas = tiny.noise(len(prompts), seed), FluxTimer(steps).sigmas()
    for start in range(0, len(prompts), batch):
        if progress:
            progress(f"drawing {len(prompts)} prompts and keeping {kind}", start / len(prompts))
        texts = prompts[start : start + batch]
        context, vector = tiny.words(texts)
        seeds = range(seed + start, seed + start + len(texts))
        calls = count()
        with recorder.run(sigmas, len(texts), texts, seeds, f"{texts} {seed + start}") as run, torch.no_grad():

            def velocity(x: Tensor, sigma: Tensor, context=context, vector=vector, run=run, calls=calls) -> Tensor:
                with run.watching(flux, next(calls)):
                    return flux(x, sigma, context, vector)

            euler(velocity, noise[start : start + batch], sigmas)
        if recorder.full:
            break
    return store
