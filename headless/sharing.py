"""Jobs shared out over ComfyUI servers: each takes the next one when it is free, and one that dies gives its own back.

outcome = share(["127.0.0.1:8188", "127.0.0.1:8189"], jobs, work)    # work(client, job), one job at a time on each server
outcome.failed, outcome.left
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Generic, TypeVar

from ..errors import UserError
from .asking import Refused, Unreachable
from .client import ComfyClient, Lost

Job = TypeVar("Job", bound=Hashable)

#: Seconds that no server may answer before all of them are given up: a restart may take as long.
PATIENCE = 180.0
#: Seconds between two looks at a server that does not answer.
LOOK = 1.0
#: Servers that may be lost over one job before it is taken to be what ends them.
LOSSES = 3


class Stopped(Exception):
    """Raised within `work` where everything is to stop."""


@dataclass
class Outcome(Generic[Job]):
    """What became of jobs that were not done: why they `failed`, or that they are `left`, for the reason `why`."""

    failed: dict[Job, str] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)
    why: UserError | None = None


def share(
    servers: Sequence[str],
    jobs: Sequence[Job],
    work: Callable[[ComfyClient, Job], None],
    say: Callable[[str], None] = lambda _: None,
    stopped: Event | None = None,
    patience: float = PATIENCE,
) -> Outcome[Job]:
    """Does all jobs, one at a time on each server; `say` is told of servers that go and come back.

    A job that ends in `UserError` failed, and the others go on. One whose server does not answer any more, or was restarted,
    is done again by any server; and a server that refuses a graph gets no more. Ctrl-C sets `stopped`: then `work` raises
    `Stopped` as soon as it can, and what is not done is left. Raises `Unreachable` where no server answers at the beginning.
    """
    sharing = _Sharing([*jobs], work, say, stopped or Event(), patience)
    clients: dict[str, ComfyClient | None] = {}
    missing: list[Unreachable] = []
    for address in dict.fromkeys(servers):
        try:
            clients[address] = ComfyClient(address)
        except Unreachable as error:
            clients[address] = None
            missing.append(error)
    if missing and len(missing) == len(clients):
        raise missing[0]
    for one in missing:
        say(f"{one} The others begin.")
    sharing.up = {address for address, client in clients.items() if client is not None}
    sharing.serving = len(clients)
    for found in clients.items():
        Thread(target=sharing.serve, args=found, daemon=True).start()
    try:
        sharing.wait()
    except KeyboardInterrupt:
        sharing.stopped.set()
        sharing.wait()
    if sharing.broken is not None:
        raise sharing.broken
    return sharing.outcome()


class _Sharing(Generic[Job]):
    def __init__(
        self,
        jobs: list[Job],
        work: Callable[[ComfyClient, Job], None],
        say: Callable[[str], None],
        stopped: Event,
        patience: float,
    ):
        self.waiting, self.running, self.serving = deque(jobs), 0, 0
        self.ended = Event()
        self.work, self.say, self.stopped, self.patience = work, say, stopped, patience
        self.up: set[str] = set()
        self.heard = time.monotonic()
        self.failed: dict[Job, str] = {}
        self.losses: Counter[Job] = Counter()
        self.why: UserError | None = None
        self.broken: BaseException | None = None
        self.changed = Condition()

    def wait(self) -> None:
        """Until all servers' threads have ended. No `Thread.join`: where Ctrl-C ends one, the thread is taken for dead."""
        while not self.ended.wait(0.1):  # one without an end would not hear Ctrl-C on Windows
            pass

    def outcome(self) -> Outcome[Job]:
        if isinstance(self.why, Refused) and not self.stopped.is_set():  # by all servers that were left
            self.failed |= dict.fromkeys(self.waiting, f"{self.why}")
            self.waiting.clear()
        return Outcome(self.failed, [*self.waiting], self.why)

    def serve(self, address: str, client: ComfyClient | None) -> None:
        """The life of one server's thread."""
        try:
            while True:
                client = client or self._again(address)
                if client is None or (job := self._take()) is None:
                    return
                try:
                    self.work(client, job)
                except Stopped:
                    self._put_back(job)
                except Refused as error:
                    self._put_back(job, error)
                    return self.say(f"{error} It gets no more runs.")
                except (Unreachable, Lost) as error:
                    client.__exit__()
                    client = None
                    self._give_back(address, job, error)
                except UserError as error:
                    self._end(job, f"{error}")
                else:
                    self._end(job)
        except BaseException as error:
            self.broken = error
            self.stopped.set()
        finally:
            if client is not None:
                client.__exit__()
            with self.changed:
                self.up.discard(address)
                self.serving -= 1
                self.changed.notify_all()
                if not self.serving:
                    self.ended.set()

    def _end(self, job: Job, failed: str | None = None) -> None:
        with self.changed:
            if failed is not None:
                self.failed[job] = failed
            self.running -= 1
            self.changed.notify_all()

    def _take(self) -> Job | None:
        """The next job; None when all are done, or it is over."""
        with self.changed:
            while not self.stopped.is_set():
                if self.waiting:
                    self.running += 1
                    return self.waiting.popleft()
                if not self.running:
                    return None
                self.changed.wait(LOOK)  # another server may yet give one back
        return None

    def _put_back(self, job: Job, why: UserError | None = None) -> None:
        with self.changed:
            self.why = why or self.why
            self.waiting.appendleft(job)
            self.running -= 1
            self.changed.notify_all()

    def _give_back(self, address: str, job: Job, error: UserError) -> None:
        with self.changed:
            self.up.discard(address)
            self.heard = time.monotonic()
            self.losses[job] += 1
        if self.losses[job] < LOSSES:
            self._put_back(job, error)
            return self.say(f"{error} Its run is given back.")
        self._end(job, f"a server was lost {LOSSES} times while it ran, last: {error}")

    def _again(self, address: str) -> ComfyClient | None:
        """A new connection, once the server answers; None when there is nothing left for it, or no server for too long."""
        while not self.stopped.is_set():
            with self.changed:
                idle = not self.waiting and not self.running
                if idle or (not self.up and time.monotonic() - self.heard > self.patience):
                    return None
            try:
                client = ComfyClient(address)
            except Unreachable as error:
                with self.changed:
                    self.why = self.why or error
                    self.changed.wait(LOOK)
                continue
            with self.changed:
                self.up.add(address)
            self.say(f"ComfyUI at {address} answers again.")
            return client
        return None
