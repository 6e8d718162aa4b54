"""Recording two lists of prompts to compare, without a host: internals of every prompt by itself.

with_it = record_prompts(tiny, fingerprint, ["three", "a 3"], images=4)
without = record_prompts(tiny, fingerprint, others, images=1, seed=1000)
find(tensors, layout, with_it, without)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..flux.fingerprint import Fingerprint
from ..flux.integrators import euler
from ..progress import Progress, silent
from ..recording.call import Call
from ..recording.internals import Internals
from ..recording.neurons import InternalsRecorder
from ..tiny.model import STEPS, TinyFlux


@torch.no_grad()
def record_prompts(
    tiny: TinyFlux,
    fingerprint: Fingerprint,
    prompts: Sequence[str],
    images: int = 4,
    seed: int = 0,
    steps: int = STEPS,
    sigmas: tuple[float, float] = (0.0, 1.0),
    progress: Progress = silent,
) -> list[Internals]:
    """Internals of each prompt, drawn `images` times (image n of all from `seed` + n), at noise levels in the range."""
    levels, found = tiny.sigmas(steps), []
    for number, prompt in enumerate(prompts):
        progress(f"recording {len(prompts)} prompts", number, len(prompts))
        recorder, texts, step = InternalsRecorder(tiny.flux.layout.sites), tiny.words([prompt] * images), 0

        def velocity(x: Tensor, sigma: Tensor, recorder=recorder, texts=texts) -> Tensor:
            nonlocal step
            call = Call.at(x, sigma, levels, step, padded=True)
            step += 1
            within = sigmas[0] <= call.sigma_now <= sigmas[1]
            with recorder.watching(tiny.flux, call) if within else nullcontext():
                return tiny.flux(x, sigma, *texts)

        euler(velocity, tiny.noise(images, seed + number * images), levels)
        found.append(Internals.new(tiny.flux.layout.family, fingerprint, recorder.results(), recorder.calls, padded=True))
    return found
