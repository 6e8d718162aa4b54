"""Workers of a cluster that share pieces of work: each takes the next one when it is free.

    outcome = share(pieces, lambda: Worker.options(...).remote(...), workers=4, done=print)
    outcome.failed

A worker is a Ray actor with `ready()` and `work(piece)`. What a worker had when it was lost is done again by another one. A
worker that takes too long over a piece is ended and replaced, as one is that was lost with its machine.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ..errors import UserError
from ..progress import Progress, silent
from .connect import FETCH, watched

#: Workers that may be lost over one piece before it is taken to be what ends them, and times that one may fail to begin.
LOSSES, BEGINNINGS = 4, 3
#: Seconds between two looks, after which a worker that was lost begins again, and in which no worker can begin before it is
#: given up: machines may have to be started.
LOOK, REST, PATIENCE = 0.5, 1.0, 900.0


class Lost(UserError):
    """Raised by a worker that cannot go on with its piece, which another one may: a ComfyUI that hangs."""


class Named(Hashable, Protocol):
    """A piece of work: equal ones are one."""

    @property
    def name(self) -> str:
        """For a line on the terminal."""
        ...


Piece = TypeVar("Piece", bound=Named)


@dataclass
class Outcome(Generic[Piece]):
    """Why pieces `failed`, and how often a worker was `lost` over one."""

    failed: dict[Piece, str] = field(default_factory=dict)
    lost: int = 0


@dataclass
class _Worker:
    """An actor, and what it does since when (`time.monotonic`); without a piece, it begins, rests or waits."""

    actor: Any
    piece: Any = None
    since: float = field(default_factory=time.monotonic)
    rests_until: float = 0.0
    failed: int = 0  # to begin, in a row


def share(
    pieces: Sequence[Piece],
    hire: Callable[[], Any],
    workers: int,
    done: Callable[[Piece, Any], None],
    patience: float,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome[Piece]:
    """Does all pieces; `done(piece, result)` is called here for each, in the order in which they end.

    Args:
        hire: makes an actor; up to `workers` of them, which are ended when all is done, or an exception comes.
        patience: seconds that a piece may take before its worker is taken to hang.
        progress: told at least every second; an exception from it stops all.
        say: told of workers that are lost.

    A piece that ends in `UserError` failed, and the others go on. Raises what a worker does that cannot begin, `BEGINNINGS`
    times in a row, `UserError` where none begins within `PATIENCE` seconds, and `Vanished` where the cluster no longer answers.
    """
    return watched(lambda told: _Crew(pieces, hire, done, patience, told, say).run(min(workers, len(pieces))), progress)


class _Crew(Generic[Piece]):
    def __init__(
        self,
        pieces: Sequence[Piece],
        hire: Callable[[], Any],
        done: Callable[[Piece, Any], None],
        patience: float,
        progress: Progress,
        say: Callable[[str], None],
    ):
        self.waiting, self.total, self.ended = deque(pieces), len(pieces), 0
        self.hire, self.done, self.patience, self.progress, self.say = hire, done, patience, progress, say
        self.busy: dict[Any, _Worker] = {}
        self.idle: list[_Worker] = []
        self.resting: list[_Worker] = []
        self.why = ""
        self.losses: Counter[Piece] = Counter()
        self.outcome: Outcome[Piece] = Outcome()
        self.began = time.monotonic()

    def run(self, workers: int) -> Outcome[Piece]:
        import ray

        try:
            for _ in range(workers):
                self._begin(_Worker(self.hire()))
            while self.ended < self.total:
                self._tell()
                self._begin_rested()
                if self.busy:
                    ended, _ = ray.wait([*self.busy], timeout=LOOK)
                    for result in ended:
                        self._take(self.busy.pop(result), result)
                else:
                    time.sleep(LOOK)
                self._end_overdue()
                self._require_any()
            self._tell()
        finally:
            for worker in (*self.busy.values(), *self.idle, *self.resting):
                ray.kill(worker.actor, no_restart=True)
        return self.outcome

    def _begin(self, worker: _Worker) -> None:
        self.busy[worker.actor.ready.remote()] = worker

    def _begin_rested(self) -> None:
        for worker in [worker for worker in self.resting if time.monotonic() > worker.rests_until]:
            self.resting.remove(worker)
            self._begin(worker)

    def _next(self, worker: _Worker) -> None:
        if not self.waiting:
            worker.piece = None
            self.idle.append(worker)
            return
        worker.piece, worker.since = self.waiting.popleft(), time.monotonic()
        self.busy[worker.actor.work.remote(worker.piece)] = worker

    def _take(self, worker: _Worker, result: Any) -> None:
        """What became of what a worker did."""
        import ray

        try:
            found = ray.get(result, timeout=FETCH)
        except ray.exceptions.RayTaskError as error:
            self._failed(worker, error.cause if isinstance(error.cause, Exception) else error)
        except ray.exceptions.ActorUnavailableError as error:  # its process or its machine; Ray starts it again
            self._lost(worker, f"its process ended ({_first_line(error)})")
        except ray.exceptions.RayError as error:  # for good; or what it returned was lost with its machine
            ray.kill(worker.actor)
            worker.actor = self.hire()
            self._lost(worker, f"its process ended ({_first_line(error)})")
        else:
            worker.failed = 0
            if worker.piece is not None:
                self.ended += 1
                self.done(worker.piece, found)
            self._next(worker)

    def _failed(self, worker: _Worker, error: Exception) -> None:
        if isinstance(error, Lost):
            return self._lost(worker, f"{error}")
        if worker.piece is None:
            worker.failed += 1
            if worker.failed == BEGINNINGS:
                raise error
            self.say(f"A worker could not begin, and tries again: {_said(error)}")
            return self._rest(worker)
        self._give_up(worker.piece, _said(error))
        self._next(worker)

    def _lost(self, worker: _Worker, why: str) -> None:
        """Gives back its piece; the worker begins again after a rest."""
        piece, worker.piece, self.why = worker.piece, None, why
        self._rest(worker)
        if piece is not None:
            worker.since = time.monotonic()
            self.outcome.lost += 1
            self.losses[piece] += 1
            if self.losses[piece] < LOSSES:
                self.waiting.appendleft(piece)
                self.say(f"A worker was lost over {piece.name}, which is given back: {why}.")
            else:
                self._give_up(piece, f"{LOSSES} workers were lost over it, last: {why}")
        while self.waiting and self.idle:
            self._next(self.idle.pop())

    def _rest(self, worker: _Worker) -> None:
        worker.rests_until = time.monotonic() + REST
        self.resting.append(worker)

    def _give_up(self, piece: Piece, why: str) -> None:
        self.ended += 1
        self.outcome.failed[piece] = why
        self.say(f"{piece.name} failed: {why}")

    def _end_overdue(self) -> None:
        import ray

        for worker in self.busy.values():
            if worker.piece is not None and time.monotonic() - worker.since > self.patience:
                self.say(f"{worker.piece.name} takes more than {self.patience:.0f} s: its worker is ended.")
                worker.since = time.monotonic()
                ray.kill(worker.actor, no_restart=False)  # what it did ends in an error now

    def _require_any(self) -> None:
        """Raises `UserError` where none is at work, and none could begin for too long."""
        workers = (*self.busy.values(), *self.resting)
        since = [time.monotonic() if worker.piece is not None else worker.since for worker in workers]
        if since and time.monotonic() - max(since) > PATIENCE:
            raise UserError(
                f"No worker could begin for {PATIENCE / 60:.0f} minutes: the cluster has no machine left for one, or they fail "
                f"as they start ({self.why or 'none was lost'}; Ray's dashboard and its logs tell)."
            )

    def _tell(self) -> None:
        """Done, running, failed, rate and time left, in a line."""
        running, failed = sum(worker.piece is not None for worker in self.busy.values()), len(self.outcome.failed)
        done, seconds = self.ended - failed, time.monotonic() - self.began
        rate = done / seconds if seconds else 0.0
        left = f", {_time((self.total - self.ended) / rate)} left" if rate else ""
        parts = [f"{done:,} of {self.total:,} done", f"{running} running", *([f"{failed} failed"] if failed else [])]
        self.progress(f"{', '.join(parts)}, {60 * rate:.3g} a minute{left}", self.ended, self.total)


def _said(error: Exception) -> str:
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _time(seconds: float) -> str:
    """A time to wait, in the two largest units."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{hours} h {round(seconds % 3600 / 60)} min"
