"""What plans and pruned models are made from: a dense checkpoint and its recordings, ranked and repaired on the GPU."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.repair import Repairs
from ..pruning.scores import Ranking, rank, ranked_before
from ..recording.internals import Internals
from ..recording.store import MANIFEST, HiddenStates
from . import host, loading
from .computing import StepProgress, on_gpu, throw_if_cancelled

#: Folder in output/flux_poke for what repairs took to compute.
REPAIRS = "repairs"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sources:
    """A dense checkpoint and what was recorded of it, opened only where it is asked for."""

    dense: Dense
    file: Path | str
    hidden_states: str

    @classmethod
    def of(cls, unet_name: str, hidden_states: str, file: str, internals: Path | None) -> Sources:
        dense = Dense.open(loading.checkpoint_path(unet_name))
        return cls(dense, internals or file, hidden_states)

    @property
    def internals(self) -> Internals:
        file = self.file
        return Internals.load(host.output_path(file, ".safetensors") if isinstance(file, str) else file)

    @property
    def rows(self) -> HiddenStates:
        if not self.hidden_states.strip():
            raise UserError("hidden_states is empty: name the folder in output/flux_poke that Record Hidden States filled.")
        return HiddenStates.open(host.output_path(self.hidden_states))

    @property
    def amplification(self) -> dict[str, float]:
        """By site, where the folder is there and of this model: every score's errors are weighed with it, and none needs it."""
        if not self.hidden_states.strip() or not (host.output_path(self.hidden_states) / MANIFEST).exists():
            return {}
        return self.rows.amplification if self.rows.manifest.fingerprint.matches(self.dense.fingerprint) else {}

    def ranked(self, score: str, node_id: str | None) -> dict[str, Ranking]:
        """Rankings of all MLPs; those by obs are worked out on the GPU, and kept beside the rows for the next time."""
        progress = StepProgress(node_id, "ranked")
        if score != "obs":
            return rank(score, self.dense, self.internals, progress=progress)
        rows, sites = self.rows, self.dense.layout.sites
        scarce = rows.scarcest(sites)
        count, needed = rows.count(scarce.name), scarce.regressors
        host.say(node_id, f"{rows.folder.name}: {count:,} rows of {needed:,} that are needed; {5 * needed:,} do best")

        def work(device: torch.device) -> dict[str, Ranking]:
            return rank(score, self.dense, rows=rows, device=device, progress=progress, check=throw_if_cancelled)

        return work(CPU) if ranked_before(rows, sites) else on_gpu(work, node_id)

    def repaired(self, plan: PruningPlan, method: str, node_id: str | None, fold: bool = False) -> Repairs:
        """The plan's repairs, worked out on the GPU, and kept in output/flux_poke/repairs for the next time."""
        internals = self.internals if method == "bias" else None
        rows = self.rows if method == "affine" else None
        repairs = Repairs(self.dense, plan, method, internals, rows, host.output_path(REPAIRS))
        compute(repairs, node_id, fold)
        return repairs


def compute(repairs: Repairs, node_id: str | None, fold: bool = False) -> None:
    """Works out on the GPU what is not there yet, with progress on the node; Cancel stops it, there and later."""
    repairs.check = throw_if_cancelled

    def work(device: torch.device) -> None:
        repairs.device = device
        repairs.compute(StepProgress(node_id, "repaired"), fold)

    if any(repairs.lacks(name, fold) for name in repairs):
        on_gpu(work, node_id)


def space_taken(repairs: Repairs) -> str:
    """What is kept of all plans' repairs, in words."""
    if repairs.folder is None:
        return ""
    size = 0
    for path in repairs.folder.parent.rglob("*.safetensors"):
        with suppress(FileNotFoundError):  # removed by somebody else in between
            size += path.stat().st_size
    place = f"{size / 1e9:.3g} GB in output/{host.FOLDER}/{REPAIRS}"
    return f"\nRepairs of all plans take {place}: what is deleted there is worked out again when it is needed"
