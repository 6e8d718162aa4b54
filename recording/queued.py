"""Runs of a queue in internals files: each counts once, whatever happens to the servers that draw it.

    run = QueuedRun.from_json(inputs.get(MARK))      # what `flux-poke queue` writes beside a recording node's inputs
    add_run(path, internals, run)                    # as `add_to_file`, once for all attempts of a run
    merge_files(out, files)                          # of several servers

Between the moment a run is counted and the one its queue hears that it ended, a server may die: whether it counts is not known
then. So a file names the runs in it, and keeps the newest one's part apart, which another attempt replaces, and which the next
run takes out where the queue gave that attempt up. A queue sends a server one run at a time, so only the newest is in doubt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import check_sum, locked
from ..parsing import from_json
from .internals import Internals, LastRun, add_to_file

#: The name beside a recording node's inputs under which a queue says which run it is.
MARK = "queued_run"


@dataclass(frozen=True)
class QueuedRun:
    """`key` is the same in every attempt of a run; `given_up` are attempts on this server that are not to count."""

    key: str
    attempt: str
    given_up: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps([self.key, self.attempt, self.given_up])

    @classmethod
    def from_json(cls, text: Any) -> QueuedRun | None:
        """None where it is not what a queue wrote."""
        try:
            key, attempt, given_up = from_json(text)
            return cls(f"{key}", f"{attempt}", tuple(map(str, given_up)))
        except (TypeError, ValueError):
            return None


def add_run(path: str | os.PathLike[str], new: Internals, run: QueuedRun | None) -> Internals:
    """`add_to_file`, where a run of a queue counts once for all of its attempts; the total."""
    if run is None:
        return add_to_file(path, new)
    with locked(path):
        total = Internals.load(path) if Path(path).exists() else replace(new, sites=_none(new), runs=0, steps=0)
        last = total.last
        if last and (last.attempt in run.given_up or (last.key == run.key and last.attempt != run.attempt)):
            total = without_last(total)
        if run.key in total.queued and not (total.last and total.last.attempt == run.attempt):
            return total  # counted in an earlier attempt, before others
        part = LastRun(run.key, run.attempt, new.runs, new.steps, new.sites)
        if total.last and total.last.attempt == run.attempt:  # the second sampler of one graph
            part = _together(total.last, part)
        total = replace(total.merge(new, "This run"), queued=total.queued | {run.key}, last=part)
        total.save(path)
    return total


def without_last(total: Internals) -> Internals:
    """The recording as it was before the newest run of a queue."""
    last = total.last
    if last is None:
        return total
    return replace(
        total,
        sites={name: site - last.sites[name] for name, site in total.sites.items()},
        runs=total.runs - last.runs,
        steps=total.steps - last.steps,
        queued=total.queued - {last.key},
        last=None,
    )


def merge_files(out: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> Internals:
    """The sum of the recordings in `files`, written to `out`, which is a new file or one of them; the total.

    A run of a queue that two of them hold counts once. Raises `UserError`, with `out` as it was, where another file stands
    there, the recordings are not of one model, or a run that would count twice can no longer be told apart.
    """
    out = Path(out)
    if len({Path(file).resolve() for file in files}) < len(files):
        raise UserError("A recording is named twice, and would be counted twice: name each once.")
    with locked(out):
        check_sum(out, files)
        total = merged([Internals.load(file) for file in files], list(map(str, files)))
        total.save(out)
    return total


def merged(found: Sequence[Internals], names: Sequence[str]) -> Internals:
    """The sum of recordings, called by `names`, with every run of a queue counted once.

    Raises `UserError` where they are not of one model, or a run that would count twice can no longer be told apart.
    """
    (first, *others), (_, *called) = _each_run_once(found), names
    for name, other in zip(called, others, strict=True):
        first = first.merge(other, name)
    return first


def _each_run_once(found: Sequence[Internals]) -> list[Internals]:
    """The same recordings without runs in doubt that another one holds too: of two attempts in doubt, the larger one stays."""
    left = list(found)
    doubts = [number for number, one in enumerate(found) if one.last is not None]
    for number in sorted(doubts, key=lambda number: (_tokens(found[number]), found[number].last.attempt)):  # type: ignore[union-attr]
        last = left[number].last
        assert last is not None
        if any(last.key in other.queued for place, other in enumerate(left) if place != number):
            left[number] = without_last(left[number])
    return left


def _tokens(internals: Internals) -> int:
    return sum(site.tokens for site in internals.last.sites.values()) if internals.last else 0


def _together(one: LastRun, more: LastRun) -> LastRun:
    sites = {name: site + more.sites[name] for name, site in one.sites.items()}
    return replace(one, runs=one.runs + more.runs, steps=one.steps + more.steps, sites=sites)


def _none(internals: Internals) -> dict:
    return {name: site - site for name, site in internals.sites.items()}
