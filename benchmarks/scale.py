"""What a recording on 1 to 1,000 workers would take: a simulation of discrete events, with service times that were measured.

    uv run --with simpy python benchmarks/scale.py [--seconds 15] [--start 90] [--price 2.5]

Workers take pieces from the head, draw them, and write what they recorded to one shared folder; parts are merged `FAN` at a
time, and workers are lost and begin again. `benchmarks/cluster.py` compares it with what was measured on two cores.
`--seconds` an image, `--start` of a worker and `--price` of a GPU and hour are assumptions: put your own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Generator
from dataclasses import dataclass, replace

import simpy
from figures import figure
from flux_poke.cluster.record import FAN


@dataclass(frozen=True)
class Service:
    """Seconds that things take, and what is written.

    Attributes:
        start: of a worker, until it takes its first piece.
        joins: until who merges can begin, which is beside the workers.
        draw: of a piece, until it is to be written.
        merge: of one part that is merged.
        finish: of putting the last parts together.
        head: of the head, for each piece that ends.
        internals, states: bytes of a piece: those that are merged, and those that stay where they are.
        bandwidth: bytes a second of the shared folder, read and written, of all workers together.
        lasts: until a worker is lost, on average; None = never.
        crowded: how much longer computing takes on a core while others compute on all cores of its machine.
    """

    start: float
    draw: float
    joins: float = 0.0
    merge: float = 0.0
    finish: float = 0.0
    head: float = 0.0
    internals: float = 0.0
    states: float = 0.0
    bandwidth: float = 1e9
    lasts: float | None = None
    crowded: float = 1.0


@dataclass(frozen=True)
class Simulated:
    """Seconds in all, and shares of them: the workers' at work on pieces that count, the folder's and the head's in use."""

    seconds: float
    useful: float
    folder: float
    head: float
    lost: int


class Cluster:
    """Workers on `cores` that they share, or each on a machine of its own."""

    def __init__(self, service: Service, pieces: int, workers: int, cores: int | None = None, seed: int = 0):
        self.service, self.left, self.workers = service, pieces, workers
        self.env, self.random = simpy.Environment(), random.Random(seed)
        self.cores = simpy.Resource(self.env, cores) if cores else None
        self.folder, self.head = simpy.Resource(self.env, 1), simpy.Resource(self.env, 1)
        self.ended, self.parts, self.lost = 0, 0, 0
        self.used = {"drawn": 0.0, "folder": 0.0, "head": 0.0}
        self.pieces, self.all = pieces, self.env.event()
        self.merges: list[simpy.Process] = []

    def run(self) -> Simulated:
        for _ in range(self.workers):
            self.env.process(self._worker())
        if self.cores is not None:  # on machines of their own, they begin before there is anything to merge
            self.env.process(self._compute(self.service.joins))
        self.env.run(self.all)
        self.env.run(self.env.process(self._finish()))
        now = self.env.now
        shares = self.used["drawn"] / now / self.workers, self.used["folder"] / now, self.used["head"] / now
        return Simulated(now, *shares, self.lost)

    def _worker(self) -> Generator:
        service = self.service
        until = self.env.now + (self.random.expovariate(1 / service.lasts) if service.lasts else float("inf"))
        yield from self._compute(service.start)
        while self.left:
            self.left -= 1
            if self.env.now + service.draw > until:  # it is lost over this piece, which is given back
                yield self.env.timeout(max(until - self.env.now, 0.0))
                self.left += 1
                self.lost += 1
                self.env.process(self._worker())
                return
            yield from self._compute(service.draw)
            yield from self._use(self.folder, "folder", (service.internals + service.states) / service.bandwidth)
            yield from self._use(self.head, "head", service.head)
            self.used["drawn"] += service.draw
            self.ended += 1
            self.parts += 1
            if self.parts >= FAN:
                self.parts -= FAN
                self.merges.append(self.env.process(self._merge(FAN)))
            if self.ended == self.pieces:
                self.all.succeed()

    def _merge(self, parts: int) -> Generator:
        """Reads that many parts and writes one; higher levels of the tree add 1 / (FAN - 1) to it."""
        share = FAN / (FAN - 1)
        yield from self._use(self.folder, "folder", share * (parts + 1) * self.service.internals / self.service.bandwidth)
        yield from self._compute(share * parts * self.service.merge)

    def _finish(self) -> Generator:
        yield self.env.all_of(self.merges)
        yield self.env.timeout(self.service.finish)

    def _compute(self, seconds: float) -> Generator:
        """On a machine of its own, or in turns of a tenth of a second on cores that others use too."""
        if self.cores is None:
            yield self.env.timeout(seconds)
            return
        while seconds > 1e-9:
            turn = min(seconds, 0.1)
            with self.cores.request() as core:
                yield core
                yield self.env.timeout(turn * (self.service.crowded if self.cores.count == self.cores.capacity else 1.0))
            seconds -= turn

    def _use(self, what: simpy.Resource, name: str, seconds: float) -> Generator:
        with what.request() as turn:
            yield turn
            yield self.env.timeout(seconds)
        self.used[name] += seconds


def simulate(service: Service, pieces: int, workers: int, cores: int | None = None, seed: int = 0) -> Simulated:
    return Cluster(service, pieces, workers, cores, seed).run()


#: FLUX.1-dev: internals of all MLPs, and 64 rows of each of an image.
INTERNALS, ROWS = 22.5e6, 45e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of an image, on one GPU")
    parser.add_argument("--start", type=float, default=90.0, help="of a worker: ComfyUI and the model")
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU for an hour")
    parser.add_argument("--head", type=float, default=0.001, help="seconds of the head for a piece (cluster.py measures it)")
    parser.add_argument("--lasts", type=float, default=4.0, help="hours until a worker is lost")
    given = parser.parse_args()
    base = Service(given.start, given.seconds, merge=0.1, finish=5.0, head=given.head, lasts=3600 * given.lasts)
    for bandwidth, place in ((5e8, "one disk over the network"), (2e10, "an object store")):
        for batch in (1, 16):
            service = replace(base, draw=given.seconds * batch, internals=INTERNALS, states=ROWS * batch, bandwidth=bandwidth)
            for prompts in (1_000, 10_000, 100_000):
                for workers in (1, 10, 100, 1_000):
                    if prompts // batch < workers:
                        continue
                    found = simulate(service, -(-prompts // batch), workers)
                    hours = found.seconds / 3600
                    figure(
                        f"{place}, {batch:>2} a piece, {prompts:>7,} prompts, {workers:>5,} workers: {hours:>7.2f} h, "
                        f"{workers * hours * given.price:>9,.0f} $, workers {found.useful:.0%} useful, "
                        f"folder {found.folder:.0%}, head {found.head:.0%}, {found.lost} lost",
                        place=place, batch=batch, prompts=prompts, workers=workers, hours=hours,
                        price=workers * hours * given.price, useful=found.useful, folder=found.folder, head=found.head,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
