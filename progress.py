"""How far work is, told in one way everywhere, and how it is stopped.

    progress("ranking single-7", 3, 57)              # what is being done, how many of how many are done
    within = part(progress, 3, 57)                   # for the work on the fourth of 57: its own 0..total fills that place
    within("panel", 12, 192)                         # progress("panel", 3 + 12 / 192, 57)

Work that takes more than a second calls it at least once a second where it can. An exception that it raises stops the
work, which then loses nothing that was finished: this is how Cancel comes in.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Told what is being done, how much of it is done, and of how much; an exception from it cancels.
Progress = Callable[[str, float, float], None]


def silent(what: str, done: float, total: float) -> None:
    """Progress that nobody looks at."""


def part(progress: Progress, done: float, total: float, size: float = 1.0) -> Progress:
    """Progress of work that is `size` of the `total` of `progress`, of which `done` are done when it begins."""
    return lambda what, inner, of: progress(what, done + size * inner / max(of, 1e-9), total)


def renamed(progress: Progress, what: str) -> Progress:
    """The same progress under one name, whatever the inner work calls its steps."""
    return lambda _, done, total: progress(what, done, total)


@contextmanager
def whole() -> Iterator[None]:
    """Ctrl-C waits for the end of the `with`: for work of a moment that is done whole or not at all.

    Only the main thread is interrupted by it, so in others there is nothing to wait for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)
