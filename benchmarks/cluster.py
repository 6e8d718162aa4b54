"""A recording on a Ray cluster of two machines (both this one): what workers add, what losses cost, what a simulation says.

    OMP_NUM_THREADS=1 uv run python benchmarks/cluster.py [--prompts 200] [--batch 4] [--steps 80]

The tiny FLUX draws the same prompts in one process, and on the cluster with 1, 2 and 4 workers of one thread each; then with 4
workers while workers are killed every few seconds and one machine is lost and comes back. All recordings are compared with that
of one process, to the last bit. `benchmarks/scale.py` predicts the runs with 2 and 4 workers from that with 1.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import figure
from flux_poke.cluster.connect import Needs, connected
from flux_poke.cluster.crew import share
from flux_poke.cluster.parts import Joiner
from flux_poke.cluster.pieces import drawn_pieces
from flux_poke.cluster.record import TinyJob, record
from flux_poke.recording.drawing import Wanted
from flux_poke.recording.drawing import record as record_here
from flux_poke.recording.manifest import Limit
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from scale import Service, simulate

sys.path.append(str(Path(__file__).parents[1] / "tests" / "unit"))
from two_nodes import Nodes, two_nodes

TINY = FOLDER / "flux.safetensors"
WANTED = Wanted(internals=True, rows=RowChoice(64), limit=Limit(1.0))
#: Seconds between two losses, on average.
LOSSES = 5.0


@dataclass(frozen=True)
class Timeline:
    """Seconds: of all, until every worker had written its first piece, from then on to the last one, of which there were
    `pieces`, and to the end."""

    seconds: float
    first: float
    between: float
    pieces: int
    end: float

    @classmethod
    def of(cls, folder: Path, began: float, workers: int) -> Timeline:
        end, files = time.time(), sorted(folder.glob("hidden_states/rows-*.safetensors"))  # by piece
        written = [path.stat().st_mtime for path in files]
        first, last = max(written[:workers]), max(written)  # each worker begins with one of the first pieces
        return cls(end - began, first - began, last - first, sum(one > first for one in written), end - last)

    @property
    def rate(self) -> float:
        """Pieces a second, while all workers work."""
        return self.pieces / self.between

    def service(self, joins: float, crowded: float) -> Service:
        """What a run with one worker tells of how long things take."""
        draw = 1 / self.rate
        return Service(start=self.first - draw, draw=draw, joins=joins, finish=self.end, crowded=crowded)


class Losing:
    """Progress that now and then kills a worker, and once takes a machine away, which comes back."""

    def __init__(self, nodes: Nodes, seed: int):
        self.nodes, self.random = nodes, random.Random(seed)
        self.kills, self.machine, self.next = 0, "there", time.monotonic() + LOSSES

    def __call__(self, what: str, done: float, total: float) -> None:
        if done >= total / 3 and self.machine == "there":
            self.nodes.lose_machine()
            self.machine = "lost"
        elif done >= total / 2 and self.machine == "lost":
            self.nodes.add_machine()
            self.machine = "back"
        if time.monotonic() > self.next:
            self.kills += self.nodes.lose_worker("TinyWorker.work", self.random.randrange(4))
            self.next = time.monotonic() + self.random.expovariate(1 / LOSSES)


class Idle:
    """A worker to which nothing is any work."""

    def ready(self) -> None: ...

    def work(self, piece: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [digit_prompts(number % 10)[number // 10 % 26] for number in range(given.prompts)]
    job = TinyJob(TINY, WANTED, given.steps, given.batch, given.seed)
    pieces = len(job.pieces(prompts))
    with tempfile.TemporaryDirectory() as folder:
        alone, began = Recording.at(Path(folder) / "alone"), time.monotonic()
        record_here(TINY, prompts, alone, WANTED, given.seed, given.steps, given.batch)
        seconds = time.monotonic() - began
        figure(f"one process: {seconds:.1f} s, {seconds / pieces:.3f} a piece of {pieces}", seconds=seconds, pieces=pieces)
        crowded: dict[int, float] = {}
        cores, some = os.cpu_count() or 1, partial(drawing, prompts[: 4 * given.batch], given.steps, given.batch)
        for processes in (1, 2, 4):
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                took = median(one.result() for one in [pool.submit(some) for _ in range(2 * processes)])
            crowded[processes] = took / crowded.get(1, 1.0) / (max(1.0, processes / cores) if processes > 1 else 1.0)
            if processes > 1:
                speed = min(processes, cores) / crowded[processes]
                figure(f"{processes} processes beside each other: {speed:.2f} times as fast as one", speed=speed)
        with two_nodes() as nodes, connected(nodes.address):
            import ray

            record(job, prompts[:8], str(Path(folder) / "warm"), Needs(), 2)  # Ray's own beginnings
            new: Any = ray.remote(num_cpus=0)(Joiner)
            began = time.monotonic()
            joiner = new.remote(f"{Path(folder) / 'warm'}")
            ray.get(joiner.__ray_ready__.remote())
            begins = time.monotonic() - began
            ray.kill(joiner)
            runs: dict[int, Timeline] = {}
            for workers in (1, 2, 4):
                out, began = Path(folder) / f"{workers}", time.time()
                record(job, prompts, str(out), Needs(), workers)
                runs[workers] = run = Timeline.of(out, began, workers)
                require_equal(alone, Recording.open(out))
                speed = run.rate / runs[1].rate
                figure(
                    f"{workers} workers: {run.seconds:.1f} s (a piece of each after {run.first:.1f}, then {run.between:.1f}, "
                    f"end {run.end:.1f}); {speed:.2f} times as many pieces a second, equal to one process",
                    workers=workers, seconds=run.seconds, speed=speed,
                )  # fmt: skip
            for workers in (2, 4):
                expected = simulate(runs[1].service(begins, crowded[workers]), pieces, workers, cores=os.cpu_count()).seconds
                part = expected / runs[workers].seconds
                figure(
                    f"{workers} workers, simulated: {expected:.1f} s, {part:.2f} of what was measured",
                    workers=workers,
                    part=part,
                )
            losing, out, began = Losing(nodes, given.seed), Path(folder) / "losses", time.time()
            recorded = record(job, prompts, str(out), Needs(), 4, progress=losing)
            require_equal(alone, Recording.open(out))
            seconds = time.time() - began
            figure(
                f"4 workers, {losing.kills} killed and a machine lost ({losing.machine}): {recorded.lost} pieces done again, "
                f"{seconds:.1f} s, equal to one process",
                kills=losing.kills, lost=recorded.lost, seconds=seconds,
            )  # fmt: skip
            nothing, ended = drawn_pieces(["-"] * 2000, 0, 1, ""), list[float]()
            share(nothing, lambda: ray.remote(num_cpus=1)(Idle).remote(), 4, lambda *_: ended.append(time.monotonic()), 60)
            took = 1000 * (ended[-1] - ended[0]) / len(ended)
            figure(f"the head: {took:.1f} ms for each of 2,000 pieces that are no work", ms=took)


def drawing(prompts: list[str], steps: int, batch: int) -> float:
    """Seconds that recording takes here; the first prompts are for what is read and made once."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record_here(TINY, prompts[:batch], Recording.at(Path(folder) / "first"), WANTED, steps=2, batch=batch)
        began = time.monotonic()
        record_here(TINY, prompts, Recording.at(Path(folder) / "all"), WANTED, steps=steps, batch=batch)
        return time.monotonic() - began


def require_equal(one: Recording, other: Recording) -> None:
    """To the last count, and the last bit of every row."""
    for name, site in one.internals().sites.items():
        found = other.internals().sites[name]
        assert site.tokens == found.tokens
        for part in ("fires", "sum", "sum_sq"):
            assert torch.equal(getattr(site, part), getattr(found, part)), name
        for rows, same in zip(one.states().rows(name), other.states().rows(name), strict=True):
            assert torch.equal(rows.x, same.x), name
            assert torch.equal(rows.image, same.image), name


if __name__ == "__main__":
    main()
