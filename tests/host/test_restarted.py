"""A server that is killed in the middle of a node and started again: the same graph ends with what it makes undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux_poke.headless.client import ComfyClient
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from flux_poke.retrain.files import layer_files
from safetensors.torch import load_file

CALIBRATE, PLAN, SAVE, RETRAIN = "2", "3", "4", "5"
IMAGES, STEPS = 8, 8


class Killed(Exception):
    """The server is."""


def node(kind: str, **inputs) -> dict:
    return {"class_type": f"FluxPoke{kind}", "inputs": inputs}


def graph(name: str, without: str | None = None) -> dict:
    """Records, plans, saves and retrains, into files of this name; without one of these nodes, if it says so."""
    prompts, tiny = "\n".join(f"a {digit}" for digit in range(IMAGES)), "tiny FLUX (ships with the pack)"
    nodes = {
        "1": node("LoadTinyFlux"),
        CALIBRATE: node(
            "Calibrate", model=["1", 0], clip=["1", 1], name=name, file="prompts.txt", own_prompts=prompts, number=IMAGES,
            width=64, height=64, steps=STEPS, guidance=3.5, first_seed=0, max_gb=1.0,
        ),
        PLAN: node(
            "PlanByBudget", recording=[CALIBRATE, 0], unet_name=tiny, budget="share of all parameters", amount=0.3,
            touch="both", precision="stored", protect="", save_as=f"{name} plan.safetensors",
        ),
        SAVE: node(
            "SavePrunedFlux", plan_or_model=[PLAN, 0], repair="affine", save_as=name, fold=False, precision="as planned"
        ),
        RETRAIN: node(
            "RetrainLayers", plan=[PLAN, 0], layers="all", method="both", train_on="auto", thickness=1, steps=60,
            learning_rate=0.0005, batch=8, save_dtype="bfloat16", train_seed=0, mixed_precision=False, folder=f"{name} layers",
        ),
    }  # fmt: skip
    return {number: one for number, one in nodes.items() if number != without}


class Made:
    """Where the graph of a name leaves what."""

    def __init__(self, host, name: str):
        outputs, models = host.output / "flux_poke", host.base / "models" / "diffusion_models"
        self.recording, self.plan, self.layers = (
            outputs / name,
            outputs / f"{name} plan.safetensors",
            outputs / f"{name} layers",
        )
        self.pruned, self.folders = models / f"{name}.safetensors", (outputs, models)

    def images(self) -> int:
        if not (self.recording / "internals.safetensors").is_file():
            return 0
        return Recording.open(self.recording).states().image_count("rows")

    def unfinished(self) -> list[Path]:
        """What killed writers left."""
        names = (".flux-poke-*.unfinished", ".tmp*", "*.tmp")
        return [path for folder in self.folders for name in names for path in folder.rglob(name)]


def kill_in(host, graph: dict, at: str, when: Callable[[], bool] = lambda: True) -> None:
    """Starts a server, queues a graph, and kills it in the middle of node `at`, once it tells of progress and `when`."""
    with host.start() as server, ComfyClient(server.address) as client:

        def kill(number: str, step: float, of: float) -> None:
            if number == at and 0 < step < of and when():
                server._process.kill()
                raise Killed

        with pytest.raises(Killed):
            client.wait(client.queue(graph), kill)
        server._process.wait()


def assert_same_tensors(found: Path, expected: Path) -> None:
    one, other = load_file(found), load_file(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one), f"{found} and {expected} differ"


def test_a_server_killed_in_each_phase_makes_in_the_end_what_one_makes_that_nobody_disturbed(host, client):
    made, whole = Made(host, "killed server"), Made(host, "undisturbed")
    kill_in(host, graph("killed server"), CALIBRATE, lambda: made.images() >= 1)
    assert 1 <= made.images() < IMAGES
    kill_in(host, graph("killed server"), PLAN)
    assert made.images() == IMAGES
    assert not made.plan.exists()
    kill_in(host, graph("killed server", without=RETRAIN), SAVE)  # either of the two may be the first that runs
    assert made.plan.exists()
    assert not made.pruned.exists()
    assert not layer_files(made.layers)
    kill_in(host, graph("killed server"), RETRAIN, lambda: bool(layer_files(made.layers)))
    assert 1 <= len(layer_files(made.layers)) < 6
    client.run(graph("killed server"))
    client.run(graph("undisturbed"))

    found, expected = (Internals.load(some.recording / "internals.safetensors") for some in (made, whole))
    assert (found.runs, found.steps) == (expected.runs, expected.steps) == (IMAGES, IMAGES * STEPS)
    assert all(torch.equal(found.sites[name].fires, site.fires) for name, site in expected.sites.items())
    assert_same_tensors(made.plan, whole.plan)
    assert_same_tensors(made.pruned, whole.pruned)
    assert Pruned.open(made.pruned).plan.velocity_error == Pruned.open(whole.pruned).plan.velocity_error
    layers = layer_files(made.layers)
    assert layers.keys() == layer_files(whole.layers).keys()
    for number, file in layers.items():
        assert_same_tensors(file, layer_files(whole.layers)[number])
    assert not made.unfinished()
