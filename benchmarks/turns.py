"""Calls timed in turns, so that a busy machine slows all of them; a ratio is the median over turns.

    seconds = in_turns({"plain": plain, "recorded": recorded}, repeats=9, device=device)
    ratio(seconds["recorded"], seconds["plain"])

On a CPU it is processor time that counts, which a busy machine lengthens less than the clock's; with more than one thread it
is the sum of theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def in_turns(
    calls: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[Name, list[float]]:
    """Seconds of every call, `repeats` times, one call after the other; `warm_up` rounds before that are not counted.

    On a GPU they are the clock's, with what the device does; on a CPU the processor's.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            begun = now(device)
            call()
            took = now(device) - begun
            if turn >= warm_up:
                seconds[name].append(took)
    return seconds


def now(device: torch.device) -> float:
    """Seconds by the clock that `in_turns` uses, after all work of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over turns of the one in units of the other."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))
