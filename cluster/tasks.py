"""One task for each site, layer or point: given out by what it takes of a machine, and done again where it was lost.

    terms = Terms(lambda memory: Needs(cpus=1, memory=int(memory)), workers=4)
    done = carry_out(tasks, lambda needs: (Ranker, (source, needs.threads)), terms, before=3)
    done.failed, done.results

A worker is a plain class with `ready()` and `work(task)` (`crew.py`), which is made an actor of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..errors import UserError
from ..progress import Progress, part, silent
from .connect import Needs, Vanished, require_room
from .crew import share

#: Bytes that what a task holds is rounded up to, so that workers do for tasks that are nearly alike.
STEP = 0.25e9
#: Seconds that a task may take before its worker is taken to hang.
PATIENCE = 14_400.0


@dataclass(frozen=True)
class Task:
    """What is done at one place: `name`, what it is called; `memory`, about how many bytes it holds at most; `what`, for the
    worker."""

    name: str
    memory: float = field(default=0.0, compare=False)
    what: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Terms:
    """How tasks are given out.

    Attributes:
        needs: what a worker takes of a machine, from the bytes that its task holds.
        workers: at most so many at once; None for as many as there is room for.
        patience: seconds that a task may take before its worker is ended.
        say: told of workers that are lost and tasks that failed.
    """

    needs: Callable[[float], Needs] = lambda memory: Needs(memory=int(memory))
    workers: int | None = None
    patience: float = PATIENCE
    progress: Progress = silent
    say: Callable[[str], None] = lambda _: None


@dataclass
class Done:
    """How many tasks there are, how many were done before, why others failed, how often a worker was lost, and what tasks
    gave."""

    total: int = 0
    before: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    lost: int = 0
    results: dict[str, Any] = field(default_factory=dict)

    def then(self, other: Done) -> Done:
        """Of one after the other."""
        failed, results = {**self.failed, **other.failed}, {**self.results, **other.results}
        return Done(self.total + other.total, self.before + other.before, failed, self.lost + other.lost, results)


def carry_out(
    tasks: Sequence[Task],
    worker: Callable[[Needs], tuple[type, tuple[Any, ...]]],
    terms: Terms,
    before: int = 0,
    kept: str = "",
) -> Done:
    """Does all tasks, on the cluster that is connected; those that need most come first.

    Args:
        worker: the class of those that do it, and what they are made with.
        before: how many were done already. kept: where to find what is done, for a sentence.

    Raises `UserError` where no machine has room for one, or none can begin; `Vanished` where the cluster is lost.
    """
    import ray

    done, ended = Done(total=before + len(tasks), before=before), 0
    groups: dict[Needs, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: -task.memory):
        groups.setdefault(terms.needs(STEP * math.ceil(task.memory / STEP)), []).append(task)
    for needs, alike in groups.items():
        room = require_room(needs)
        kind, arguments = worker(needs)
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=0, **needs.options)(kind)
        told = part(terms.progress, ended, len(tasks), len(alike))
        try:
            outcome = share(
                alike, partial(actor.remote, *arguments), terms.workers or room,
                lambda task, result: done.results.update({task.name: result}), terms.patience, told, terms.say,
            )  # fmt: skip
        except Vanished as error:
            raise Vanished(f"{error} {kept} The same command goes on.".replace("  ", " ")) from error
        ended += len(alike)
        done.failed |= {task.name: why for task, why in outcome.failed.items()}
        done.lost += outcome.lost
    return done


class Worker:
    """What workers have in common: so many threads, and a sentence for whatever goes wrong."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)

    def ready(self) -> None:
        """Returns once the worker can begin."""

    def work(self, task: Task) -> Any:
        with explained(task.name):
            return self.do(task)

    def do(self, task: Task) -> Any:
        raise NotImplementedError


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Memory or a disk that is full, or a number that cannot be computed, is one task's failure, and a sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, MemoryError, RuntimeError, ArithmeticError) as error:
        first = (f"{error}".strip().splitlines() or [""])[0]
        raise UserError(f"{name} could not be done ({type(error).__name__}: {first:.200}).") from error
