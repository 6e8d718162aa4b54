"""Comparing two lists of prompts, without a host: internals of every prompt by itself, and the neurons by which they differ.

with_it = record_prompts(tiny, fingerprint, ["three", "a 3"], images=4)
without = record_prompts(tiny, fingerprint, others, images=1, seed=1000)
find(tensors, layout, with_it, without)

find_in_prompts(dense, tiny, ["three", "a 3"], others, Search(share=0.02), "tune")      # all of it
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.fingerprint import Fingerprint
from ..flux.integrators import euler
from ..progress import Progress, part, silent
from ..pruning.dense import Dense
from ..recording.call import Call
from ..recording.internals import Internals
from ..recording.neurons import InternalsRecorder
from ..tiny.model import STEPS, TinyFlux
from .find import Search, find
from .learn import LEARNING, learn
from .neurons import Neurons
from .tune import Exam, tune

#: How neurons are found: as a search is told, tuned to erase the concept at the least cost, or learned with weights.
Way = Literal["search", "tune", "learn"]


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
    """Internals of each prompt, drawn `images` times (image n of all from `seed` + n), at noise levels in the range.

    Raises `UserError` where no step is at one of these, or an activation is not finite.
    """
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
        if not recorder.calls:
            raise UserError(
                f"None of the {steps} steps is at a noise level from {sigmas[0]:g} to {sigmas[1]:g}: choose a wider range, or "
                "more steps."
            )
        if not (results := recorder.results()):
            raise UserError(f"'{prompt}': {recorder.note}")
        found.append(Internals.new(tiny.flux.layout.family, fingerprint, results, recorder.calls, padded=True))
    return found


@dataclass(frozen=True)
class Drawings:
    """How prompts are drawn: pictures of each, Euler steps, and the noise levels that are recorded.

    Raises `UserError` where there are no such levels.
    """

    images: int = 4
    steps: int = STEPS
    sigmas: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.sigmas[0] < self.sigmas[1]:
            raise UserError(f"Noise levels from {self.sigmas[0]:g} to {self.sigmas[1]:g} are none: give the lower one first.")


def find_in_prompts(
    dense: Dense,
    tiny: TinyFlux,
    with_it: Sequence[str],
    without: Sequence[str],
    what: Search,
    way: Way = "tune",
    drawn: Drawings | None = None,
    compared: str = "with against without",
    progress: Progress = silent,
) -> Neurons:
    """The neurons by which drawings of two lists of prompts differ; `what.spare` counts for "search" alone.

    `tiny` is the model that `dense` holds. Seeds are `what.seed` and on, those of `without` after those of `with_it`. Raises
    `UserError` where a prompt is in both.
    """
    if both_have := sorted({*with_it} & {*without}):
        raise UserError(
            f"The prompt '{both_have[0]}' is among those with the concept and among those without: leave it out of one."
        )
    drawn, both = drawn or Drawings(), len(with_it) + len(without)
    rest = {"search": 0.0, "tune": 10.0, "learn": 2.0 * both}[way]

    def record(prompts: Sequence[str], before: int) -> list[Internals]:
        seed, told = what.seed + drawn.images * before, part(progress, before, both + rest, len(prompts))
        return record_prompts(tiny, dense.fingerprint, prompts, drawn.images, seed, drawn.steps, drawn.sigmas, told)

    own, others = record(with_it, 0), record(without, len(with_it))

    def search(what: Search) -> Neurons:
        return replace(find(dense.tensors, dense.layout, own, others, what, compared), sigmas=drawn.sigmas)

    if way == "search":
        return search(what)
    last = part(progress, both, both + rest, rest)
    exam = Exam.of(tiny, with_it, without, extent=LEARNING if way == "learn" else None)
    if way == "learn":
        known = search(replace(what, share=1.0, spare=0.0, chance=False))
        return learn(exam, known, what.number(dense.layout), last, what.seed)
    tuned = tune(exam, lambda spare: search(replace(what, spare=spare, chance=False)), last)
    return replace(search(replace(what, spare=tuned.spare or 0.0)), factor=tuned.factor)
