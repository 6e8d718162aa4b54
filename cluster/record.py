"""`flux-poke cluster record`: a file of prompts, recorded by all machines of a cluster as by one.

    job = TinyJob(checkpoint, Wanted(internals=True, rows=RowChoice()), steps=20, batch=16)
    recorded = record(job, prompts, "out/digits", Needs(cpus=1), workers=4)
    recorded.total, recorded.failed                  # out/digits is a recording like any other

What is recorded is the same as on one machine, to the last count, however often workers are lost on the way: a piece's images
are drawn together, have their numbers in the whole, and count once (`parts.py`). Called again with the same arguments, it goes
on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..headless.queue import recording_names
from ..headless.runs import make_runs
from ..headless.workflow import Graph
from ..progress import Progress, silent
from ..recording.drawing import Wanted
from ..recording.manifest import MANIFEST
from ..recording.recording import INTERNALS, STATES
from .connect import Needs, Vanished, require_room, results, watched
from .copies import absolute
from .crew import share
from .parts import PARTS, Joiner, Part, find_parts
from .pieces import Piece, drawn_pieces, queued_pieces
from .shared import Shared, claim
from .tasks import Done

FORMAT, ABOUT = "flux-poke cluster recording 1", "cluster.json"
#: Parts that are put together at once, and workers whose parts one process puts together.
FAN, JOINED_BY_ONE = 16, 64
#: Times that Ray starts a worker or a merge again which it lost.
AGAIN = 10


class Job(Protocol):
    """What is recorded, and by whom."""

    def about(self) -> dict[str, Any]:
        """What tells it from another one; as JSON."""
        ...

    def pieces(self, prompts: Sequence[str]) -> list[Piece]: ...

    def worker(self, url: str, needs: Needs) -> tuple[type, tuple[Any, ...]]:
        """Its class, and what it is made with."""
        ...


@dataclass(frozen=True)
class TinyJob:
    """By the reference runtime: `checkpoint` is a FLUX of the tiny kind, at the same place on every machine."""

    checkpoint: Path
    wanted: Wanted
    steps: int = 20
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.wanted.internals or self.wanted.atlas:
            raise UserError(
                "A cluster records internals, with or without hidden states, and no atlas: give --what internals,..."
            )

    def about(self) -> dict[str, Any]:
        model = Fingerprint.of_checkpoint(Checkpoint(self.checkpoint)).digest
        return {"model": model, "wanted": repr(self.wanted), "steps": self.steps, "batch": self.batch, "seed": self.seed}

    def pieces(self, prompts: Sequence[str]) -> list[Piece]:
        return drawn_pieces(prompts, self.seed, self.batch, json.dumps(self.about()))

    def worker(self, url: str, needs: Needs) -> tuple[type, tuple[Any, ...]]:
        from .workers import TinyWorker

        return TinyWorker, (url, Path(absolute(self.checkpoint)), self.wanted, self.steps, needs.threads)


@dataclass(frozen=True)
class ComfyJob:
    """By ComfyUI: a workflow in API form that records under one name, on servers from the folder `comfyui` of every machine.

    `settings` are NODE.INPUT=VALUE, as `flux-poke queue` takes them; what `batch` runs leave is brought together; a run that
    tells nothing for `patience` seconds hangs.
    """

    graph: Graph
    comfyui: Path
    settings: Sequence[str] = ()
    batch: int = 16
    options: Sequence[str] = ()
    patience: float = 600.0

    def about(self) -> dict[str, Any]:
        return {"workflow": hashlib.sha256(json.dumps([self.graph, *self.settings]).encode()).hexdigest()}

    def pieces(self, prompts: Sequence[str]) -> list[Piece]:
        runs = make_runs(self.graph, self.settings, prompts)
        names = recording_names(runs)
        if len(names) != 1:
            raise UserError(
                f"The workflow records under {len(names)} names ({', '.join(names) or 'none'}), and one is expected: have one "
                "Record node in it, or give all of them the same recording."
            )
        return queued_pieces(runs, self.batch)

    def worker(self, url: str, needs: Needs) -> tuple[type, tuple[Any, ...]]:
        from .workers import ComfyWorker

        return ComfyWorker, (url, Path(absolute(self.comfyui.expanduser())), [*self.options], self.patience)


def record(
    job: Job,
    prompts: Sequence[str],
    url: str,
    needs: Needs,
    workers: int | None = None,
    patience: float = 3600.0,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Done:
    """Draws every prompt once, on the cluster that is connected, and adds it up in the folder at `url`.

    Args:
        needs: what a worker takes; without a number of `workers`, as many as there is room for.
        patience: seconds that a piece may take before its worker is ended.

    Raises `UserError` where the folder holds something else, nothing can be recorded so, or no worker can begin; `Vanished`
    where the cluster is lost. What was recorded until then is kept.
    """
    import ray

    url = absolute(url)
    shared, pieces = Shared(url), job.pieces(prompts)
    _claim(shared, job, pieces)
    known, parts = find_parts(shared)
    there = known | {key for part in parts for key in part.pieces}
    left = [piece for piece in pieces if piece.key not in there]
    room = require_room(needs)
    most = min(workers or room, len(left))
    merger = _Merger(url, parts, most)
    kind, arguments = job.worker(url, needs)
    actor: Any = ray.remote(max_restarts=-1, max_task_retries=0, **needs.options)(kind)

    def done(piece: Piece, part: Part) -> None:
        merger.add(part)

    try:
        outcome = share(left, lambda: actor.remote(*arguments), most, done, patience, progress, say)
        watched(merger.finish, progress)
        if not outcome.failed:  # of attempts that nobody heard of
            shared.remove(PARTS)
    except Vanished as error:
        raise Vanished(f"{error} What was recorded is in {shared}. The same command goes on.") from error
    failed = {piece.name: why for piece, why in outcome.failed.items()}
    return Done(len(pieces), len(pieces) - len(left), failed, outcome.lost)


def _claim(shared: Shared, job: Job, pieces: Sequence[Piece]) -> None:
    """Notes whose the folder is; raises `UserError` where it is another recording's."""
    keys = hashlib.sha256(json.dumps([piece.key for piece in pieces]).encode()).hexdigest()
    if not shared.exists(ABOUT) and (shared.exists(INTERNALS) or shared.exists(f"{STATES}/{MANIFEST}")):
        raise UserError(f"{shared} holds a recording that no cluster made: choose another folder with --out, and merge them.")
    claim(shared, ABOUT, {"format": FORMAT, **job.about(), "pieces": keys}, "recording")


class _Merger:
    """Puts parts together while others are recorded, `FAN` of about one size at a time: a tree of merges, of which the folder
    holds few at once. Those who merge begin with the workers and stay: a process takes longer to start than to merge, and
    takes a processor from them while it does."""

    def __init__(self, url: str, parts: Sequence[Part], workers: int):
        import ray

        beside: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": AGAIN}  # workers hold all processors
        new: Any = ray.remote(**beside)(Joiner)
        self.parts, self.merging = [*parts], list[Any]()
        self._joiners = deque(new.remote(url) for _ in range(max(bool(parts), math.ceil(workers / JOINED_BY_ONE))))

    def add(self, part: Part) -> None:
        self.parts.append(part)
        self._collect(wait=False)
        small = sorted(self.parts, key=lambda part: len(part.pieces))[:FAN]
        if len(small) == FAN and len(small[-1].pieces) < FAN * max(len(small[0].pieces), 1):
            self.parts = [part for part in self.parts if part not in small]
            self.merging.append(self._joiner().merge.remote(small))

    def finish(self, progress: Progress) -> None:
        progress("putting the parts together", 0, 1)
        self._collect(wait=True)
        if self.parts:
            results([self._joiner().finish.remote(self.parts)])
        progress("recorded", 1, 1)

    def _joiner(self) -> Any:
        """The one whose turn it is."""
        self._joiners.rotate()
        return self._joiners[0]

    def _collect(self, wait: bool) -> None:
        """Takes the parts that were put together by now, or all of them."""
        import ray

        while self.merging:
            ended, self.merging = ray.wait(self.merging, timeout=None if wait else 0)
            if not ended:
                return
            self.parts += results(ended)
