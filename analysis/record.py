"""Recording without a host: draw prompts with a FLUX of the tiny kind and add what its neurons did to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..flux.sampling import FluxTimer
from ..flux.tiny import TinyFlux
from .internals import Internals, add_to_file
from .recording import InternalsRecorder


def record_prompts(
    checkpoint: Path,
    prompts: Sequence[str],
    out: Path,
    seed: int = 0,
    steps: int = 20,
    batch: int = 16,
    progress: Callable[[str, float], None] | None = None,
) -> Internals:
    """Draws every prompt once (image n from seed + n) and returns the total now in `out`.

    Raises `UserError` where the checkpoint is none of the tiny kind, or `out` is of another model.
    """
    tiny = TinyFlux.load(checkpoint)
    recorder = InternalsRecorder(tiny.flux.layout.sites)
    noise = tiny.noise(len(prompts), seed)
    sigmas = FluxTimer(steps).sigmas()
    calls = 0
    for start in range(0, len(prompts), batch):
        if progress:
            progress(f"drawing and recording {len(prompts)} prompts", start / len(prompts))
        with recorder.watching(tiny.flux):
            tiny.sample(prompts[start : start + batch], noise[start : start + batch], sigmas)
        calls += steps
    fingerprint = Fingerprint.of_checkpoint(Checkpoint(checkpoint))
    return add_to_file(out, Internals.new(tiny.flux.layout.family, fingerprint, recorder.results(), steps=calls))
