"""`flux-poke cluster sweep`: shares to cut x scores x precisions, each measured on held-out prompts.

    points = grid([0.25, 0.5], ["obs", "fluctuation"], ["stored", "fp8"])
    done = sweep(source, Measuring(prompts, seed=0), points, "sweep", terms)
    found = measured(done)                           # Measured for each, the Pareto points among them in `best`

A point is a task: plan, cut, repair, save, load what was saved, measure. What it found is a file, `points/NAME.json`, so that
the same command goes on, and further points join it. Beside them come `table.csv` and `pareto.png`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from ..analysis.exam import Exam
from ..analysis.pareto import pareto, pareto_figure
from ..errors import UserError
from ..files import write_picture
from ..flux.checkpoint import Checkpoint
from ..flux.weights import Plain
from ..parsing import from_json
from ..pruning.checkpoint import save_pruned
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.planning import ByBudget, ByCount, make_plan
from ..pruning.precision import require_precision
from ..pruning.repair import Repairs
from ..pruning.scores import REPAIR_OF
from ..pruning.surgery import Cut
from ..recording.recording import CACHE
from ..tiny.model import TinyFlux
from .connect import Needs
from .copies import absolute, folder_at_hand
from .memory import PYTHON
from .shared import Shared, claim
from .sites import SiteWorker, Source, rank
from .tasks import Done, Task, Terms, carry_out

FORMAT, ABOUT, POINTS = "flux-poke sweep 1", "sweep.json", "points"
TABLE, PICTURE = "table.csv", "pareto.png"
#: The score of a point of which nothing is cut, and which is only saved in another precision.
UNCUT = "none"


@dataclass(frozen=True)
class Point:
    """A model to make: `share` of the neurons cut by `score`, saved in `precision`."""

    share: float
    score: str
    precision: str

    @property
    def name(self) -> str:
        return f"{f'{self.score}-{100 * self.share:g}' if self.share else 'uncut'}-{self.precision}"

    def plan(self, dense: Dense, worker: SiteWorker) -> PruningPlan:
        """By a budget where the score is obs; by others the same share of every MLP."""
        if not self.share:
            return PruningPlan.keeping_all(dense)
        request: ByBudget | ByCount = ByBudget(neurons=self.share, precision=self.precision)
        if self.score != "obs":
            cuts: dict[str, Any] = {site.stream: round(self.share * site.width) for site in dense.layout.sites}
            request = ByCount(**cuts, score=self.score)
        return make_plan(dense, worker.recording, request, worker.device).plan


@dataclass(frozen=True)
class Measured:
    """What became of a point; `best` says that no other one is at most as large and nearer to the dense model.

    `seconds_a_step` is by the clock of a machine that may do other work, and `seconds` those that making it took.
    """

    name: str
    share: float
    score: str
    repair: str
    precision: str
    neurons_kept: int
    neurons: int
    gb: float
    velocity_error: float
    latent_error: float
    psnr: float | None
    seconds_a_step: float
    seconds: float
    best: bool = False

    @property
    def word(self) -> str:
        """Beside it in a picture."""
        return f"{100 * self.share:g} % {self.precision}" if self.share else self.precision


@dataclass(frozen=True)
class Measuring:
    """On which prompts, with noise from `seed` and on; `keep`: the checkpoints stay in the folder."""

    prompts: tuple[str, ...]
    seed: int = 0
    keep: bool = field(default=False, compare=False)

    def about(self, dense: Dense, recorded: str) -> dict[str, Any]:
        """What tells one sweep from another, as JSON; `recorded` tells what was recorded."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {"model": dense.fingerprint.digest, "recording": recorded, "prompts": prompts, "seed": self.seed}


class Surveyor(SiteWorker):
    """Makes points, and measures them with the reference runtime."""

    def __init__(self, source: Source, measuring: Measuring, out: str, device: str, threads: int):
        super().__init__(source, device, threads)
        self.measuring, self.out = measuring, Shared(out)

    @cached_property
    def exam(self) -> Exam:
        prompts, tiny = self.measuring.prompts, TinyFlux.load(Path(self.dense.path))
        return Exam(tiny, prompts, tiny.noise(len(prompts), self.measuring.seed))

    def do(self, task: Task) -> Measured:
        point: Point = task.what
        if self.source.remote:
            folder_at_hand(self.source.recording, lambda name: name.startswith(f"{CACHE}/rankings/"))
        begun, plan = time.perf_counter(), point.plan(self.dense, self)
        method = REPAIR_OF[point.score] if point.share else "none"
        cut = Cut(self.dense, plan, Repairs(self.dense, plan, method, self.recording, self.device))
        with tempfile.TemporaryDirectory(prefix="flux_poke_point_") as folder:
            file = Path(folder) / f"{point.name}.safetensors"
            save_pruned(file, cut, precision=point.precision)
            spent = time.perf_counter() - begun
            near = self.exam.compared(point.name, dict(Plain(Checkpoint(file))))
            del self.exam.images[point.name]
            kept, neurons = plan.neurons
            found = Measured(
                point.name, point.share, point.score, method, point.precision, kept, neurons, file.stat().st_size / 1e9,
                near.velocity_error, near.latent_error, near.psnr, near.seconds_a_step, spent,
            )  # fmt: skip
            if self.measuring.keep:
                self.out.put(file, file.name)
        self.out.write(_file(point), json.dumps(asdict(found), indent=1))
        return found


def grid(shares: Sequence[float], scores: Sequence[str], precisions: Sequence[str]) -> list[Point]:
    """All of them, and of each precision the uncut model; raises `UserError` where one makes no sense."""
    for share in shares:
        if not 0 < share < 1:
            raise UserError(f"A budget is a share of the neurons to cut, between 0 and 1; found {share:g}.")
    for score in scores:
        if score not in REPAIR_OF:
            raise UserError(f"There is no score {score!r}; there are {', '.join(REPAIR_OF)}.")
    for precision in precisions:
        require_precision(precision)
    every = [Point(0.0, UNCUT, precision) for precision in precisions]
    return [*dict.fromkeys((*every, *(Point(share, score, as_) for as_, share, score in product(precisions, shares, scores))))]


def sweep(source: Source, measuring: Measuring, points: Sequence[Point], out: str, terms: Terms, device: str = "cpu") -> Done:
    """Makes and measures every point that is not in `out`, and writes the table and the picture of all.

    Where obs is among the scores, all MLPs are ranked first, a task each. Raises `UserError` where `out` holds another sweep,
    or the reference runtime does not run the model, and as `carry_out`.
    """
    out = absolute(out)
    dense, recording, shared = source.dense(), source.recorded(), Shared(out)
    TinyFlux.load(Path(dense.path))
    about = measuring.about(dense, recording.digest("internals", "rows", "amplification"))
    claim(shared, ABOUT, {"format": FORMAT, **about}, "sweep")
    known = {point.name: found for point in points if (found := _read(shared, point)) is not None}
    left = [point for point in points if point.name not in known]
    ranked = Done()
    if any(point.score == "obs" for point in left):
        ranked = rank(source, terms, device)
        if ranked.failed:
            first, why = next(iter(ranked.failed.items()))
            raise UserError(f"{len(ranked.failed)} MLPs could not be ranked, first {first}: {why}")
    memory = PYTHON + 6 * Path(dense.path).stat().st_size

    def worker(needs: Needs) -> tuple[type, tuple[Any, ...]]:
        return Surveyor, (source, measuring, out, device, needs.threads)

    tasks = [Task(point.name, memory, point) for point in left]
    done = carry_out(tasks, worker, terms, len(known), f"Points that were measured are in {out}.")
    done.results |= known
    done.lost += ranked.lost
    _describe(shared, measured(done))
    return done


def measured(done: Done) -> list[Measured]:
    """All points, from the smallest file on, the Pareto points of size and velocity error marked."""
    found = sorted(done.results.values(), key=lambda point: (point.gb, point.velocity_error))
    best = pareto([(point.gb, point.velocity_error) for point in found])
    return [Measured(**{**asdict(point), "best": kept}) for point, kept in zip(found, best, strict=True)]


def _file(point: Point) -> str:
    return f"{POINTS}/{point.name}.json"


def _read(shared: Shared, point: Point) -> Measured | None:
    """What was found of a point; None where nothing was, or the file is damaged."""
    if not shared.exists(_file(point)):
        return None
    try:
        return Measured(**from_json(shared.read(_file(point))))
    except (ValueError, TypeError):
        return None


def _describe(shared: Shared, found: Sequence[Measured]) -> None:
    """The table and the picture."""
    if not found:
        return
    text = io.StringIO()
    table = csv.DictWriter(text, [column.name for column in fields(Measured)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(point) for point in found)
    shared.write(TABLE, text.getvalue())
    small, scores = found[-1].gb < 0.1, dict.fromkeys(point.score for point in found)
    series = {
        ("uncut" if score == UNCUT else f"{score}, repair {REPAIR_OF[score]}"): [
            (point.gb * (1000 if small else 1), point.velocity_error, point.word) for point in found if point.score == score
        ]
        for score in scores
    }
    title = "Size against error: share of the neurons cut, and precision"
    figure = pareto_figure(series, title, f"size of the file, {'MB' if small else 'GB'}", "velocity error (uncut as stored: 0)")
    with tempfile.TemporaryDirectory() as folder:
        write_picture(Path(folder) / PICTURE, figure)
        shared.put(Path(folder) / PICTURE, PICTURE)
