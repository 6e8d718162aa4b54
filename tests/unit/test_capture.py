"""The graph that captures, and which options go together; capturing itself is tested on the real server."""

from __future__ import annotations

import re

import pytest
from flux_poke.errors import UserError
from flux_poke.headless.capture import CaptureRequest, bring, capture_graph, capture_servers
from flux_poke.headless.families import TINY_USUAL, USUAL, Setup
from flux_poke.headless.workflow import model_file

MODELS = ["flux1-dev-fp8.safetensors", "flux1-krea-dev.safetensors", "sub/flux1-schnell.safetensors", "mine.safetensors"]


def setup(model: str) -> Setup:
    kind, usual = next((kind, usual) for pattern, kind, usual in USUAL if re.search(pattern, model))
    clips = tuple(f"{name}.safetensors" for name in usual.clips)
    return (
        Setup("tiny", TINY_USUAL, "tiny")
        if model == "tiny"
        else Setup(kind, usual, model, "UNETLoader", clips, "ae.safetensors")
    )


@pytest.mark.parametrize("model", ["flux1-dev", "flux-2-klein-4b", "tiny"])
def test_every_value_is_in_the_graph(model):
    request = CaptureRequest(
        "a 7", model, 512, 768, 7, 9, 3.0, decode_intermediates=False, add_sampling_metadata=False, blocks="double 0",
        at_steps="every 5", lens="mine", view="euler", raw=True,
    )  # fmt: skip
    graph = capture_graph(request, setup(model))
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert inputs["CLIPTextEncode"]["text"] == "a 7"
    empty = inputs["EmptyFlux2LatentImage" if "klein" in model else "EmptySD3LatentImage"]
    assert (empty["width"], empty["height"], empty["batch_size"]) == (512, 768, 1)
    assert (inputs["RandomNoise"]["noise_seed"], inputs["FluxPokeFluxTimer"]["steps"]) == (7, 9)
    taps = {"blocks": "double 0", "at_steps": "every 5", "lens": "mine", "raw": True, "model": ["model", 0]}
    assert inputs["FluxPokeTapBlocks"] | taps == inputs["FluxPokeTapBlocks"]
    decode = {"decode": False, "metadata": False, "view": "euler", "after": ["sample", 0]}
    assert inputs["FluxPokeDecodeBlockPreviews"] | decode == inputs["FluxPokeDecodeBlockPreviews"]
    assert inputs["BasicGuider"]["model"] == ["taps", 0]
    if model == "flux1-dev":
        assert inputs["FluxGuidance"]["guidance"] == 3.0
    assert all(link[0] in graph for node in graph.values() for link in node["inputs"].values() if isinstance(link, list))


@pytest.mark.parametrize(
    ("model", "steps", "side"),
    [
        ("flux1-schnell", 4, 1024),
        ("flux1-dev", 50, 1024),
        ("flux1-krea-dev", 50, 1024),
        ("flux-2-klein-4b", 4, 1024),
        ("tiny", 20, 64),
    ],
)
def test_each_model_has_its_own_number_of_steps_and_size(model, steps, side):
    graph = capture_graph(CaptureRequest("a fox", model), setup(model))
    assert (graph["sigmas"]["inputs"]["steps"], graph["latent"]["inputs"]["width"]) == (steps, side)


def test_without_a_seed_each_image_gets_one_of_its_own():
    asked = [capture_graph(CaptureRequest("a fox", "tiny"), setup("tiny")) for _ in range(5)]
    assert len({graph["noise"]["inputs"]["noise_seed"] for graph in asked}) == 5


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
    with pytest.raises(UserError, match="choose one of them"), capture_servers(None, tmp_path, offload=True, multi_gpu=True):
        pass
    with pytest.raises(UserError, match="not both"), capture_servers("127.0.0.1:1", tmp_path):
        pass
    with capture_servers("127.0.0.1:1", None) as servers:
        assert servers == ["127.0.0.1:1"]
