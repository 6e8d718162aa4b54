"""What nodes offer in lists on a real server: models by what is in them, and the files that the pack wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from flux_poke.analysis.lens import Lens
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block
from flux_poke.headless.client import ComfyClient
from flux_poke.pruning.checkpoint import save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.tiny.model import FOLDER
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY, TINY_FLUX2 = "tiny FLUX (ships with the pack)", "tiny FLUX.2 (ships with the pack)"
#: An all-in-one file: a FLUX beside something else.
ALL_IN_ONE = "listed-all-in-one.safetensors"


def node(kind: str, **inputs) -> dict:
    return {"class_type": f"FluxPoke{kind}", "inputs": inputs}


def shown(source: str, slot: int = 1) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": [source, slot]}}


@pytest.fixture
def options(server):
    """What an input's list holds now: what the page asks for on opening and on "r"."""

    def read(kind: str, name: str) -> list[str]:
        described = requests.get(f"http://{server.address}/object_info/FluxPoke{kind}", timeout=60).json()
        type, options = described[f"FluxPoke{kind}"]["input"]["required"][name]
        assert type == "COMBO"
        return options["options"]

    return read


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    dense = Dense.open(FOLDER / "flux.safetensors")
    kept = {"double-img-0": torch.arange(100, dtype=torch.int64)}
    return PruningPlan(
        "flux1", dense.fingerprint, kept, PruningPlan.keeping_all(dense).widths, "none", "the first", checkpoint=dense.path
    )


@pytest.fixture
def models(host, plan) -> Iterator[Path]:
    """Files of every kind in models/diffusion_models and models/checkpoints; gone after the test."""
    folder = host.base / "models" / "diffusion_models" / "a listed"
    checkpoints = host.base / "models" / "checkpoints"
    folder.mkdir()
    checkpoints.mkdir(exist_ok=True)
    dense = Dense.open(FOLDER / "flux.safetensors")
    tensors = load_file(FOLDER / "flux.safetensors")
    shutil.copy(FOLDER / "flux.safetensors", folder / "z flux.safetensors")
    save_pruned(folder / "a pruned.safetensors", Cut(dense, plan))
    save_file({"model.weight": torch.ones(2)}, folder / "b other.safetensors")
    (folder / "a damaged.safetensors").write_bytes(b"\xff" * 100)
    (folder / "c.ckpt").write_bytes(b"PK")
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    save_file({**whole, "text_encoders.weight": torch.ones(2)}, checkpoints / ALL_IN_ONE)
    save_file({"model.diffusion_model.input_blocks.0.weight": torch.ones(2)}, checkpoints / "listed-sd.safetensors")
    yield folder
    shutil.rmtree(folder)
    for path in checkpoints.glob("listed-*"):
        path.unlink()


def test_where_a_dense_model_is_asked_for_flux_comes_first_and_damaged_files_last(options, models):
    ours = [TINY, TINY_FLUX2, f"checkpoints/{ALL_IN_ONE}"]
    listed = [name for name in options("PlanByCount", "unet_name") if name in ours or name.startswith("a listed/")]
    assert listed == [
        "a listed/z flux.safetensors",
        f"checkpoints/{ALL_IN_ONE}",
        TINY,
        TINY_FLUX2,
        "a listed/b other.safetensors",
        "a listed/c.ckpt",
        "a listed/a pruned.safetensors",
        "a listed/a damaged.safetensors",
    ]
    assert "checkpoints/listed-sd.safetensors" not in options("PlanByCount", "unet_name")
    assert options("LoadPlan", "unet_name")[0] == "as in the plan"


def test_where_a_pruned_model_is_asked_for_only_pruned_files_are_listed(options, models):
    listed = options("LoadPrunedCheckpoint", "unet_name")
    assert "a listed/a pruned.safetensors" in listed
    assert not {TINY, *(f"a listed/{name}.safetensors" for name in ("z flux", "b other", "a damaged"))} & {*listed}


def test_a_file_that_changes_its_kind_is_listed_anew(options, models):
    shutil.copy(models / "z flux.safetensors", models / "a damaged.safetensors")
    assert options("PlanByCount", "unet_name")[0] == "a listed/a damaged.safetensors"


def test_the_flux_of_an_all_in_one_checkpoint_is_cut_as_the_same_one_alone_and_files_hold_the_graph(client, models, host):
    graph = {
        "tiny": node("LoadTinyFlux"),
        "record": node("RecordInternals", model=["tiny", 0], name="listed", ignore_padding=True, positive_only=False),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["tiny", 1], "text": "a three"}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["record", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0],
                "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
    }  # fmt: skip
    for name, checkpoint in (("alone", TINY), ("all", f"checkpoints/{ALL_IN_ONE}")):
        graph[f"plan {name}"] = node(
            "PlanByCount", recording=["record", 1], after=["sample", 0], unet_name=checkpoint, img_cut=64, txt_cut=64,
            single_cut=64, score="frequency", first_layer=0, last_layer=-1, first_single=0, last_single=-1,
            save_as=f"listed_{name}",
        )  # fmt: skip
        graph[f"save {name}"] = node(
            "SavePrunedFlux", plan_or_model=[f"plan {name}", 0], repair="bias", save_as=f"a listed/{name}", fold=False,
            precision="stored",
        )  # fmt: skip
    page = {"extra_pnginfo": {"workflow": {"nodes": [], "drawn": "by hand"}}}
    client.run(graph, extra=page)
    alone, together = (load_file(models / f"{name}.safetensors") for name in ("alone", "all"))
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[key], together[key]) for key in alone)
    for path in (models / "alone.safetensors", host.output / "flux_poke" / "listed_alone.safetensors"):
        with safe_open(path, "pt") as file:  # a file that is dropped onto the page brings its graph back
            assert json.loads(file.metadata()["prompt"]).keys() == graph.keys()
            assert json.loads(file.metadata()["workflow"]) == page["extra_pnginfo"]["workflow"]
            assert ("Load Pruned Checkpoint" in file.metadata().get("flux_poke.load_with", "")) == (path.parent == models)


def test_files_of_ours_are_listed_by_what_they_are(options, plan, host):
    root = host.output / "flux_poke"
    (root / "listed lens").mkdir(parents=True)
    plan.save(root / "listed_here.safetensors")
    plan.save(root / "listed lens" / "plan.safetensors")
    plan.save(root / ".listed_hidden.safetensors")
    block = Block("double", 0)
    lens = Lens("flux1", {block: torch.eye(4)}, {block: torch.zeros(4)}, {block: 0.1}, {block: 0.2}, rows=1, images=1)
    lens.save(root / "listed lens" / "lens.safetensors")
    (root / "listed layers" / "one").mkdir(parents=True)
    save_file({"img_mlp.0.weight": torch.ones(2, 2)}, root / "listed layers" / "one" / "3.safetensors")
    (root / "listed previews" / "decoded").mkdir(parents=True)

    plans, lenses, layers = options("LoadPlan", "file"), options("TapBlocks", "lens"), options("LoadReplacedFlux", "folder")
    assert {"listed_here.safetensors", "listed lens/plan.safetensors"} <= {*plans}
    assert not {"listed lens/lens.safetensors", ".listed_hidden.safetensors"} & {*plans}
    assert lenses[0] == "none"
    assert [name for name in lenses if name.startswith("listed")] == ["listed lens/lens.safetensors"]
    assert layers[0] == "as in the plan"
    assert [name for name in layers if name.startswith("listed")] == ["listed layers/one"]
    assert options("AnimateBlockPreviews", "folder")[0] == "listed previews"  # newest first


def test_a_name_that_is_not_in_its_list_is_taken(client: ComfyClient, plan, host):
    plan.save(host.output / "flux_poke" / "listed_elsewhere" / "and deeper" / "plan.safetensors")
    graph = {
        "1": node("LoadPlan", file="listed_elsewhere/and deeper/plan", unet_name="as in the plan"),
        "2": shown("1"),
        "3": {"class_type": "PrimitiveString", "inputs": {"value": "listed_elsewhere/and deeper/plan"}},
        "4": node("LoadPlan", file=["3", 0], unet_name="as in the plan"),
        "5": shown("4"),
    }
    texts = client.run(graph).texts
    assert "3,684 of 4,096 neurons kept" in texts["1"]
    assert texts["4"] == texts["1"]


def test_what_is_linked_to_a_node_with_lists_is_still_checked(client: ComfyClient):
    graph = {"1": node("LoadTinyFlux"), "2": node("LoadPlan", file=["1", 0], unet_name="as in the plan"), "3": shown("2")}
    with pytest.raises(UserError, match="file is linked to MODEL: expected COMBO"):
        client.run(graph)
    graph["2"] = node("LoadPlan", file="listed_here", unet_name="as in the plan", recording=["1", 0])
    with pytest.raises(UserError, match="recording is linked to MODEL: expected RECORDING"):
        client.run(graph)


def test_a_list_without_files_says_what_makes_one(client: ComfyClient):
    graph = {"1": node("LoadPlan", file="none yet: run a Plan", unet_name="as in the plan"), "2": shown("1")}
    with pytest.raises(UserError, match=r"nothing was there yet: run a Plan Pruning node, press R to read the lists anew"):
        client.run(graph)
