"""What recorders of rows, lens rows, block states and trajectories have in common: a run of a sampler, and what is drawn.

    run = recorder.begin()
    for ...:
        with run.watching(model, call):              # hooks only at the steps that were drawn for it
            model(x, sigma, context, vector)
    run.finish()                                     # it ended well
    run.note                                         # what was left out, and why; empty where nothing was

Steps and tokens are drawn by a seed and the numbers of the images, so that a recording can be made again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from ..errors import UserError
from .call import Call
from .hooks import Ran, left_out
from .manifest import Drawing, Kind
from .store import HiddenStates

#: Share of an image's steps that is recorded where nothing else is asked for.
STEP_SHARE = 0.05


class StepDraw:
    """Which steps of a run are recorded: `steps` of them (None = 5 %, at least one) whose sigma lies in `sigmas`, drawn by
    `seed`; the same for the same seed and drawing."""

    steps: int | None
    sigmas: tuple[float, float]
    seed: int

    def check(self) -> None:
        """Raises `UserError` where this cannot be drawn."""
        low, high = self.sigmas
        if self.steps is not None and self.steps < 1:
            raise UserError(f"At least 1 step per image is recorded; asked for {self.steps}.")
        if not low <= high:
            raise UserError(f"A sigma range runs from low to high, within 0 and 1; found {low} to {high}.")

    def count(self, steps: int) -> int:
        """How many of a run's `steps` steps are recorded at most."""
        return min(steps, max(1, round(STEP_SHARE * steps)) if self.steps is None else self.steps)

    def drawn_steps(self, sigmas: Sequence[float], key: str) -> frozenset[int]:
        """Steps to record of a `Drawing` with that key; `sigmas` has one number more than there are steps."""
        low, high = self.sigmas
        known = [step for step, sigma in enumerate(sigmas[:-1]) if low <= sigma <= high]
        return frozenset(random.Random(f"{self.seed} {key}").sample(known, min(len(known), self.count(len(sigmas) - 1))))


class Recorder:
    """Records into `store` what `choice` says, over any number of runs, until there is no room left (`full`)."""

    store: HiddenStates
    choice: StepDraw
    full = False

    def begin(self) -> Run:
        """A run of the sampler: `finish` it when it ended well."""
        raise NotImplementedError

    @contextmanager
    def run(self) -> Iterator[Run]:
        """As `begin`; the run is finished when the `with` ends well."""
        run = self.begin()
        yield run
        run.finish()


class Run:
    """One sampling run; its images and steps are those of the first call that images are read from.

    Attributes:
        drawing: numbers of its images, from that call on. steps: that are recorded.
    """

    def __init__(self, recorder: Recorder, kind: Kind):
        self._to, self.kind = recorder, kind
        self.drawing: Drawing | None = None
        self.steps: frozenset[int] = frozenset()
        self._asked: list[tuple[str | None, int | None]] = []
        self._outside = False
        self._skipping = 0
        self._wrong: dict[str, int] = {}

    def wants(self, call: Call) -> bool:
        """Whether this call is to be recorded; the first one with images decides which steps are."""
        if self.drawing is None and call.rows:
            self.drawing = self._to.store.index(call.drawn, call.count)
            self._asked = [call.asked(image) for image in range(call.count)]
            if not self._to.full:
                self.steps = self._to.choice.drawn_steps(call.sigmas, self.key)
                self._outside = not self.steps
        return call.step in self.steps and bool(call.rows)

    @property
    def key(self) -> str:
        """What tokens and steps are drawn by."""
        return "" if self.drawing is None else self.drawing.key(self.kind)

    def is_whole(self, ran: Ran) -> bool:
        """Whether all blocks ran in a call; where only some did, that it was left out is noted."""
        self._skipping += bool(ran.blocks) and not ran.whole
        return ran.whole

    def all_finite(self, values: Iterable[tuple[str, Tensor]]) -> bool:
        """Whether all of `values`, by name, are finite; how many are not is noted."""
        wrong = {name: int((~tensor.isfinite()).sum()) for name, tensor in values if tensor.is_floating_point()}
        self._wrong |= {name: count for name, count in wrong.items() if count}
        return not any(wrong.values())

    def watching(self, model: nn.Module, call: Call) -> AbstractContextManager[None]:
        """Hooks on `model` for one call of it, if its step is one of `steps`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called once the run ended well."""

    @property
    def note(self) -> str:
        """What was left out, and why, in sentences; empty where nothing was."""
        said = [left_out(self._skipping)] if self._skipping else []
        if self._wrong:
            said.append(
                f"{sum(self._wrong.values()):,} recorded numbers are not finite (first in {next(iter(self._wrong))}): they are "
                "left out of the recording. Load the model in bfloat16 or float32."
            )
        if self._outside:
            low, high = self._to.choice.sigmas
            said.append(f"No step of this run has a noise level from {low:g} to {high:g}: nothing was recorded of it.")
        if self.drawing is not None and self.drawing.times.get(self.kind):
            said.append("These images were recorded before: change the prompt or the seed for others.")
        if self._to.full:
            said.append("The recording is as large as it may become: nothing more is taken.")
        return " ".join(said)
