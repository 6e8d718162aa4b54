"""`flux-poke cluster rank` and `repair`: one task for each MLP, whose results are the files that one machine writes.

    source = Source("flux.safetensors", "recordings/portraits")      # paths that all machines reach, or URLs
    done = rank(source, Terms(cluster.needs, workers=4), device="cuda")
    done = repair(source, plan, "affine", terms, fold=True)

They go into the recording's cache, where `plan`, `prune` and the nodes find them. What is there is not done again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UserError
from ..pruning.dense import Dense
from ..pruning.modulation import has_texts, lacks_modulation_errors, lacks_vectors, modulation_errors, recorded_vectors
from ..pruning.plan import PruningPlan
from ..pruning.planning import require_device
from ..pruning.repair import Repairs
from ..pruning.scores import lacks_ranking, require_rows
from ..pruning.scores import rank as rank_sites
from ..recording.recording import Recording
from .connect import Needs
from .copies import absolute, bring_back, cached, cached_of, file_at_hand, folder_at_hand, is_remote, recorded
from .memory import ranking_bytes, truncating_bytes
from .tasks import Done, Task, Terms, Worker, carry_out

#: What the task is called that works out what truncating modulation layers costs, and what they read.
MODULATION, VECTORS = "modulation", "what modulation layers read"


@dataclass(frozen=True)
class Source:
    """Where the dense model and what was recorded of it are, for all machines alike: paths that each reaches, or URLs, of
    which each machine makes a copy."""

    checkpoint: str
    recording: str

    def __post_init__(self) -> None:
        for name in ("checkpoint", "recording"):
            object.__setattr__(self, name, absolute(getattr(self, name)))

    def dense(self) -> Dense:
        return Dense.open(file_at_hand(self.checkpoint))

    def recorded(self, *kinds: str) -> Recording:
        """The recording, of a copy what was recorded of these `kinds`; raises `UserError` where there is none."""
        return Recording.open(folder_at_hand(self.recording, recorded(*kinds)))

    @property
    def remote(self) -> bool:
        """Whether what was recorded is copied, so that this machine does not see what others worked out of it."""
        return is_remote(self.recording)


class SiteWorker(Worker):
    """Has the model and the recording at hand, opened when the first task comes, since copying them may take long."""

    kinds: tuple[str, ...] = ("rows",)

    def __init__(self, source: Source, device: str, threads: int):
        super().__init__(threads)
        self.source, self.device = source, device

    @cached_property
    def dense(self) -> Dense:
        require_device(self.device)
        return self.source.dense()

    @cached_property
    def recording(self) -> Recording:
        return self.source.recorded(*self.kinds)

    def do(self, task: Task) -> Any:
        folder = self.recording.folder
        if self.source.remote:  # another worker may have done it before
            folder_at_hand(self.source.recording, cached_of(task.what or task.name))
        before = cached(folder) if self.source.remote else {}
        found = self.worked_out(task)
        bring_back(self.source.recording, folder, before)
        return found

    def worked_out(self, task: Task) -> Any:
        raise NotImplementedError


class Ranker(SiteWorker):
    """Ranks by obs."""

    def worked_out(self, task: Task) -> None:
        if task.name == MODULATION:
            modulation_errors(self.dense, self.recording, self.device)
        else:
            rank_sites("obs", self.dense, self.recording, [self.dense.layout.site(task.name)], self.device)


class Repairer(SiteWorker):
    """Repairs MLPs, and truncates modulation layers."""

    def __init__(self, source: Source, plan: PruningPlan, method: str, fold: bool, device: str, threads: int):
        super().__init__(source, device, threads)
        self.plan, self.method, self.fold = plan, method, fold

    @cached_property
    def repairs(self) -> Repairs:
        found = Repairs(self.dense, self.plan, self.method, self.recording, self.device)
        found.low_ranks.device = self.device
        return found

    def worked_out(self, task: Task) -> None:
        if task.name == VECTORS:
            recorded_vectors(self.dense, self.recording, self.device)
        elif task.what:
            self.repairs.low_ranks[task.what]
        else:
            self.repairs.work_out(task.name, self.fold)


def rank(source: Source, terms: Terms, device: str = "cpu") -> Done:
    """Ranks all MLPs by obs, and what truncating modulation layers costs where the recording tells; `flux-poke plan` finds it.

    Raises `UserError` where the recording is of another model or holds too few rows, and as `carry_out`.
    """
    dense, recording = source.dense(), source.recorded()
    require_rows(recording.states(), dense, dense.layout.sites, "the score obs")
    tasks = [Task(site.name, ranking_bytes(site, dense.layout.hidden)) for site in dense.layout.sites]
    lacking = {site.name for site in dense.layout.sites if source.remote or lacks_ranking(dense, site, recording)}
    if dense.layout.modulated and has_texts(recording):
        tasks.append(Task(MODULATION, truncating_bytes(dense.layout)))
        if source.remote or lacks_modulation_errors(dense, recording):
            lacking.add(MODULATION)
    left = [task for task in tasks if task.name in lacking]
    return carry_out(
        left, lambda needs: (Ranker, (source, device, needs.threads)), terms, len(tasks) - len(left), _kept(source)
    )


def repair(source: Source, plan: PruningPlan, method: str, terms: Terms, fold: bool = False, device: str = "cpu") -> Done:
    """Repairs every MLP that `plan` cuts, and truncates the modulation layers that it does; `flux-poke prune` finds it.

    `fold`: also what exact conversion of LoRAs needs. Without affine repair, modulation layers alone take work. Raises
    `UserError` where plan, model and recording do not belong together, and as `carry_out`.
    """
    dense, recording = source.dense(), source.recorded()
    repairs = Repairs(dense, plan, method, recording)
    truncated, lost = truncations(source, plan, repairs, terms, device)
    tasks = [Task(name, ranking_bytes(site, dense.layout.hidden)) for name, site in repairs.sites.items()]
    left = [task for task in tasks if (source.remote and method == "affine") or repairs.lacks(task.name, fold)]

    def worker(needs: Needs) -> tuple[type, tuple[Any, ...]]:
        return Repairer, (source, plan, method, fold, device, needs.threads)

    before = len(tasks) + len(plan.ranks) - len(left) - len(truncated)
    done = carry_out([*truncated, *left], worker, terms, before, _kept(source))
    done.lost += lost
    return done


def truncate(source: Source, plan: PruningPlan, repairs: Repairs, terms: Terms, device: str) -> None:
    """Works out the modulation layers that `plan` truncates; raises `UserError` where one cannot be."""
    left, _ = truncations(source, plan, repairs, terms, device)

    def worker(needs: Needs) -> tuple[type, tuple[Any, ...]]:
        return Repairer, (source, plan, "none", False, device, needs.threads)

    _require(carry_out(left, worker, terms, kept=_kept(source)))


def truncations(source: Source, plan: PruningPlan, repairs: Repairs, terms: Terms, device: str) -> tuple[list[Task], int]:
    """A task for each modulation layer that is still to be truncated, once what all of them read is worked out; and how often
    a worker was lost over that."""
    names = [name for name in repairs.low_ranks if source.remote or repairs.low_ranks.lacks(name)]
    memory, first = truncating_bytes(repairs.dense.layout), Done()
    if names and (source.remote or lacks_vectors(repairs.dense, repairs.low_ranks.recording)):

        def worker(needs: Needs) -> tuple[type, tuple[Any, ...]]:
            return Repairer, (source, plan, "none", False, device, needs.threads)

        first = carry_out([Task(VECTORS, memory)], worker, terms, kept=_kept(source))
        _require(first)
    return [Task(f"{MODULATION} of {name}", memory, name) for name in names], first.lost


def _require(done: Done) -> None:
    if done.failed:
        raise UserError(f"Modulation layers could not be truncated: {next(iter(done.failed.values()))}")


def _kept(source: Source) -> str:
    return f"What was worked out is in the cache of {source.recording}."
