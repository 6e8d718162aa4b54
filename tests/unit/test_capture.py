"""Filling in the capture workflow, and which options go together; capturing itself is tested on the real server."""

from __future__ import annotations

import json
import re

import pytest
from flux_poke.errors import UserError
from flux_poke.headless import capture
from flux_poke.headless.capture import CaptureRequest, bring, capture_servers, filled_graph, model_file

MODELS = ["flux1-dev-fp8.safetensors", "flux1-krea-dev.safetensors", "sub/flux1-schnell.safetensors", "mine.safetensors"]


@pytest.fixture
def workflows(tmp_path, monkeypatch):
    """A graph with every input there is to fill in, seeds of two kinds, and a width that is a link."""
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "?", "weight_dtype": "default"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "?", "clip": ["9", 0]}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1, "height": 1, "batch_size": 1}},
        "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 0}},
        "5": {"class_type": "BasicScheduler", "inputs": {"steps": 0}},
        "6": {"class_type": "FluxGuidance", "inputs": {"guidance": 0.0}},
        "7": {"class_type": "Linked", "inputs": {"width": ["3", 0]}},
        "8": {"class_type": "Decode", "inputs": {"decode": True, "metadata": True}},
    }
    (tmp_path / "see_every_block.json").write_text(json.dumps(graph))
    tiny = {key: node for key, node in graph.items() if key not in "16"}
    (tmp_path / "see_every_block_tiny.json").write_text(json.dumps(tiny))
    monkeypatch.setattr(capture, "WORKFLOWS", tmp_path)
    return tmp_path


def test_every_input_that_has_a_name_is_filled_in_and_links_stay(workflows):
    request = CaptureRequest("a fox", "flux-dev", 512, 768, seed=7, num_steps=9, guidance=3.0, decode_intermediates=False)
    graph = filled_graph(request, MODELS)
    assert graph["7"]["inputs"]["width"] == ["3", 0]
    del graph["7"]
    found = {name: value for node in graph.values() for name, value in node["inputs"].items()}
    assert found == {
        "unet_name": "flux1-dev-fp8.safetensors", "weight_dtype": "default", "text": "a fox", "clip": ["9", 0], "width": 512,
        "height": 768, "batch_size": 1, "noise_seed": 7, "steps": 9, "guidance": 3.0, "decode": False, "metadata": True,
    }  # fmt: skip


@pytest.mark.parametrize("model", ["flux-dev", "tiny"])
def test_the_shipped_workflows_take_every_value(model):
    request = CaptureRequest("a 7", model, 512, 768, 7, 9, 3.0, decode_intermediates=False, add_sampling_metadata=False)
    inputs = {node["class_type"]: node["inputs"] for node in filled_graph(request, MODELS).values()}
    assert inputs["CLIPTextEncode"]["text"] == "a 7"
    assert (inputs["EmptySD3LatentImage"]["width"], inputs["EmptySD3LatentImage"]["height"]) == (512, 768)
    assert (inputs["KSampler"]["seed"], inputs["KSampler"]["steps"]) == (7, 9)
    assert (inputs["FluxPokeTapBlocks"]["blocks"], inputs["FluxPokeTapBlocks"]["at_steps"]) == ("all", "all")
    assert inputs["FluxPokeDecodeBlockPreviews"] | {"decode": False, "metadata": False} == inputs["FluxPokeDecodeBlockPreviews"]
    if model == "flux-dev":
        assert inputs["UNETLoader"]["unet_name"] == "flux1-dev-fp8.safetensors"
        assert inputs["FluxGuidance"]["guidance"] == 3.0


@pytest.mark.parametrize(("model", "steps"), [("flux-schnell", 4), ("flux-dev", 50), ("flux-dev-krea", 50), ("tiny", 20)])
def test_each_model_has_its_own_number_of_steps(workflows, model, steps):
    graph = filled_graph(CaptureRequest("a fox", model), MODELS)
    assert graph["5"]["inputs"]["steps"] == steps
    assert graph["3"]["inputs"]["width"] == 1  # the workflow's own


def test_without_a_seed_each_image_gets_one_of_its_own(workflows):
    seeds = {filled_graph(CaptureRequest("a fox", "tiny"), [])["4"]["inputs"]["noise_seed"] for _ in range(5)}
    assert len(seeds) == 5


def test_a_workflow_that_lacks_a_needed_input_is_refused(workflows):
    path = workflows / "see_every_block_tiny.json"
    graph = json.loads(path.read_text())
    del graph["2"]
    path.write_text(json.dumps(graph))
    with pytest.raises(UserError, match="has no input called text"):
        filled_graph(CaptureRequest("a fox", "tiny"), [])


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("flux-dev", "flux1-dev-fp8.safetensors"),
        ("flux-schnell", "sub/flux1-schnell.safetensors"),
        ("flux-dev-krea", "flux1-krea-dev.safetensors"),
        ("mine.safetensors", "mine.safetensors"),
    ],
)
def test_a_model_is_found_by_its_name(model, file):
    assert model_file(model, MODELS) == file


def test_a_model_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"no model 'flux-dev'.*flux1-dev\*\.safetensors.*found mine"):
        model_file("flux-dev", ["mine.safetensors"])


@pytest.mark.parametrize("size", [0, 8, 100, -16])
def test_sizes_are_multiples_of_16(size):
    with pytest.raises(UserError, match="multiple of 16"):
        CaptureRequest("a fox", width=size)


def reported(generation_id: object = "0123abcd", *names: str) -> dict:
    return {"generation_id": generation_id, "subfolder": f"flux_poke/{generation_id}", "files": names or ("img_0.jpg",)}


def test_files_come_into_a_new_folder_under_their_own_names(tmp_path):
    asked: list[dict[str, str]] = []

    def fetch(file) -> bytes:
        asked.append(file)
        return b"\xff\xd8\xff"

    bring(
        [reported("0123abcd", "img_0.jpg", "intermediates/decoded/step_0/a.jpg"), reported("0123abcd", "x.jpg")],
        tmp_path,
        fetch,
    )
    assert asked[1] == {"filename": "a.jpg", "subfolder": "flux_poke/0123abcd/intermediates/decoded/step_0", "type": "output"}
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"0123abcd/{name}" for name in ("img_0.jpg", "intermediates/decoded/step_0/a.jpg", "x.jpg")}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (reported("mine"), "calls a generation 'mine'"),
        (reported(".git"), "calls a generation '.git'"),
        (reported("."), "8 hexadecimal digits"),
        (reported("../0123abcd"), "8 hexadecimal digits"),
        (reported(7), "calls a generation '7'"),
        (reported("01234567"), "01234567 is there already"),
        (reported("89abcdef"), "89abcdef is there already"),
        (reported("0123abcd", "../mine/notes.txt"), "outside of its generation's folder"),
        (reported("0123abcd", "a.jpg", "/etc/passwd"), "outside of its generation's folder"),
        (reported("0123abcd", ".."), "outside of its generation's folder"),
    ],
)
def test_a_server_cannot_write_into_a_folder_that_was_there(tmp_path, found, said):
    for name in ("mine", ".git", "01234567"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / "89abcdef").symlink_to(tmp_path / "mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(said)):
        bring([found], tmp_path, lambda file: pytest.fail("nothing is fetched"))
    assert sorted(tmp_path.rglob("*")) == before


def test_options_for_starting_a_server_need_one_to_start(tmp_path):
    for options in ({"offload": True}, {"multi_gpu": True}):
        with pytest.raises(UserError, match="--comfyui"), capture_servers(None, None, **options):
            pass
    with pytest.raises(UserError, match="not both"), capture_servers("127.0.0.1:1", tmp_path):
        pass
    with capture_servers("127.0.0.1:1", None) as servers:
        assert servers == ["127.0.0.1:1"]
