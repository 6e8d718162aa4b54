"""Ranking, repairing and retraining on a cluster of two machines, a worker of which is killed: as on one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_poke.cluster.connect import Needs, connected
from flux_poke.cluster.layers import layer_options, retrain
from flux_poke.cluster.sites import Source, rank, repair
from flux_poke.cluster.tasks import Done, Terms
from flux_poke.errors import UserError
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.scores import rank as rank_alone
from flux_poke.retrain import layers as retraining
from flux_poke.retrain.files import read_stats
from flux_poke.tiny.model import FOLDER
from safetensors.torch import load_file
from two_nodes import Killer, Nodes, two_nodes

CHECKPOINT = FOLDER / "flux.safetensors"
TRAINING: dict[str, Any] = {"steps": 4, "eval_every": 2, "batch": 4, "thickness": 2, "save_dtype": "float32"}


class Work:
    """A recording, worked on by one process alone or by a cluster."""

    def __init__(self, folder: Path):
        self.source = Source(f"{CHECKPOINT}", f"{folder}")
        self.recording, self.layers = self.source.recorded(), folder / "layers"
        self.dense = self.source.dense()
        self.done: dict[str, Done] = {}
        self.killers: dict[str, Killer] = {}

    def plan(self) -> PruningPlan:
        return make_plan(self.dense, self.recording, ByBudget(share=0.5, multiple=4)).plan

    def alone(self) -> None:
        rank_alone("obs", self.dense, self.recording)
        plan = self.plan()
        Repairs(self.dense, plan, "affine", self.recording).compute(fold=True)
        retraining.retrain("both", self.dense, plan, self.recording, self.layers, "0-4", "blocks", **TRAINING)

    def shared(self, nodes: Nodes) -> None:
        terms, options = Terms(lambda memory: Needs(memory=int(memory)), 2, 300.0), layer_options("both", **TRAINING)
        with connected(nodes.address):
            with Killer(nodes, "Ranker") as self.killers["rank"]:
                self.done["rank"] = rank(self.source, terms)
            plan = self.plan()
            with Killer(nodes, "Repairer") as self.killers["repair"]:
                self.done["repair"] = repair(self.source, plan, "affine", terms, fold=True)
            with Killer(nodes, "Retrainer") as self.killers["retrain"]:
                self.done["retrain"] = retrain(self.source, plan, options, f"{self.layers}", terms, "0-4", "blocks")
            again = Terms(self.no_room)  # nothing is left that would need a machine
            self.done["again"] = rank(self.source, again).then(repair(self.source, plan, "affine", again, fold=True))
            self.done["again"] = self.done["again"].then(
                retrain(self.source, plan, options, f"{self.layers}", again, "0-4", "blocks")
            )

    @staticmethod
    def no_room(memory: float) -> Needs:
        return Needs(cpus=1e6)

    def found(self, pattern: str) -> dict[str, dict[str, torch.Tensor]]:
        folder = self.recording.folder
        return {path.relative_to(folder).as_posix(): load_file(path) for path in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module")
def recording(record_digits, tmp_path_factory) -> Path:
    """Internals, rows and block states of the tiny FLUX on twenty prompts."""
    return record_digits(tmp_path_factory.mktemp("to_share"), blocks=True)


@pytest.fixture(scope="module")
def alone(recording, tmp_path_factory) -> Work:
    work = Work(shutil.copytree(recording, tmp_path_factory.mktemp("alone") / "it"))
    work.alone()
    return work


@pytest.fixture(scope="module")
def shared(recording, tmp_path_factory) -> Work:
    work = Work(shutil.copytree(recording, tmp_path_factory.mktemp("shared") / "it"))
    with two_nodes() as nodes:
        work.shared(nodes)
    return work


@pytest.mark.parametrize("what", [".cache/rankings/*", ".cache/repairs/*/*", ".cache/modulation/*/*", "layers/*.safetensors"])
def test_what_a_cluster_works_out_is_what_one_machine_does_to_the_bit(same, alone, shared, what):
    expected, found = alone.found(what), shared.found(what)
    assert expected
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert same(found[name], tensors), name


def test_a_killed_worker_s_task_is_done_again(shared):
    for what in ("rank", "repair", "retrain"):
        done = shared.done[what]
        assert (what, shared.killers[what].killed, done.lost, done.failed) == (what, 1, 1, {})


def test_what_is_done_is_not_done_again(shared):
    done = shared.done["again"]
    assert done.total == done.before == sum(shared.done[what].total for what in ("rank", "repair", "retrain"))


def test_stats_and_picture_stand_beside_the_layers(alone, shared):
    for name in ("layer_stats.yaml", "layer_stats.png"):
        assert (shared.layers / name).is_file()
    expected, found = ([replace(layer, seconds=0) for layer in read_stats(work.layers)] for work in (alone, shared))
    assert found == expected


@pytest.mark.parametrize("options", [("--method", "distill"), ("--sequential",)])
def test_what_cannot_be_trained_apart_is_left_to_one_machine(run, recording, tmp_path, options):
    work = Work(recording)
    kept = {site.name: torch.arange(site.width // 2) for site in work.dense.layout.sites}
    plan = replace(PruningPlan.keeping_all(work.dense), kept=kept, recording=f"{recording}", checkpoint=f"{CHECKPOINT}")
    plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(UserError, match="use `flux-poke retrain`"):
        run("cluster", "retrain", tmp_path / "plan.safetensors", *options)
