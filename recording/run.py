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

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from .call import Call
from .hooks import left_out, watching_blocks
from .manifest import Capture, Drawing, Kind, Limit
from .store import HiddenStates

#: Share of an image's steps that is recorded where nothing else is asked for.
STEP_SHARE = 0.05


class StepDraw:
    """Which steps of a run are recorded: `steps` of them (None = 5 %, at least one) whose sigma lies in `sigmas`, drawn by
    `seed`; the same for the same seed and drawing."""

    steps: int | None
    sigmas: tuple[float, float]
    seed: int

    def __post_init__(self) -> None:
        low, high = self.sigmas
        if self.steps is not None and self.steps < 1:
            raise UserError(f"At least 1 step per image is recorded; asked for {self.steps}.")
        if not low <= high:
            raise UserError(f"A sigma range runs from low to high, within 0 and 1; found {low} to {high}.")

    def count(self, steps: int) -> int:
        return min(steps, max(1, round(STEP_SHARE * steps)) if self.steps is None else self.steps)

    def drawn_steps(self, sigmas: Sequence[float], key: str) -> frozenset[int]:
        """Steps to record of a `Drawing` with that key; `sigmas` has one number more than there are steps."""
        low, high = self.sigmas
        known = [step for step, sigma in enumerate(sigmas[:-1]) if low <= sigma <= high]
        return frozenset(random.Random(f"{self.seed} {key}").sample(known, min(len(known), self.count(len(sigmas) - 1))))


class Recorder:
    """Records into `store` what `choice` says, over any number of runs, until `limit` leaves no room (`full`)."""

    kind: Kind

    def __init__(self, store: HiddenStates, choice: StepDraw, limit: Limit | None):
        self.store, self.choice, self.limit = store, choice, limit
        self.full = False

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
    """One sampling run; its images and recorded steps are those of the first call that images are read from.

    `drawing` has their numbers in the store, from that call on.
    """

    def __init__(self, recorder: Recorder):
        self.recorder, self.kind = recorder, recorder.kind
        self.drawing: Drawing | None = None
        self.steps: frozenset[int] = frozenset()
        self._asked: list[tuple[str | None, int | None]] = []
        self._outside = self._noted = False
        self._skipping = 0
        self._wrong: dict[str, int] = {}

    def wants(self, call: Call) -> bool:
        """Whether this call is to be recorded; the first one with images decides which steps are."""
        recorder = self.recorder
        if self.drawing is None and call.rows:
            self.drawing = recorder.store.index(call.drawn, call.count)
            self._asked = [call.asked(image) for image in range(call.count)]
            if not recorder.full:
                self.steps = recorder.choice.drawn_steps(call.sigmas, self.drawing.key(self.kind))
                self._outside = not self.steps
        return call.step in self.steps and bool(call.rows)

    @contextmanager
    def watching(self, model: nn.Module, call: Call) -> Iterator[None]:
        """Hooks on `model` for one call of it, if its step is one of `steps`; what was seen is taken when it ends well."""
        if not self.wants(call):
            yield
            return
        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            take = self.hook(hooks, model, call)
            yield
        self._skipping += ran.skipped
        if ran.whole:
            take()

    def hook(self, hooks: ExitStack, model: nn.Module, call: Call) -> Callable[[], None]:
        """Puts hooks on `model` for one call, which `hooks` removes; what takes what they saw."""
        raise NotImplementedError

    def generator(self, call: Call, stream: str) -> torch.Generator:
        """What tokens of a call are drawn by."""
        assert self.drawing is not None
        text = f"{self.recorder.choice.seed} {self.drawing.key(self.kind)} {call.step} {stream}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def numbers(self, call: Call) -> Tensor:
        """The number in the store of each image that a call reads [images], int64."""
        assert self.drawing is not None
        return torch.tensor(call.read) + self.drawing.first

    def write(self, tensors: Mapping[str, Tensor], halvings: int = 0, captures: Sequence[Capture] = ()) -> None:
        """Adds a shard, unless a number in it is not finite; nothing more is recorded where there is no room for it."""
        wrong = {name: int((~values.isfinite()).sum()) for name, values in tensors.items() if values.is_floating_point()}
        self._wrong |= {name: count for name, count in wrong.items() if count}
        if any(wrong.values()):
            return
        recorder, store = self.recorder, self.recorder.store
        if not store.append(self.kind, tensors, recorder.limit, halvings, captures, None if self._noted else self.drawing):
            recorder.full, self.steps = True, frozenset()
        else:
            self._noted = self.drawing is not None

    def finish(self) -> None:
        """Called once the run ended well."""

    @property
    def note(self) -> str:
        """What was left out, and why, in sentences; empty where nothing was."""
        said = [left_out(self._skipping)]
        if self._wrong:
            said.append(
                f"{sum(self._wrong.values()):,} recorded numbers are not finite (first in {next(iter(self._wrong))}): they are "
                "left out of the recording. Load the model in bfloat16 or float32."
            )
        if self._outside:
            low, high = self.recorder.choice.sigmas
            said.append(f"No step of this run has a noise level from {low:g} to {high:g}: nothing was recorded of it.")
        if self.drawing is not None and self.drawing.times.get(self.kind):
            said.append("These images were recorded before: change the prompt or the seed for others.")
        if self.recorder.full:
            said.append("The recording is as large as it may become: nothing more is taken.")
        return " ".join(filter(None, said))
