"""`flux-poke draw` on a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flux_poke.cli import app
from flux_poke.draw import DrawRequest, draw_tiny, write_drawings
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient
from flux_poke.headless.draw import draw_there, memory_explained_there
from flux_poke.headless.families import Setup
from flux_poke.tiny.model import SHIPPED, TinyFlux
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

#: Files by their folder in models, of no use but for their names.
FILES = {
    "diffusion_models": (
        "flux1-dev-fp8.safetensors", "flux1-schnell.safetensors", "flux1-dev-kontext.safetensors", "Chroma1-HD.safetensors",
        "flux-2-klein-4b.safetensors", "flux-2-klein-base-9b.safetensors", "flux2_dev_fp8mixed.safetensors",
    ),
    "text_encoders": (
        "clip_l.safetensors", "t5xxl_fp16.safetensors", "qwen_3_4b.safetensors", "qwen_3_8b_fp8mixed.safetensors",
        "mistral_3_small_flux2_fp8.safetensors",
    ),
    "vae": ("ae.safetensors", "flux2-vae.safetensors"),
}  # fmt: skip


@pytest.fixture
def files(host, server):
    """Empty ones of these names."""
    made = [host.base / "models" / folder / name for folder, names in FILES.items() for name in names]
    for path in made:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    yield
    for path in made:
        path.unlink()


@pytest.fixture
def run() -> Callable[..., str]:
    def output(*arguments: object) -> str:
        return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False).output

    return output


@pytest.mark.parametrize("integrator", ["euler", "heun"])
def test_the_tiny_flux_draws_there_what_it_draws_here_with_the_graph_in_it(client: ComfyClient, tmp_path, integrator):
    request = DrawRequest(["three", "a 7"], num_samples=2, seed=5, steps=6, integrator=integrator, shift=2.0)
    files = write_drawings(tmp_path, draw_there(client, Setup.find(client, "tiny"), request), request, "tiny")
    assert [path.name for path in files] == ["three_5.png", "three_6.png", "a-7_7.png", "a-7_8.png", "grid.png"]
    for (one, here), path in zip(draw_tiny(TinyFlux.load(), request), files, strict=False):
        with Image.open(path) as there:
            assert np.abs(np.asarray(here, float) - np.asarray(there, float)).max() <= 2
            assert json.loads(there.info["flux-poke"])["seed"] == one.seed
            assert json.loads(there.info["prompt"])["noise"]["inputs"]["noise_seed"] == one.seed


def test_guidance_draws_away_from_the_negative_prompt_there_as_here(client: ComfyClient):
    request = DrawRequest(["three"], seed=5, steps=4, guidance=2.0, negative="eight")
    ((_, there),) = draw_there(client, Setup.find(client, "tiny"), request)
    ((_, here),) = draw_tiny(TinyFlux.load(), request)
    assert np.abs(np.asarray(here, float) - np.asarray(there.convert("RGB"), float)).max() <= 2


def test_a_pruned_file_is_loaded_as_one(client: ComfyClient, files, host, run, tmp_path):
    (tmp_path / "prompts.txt").write_text("three\na 7\n")
    dense = SHIPPED["flux1"] / "flux.safetensors"
    run("record", dense, tmp_path / "digits", "--prompts", tmp_path / "prompts.txt", "--steps", 2)
    run("plan", tmp_path / "digits", "--checkpoint", dense, "--img-cut", 100, "-o", tmp_path / "plan.safetensors")
    run("prune", tmp_path / "plan.safetensors", "-o", tmp_path / "small.safetensors", "--repair", "none")
    there = host.base / "models" / "diffusion_models" / "drawn-small.safetensors"
    shutil.copy(tmp_path / "small.safetensors", there)
    try:
        assert Setup.find(client, "drawn-small.safetensors").loader == "FluxPokeLoadPrunedCheckpoint"
        save_file({"x": torch.zeros(1)}, there)
        assert Setup.find(client, "drawn-small.safetensors").loader == "UNETLoader"
    finally:
        there.unlink()


@pytest.mark.parametrize(
    ("model", "clips", "vae", "nodes", "takes"),
    [
        ("flux-dev", ["clip_l", "t5xxl_fp16"], "ae", {"FluxGuidance", "BasicGuider", "EmptySD3LatentImage"}, False),
        ("flux-schnell", ["clip_l", "t5xxl_fp16"], "ae", {"FluxGuidance", "BasicGuider"}, False),
        ("flux1-dev-kontext", ["clip_l", "t5xxl_fp16"], "ae", {"FluxGuidance", "ReferenceLatent"}, True),
        ("Chroma1-HD", ["t5xxl_fp16"], "ae", {"CFGGuider", "EmptySD3LatentImage"}, False),
        ("flux-2-klein-4b", ["qwen_3_4b"], "flux2-vae", {"BasicGuider", "EmptyFlux2LatentImage", "ReferenceLatent"}, True),
        ("flux-2-klein-base-9b", ["qwen_3_8b_fp8mixed"], "flux2-vae", {"EmptyFlux2LatentImage", "ReferenceLatent"}, True),
        ("flux2_dev", ["mistral_3_small_flux2_fp8"], "flux2-vae", {"FluxGuidance", "ReferenceLatent"}, True),
    ],
)
def test_each_family_has_its_graph_which_the_server_takes_until_it_opens_the_empty_files(
    client: ComfyClient, files, tmp_path, model, clips, vae, nodes, takes
):
    Image.new("RGB", (40, 30), (200, 100, 0)).save(tmp_path / "reference.png")
    setup = Setup.find(client, model)
    assert [*setup.clips, setup.vae] == [f"{name}.safetensors" for name in (*clips, vae)]
    pictures = (tmp_path / "reference.png",) if takes else ()
    request = DrawRequest(["a fox"], input_images=pictures)
    graph = setup.graph(request.images[0], request, ["reference.png"] if takes else [])
    assert nodes <= {node["class_type"] for node in graph.values()}
    with pytest.raises(UserError, match=r"^\w+ \(node (model|clip|vae)\) failed: "):  # one that it does not take is "refused"
        next(draw_there(client, setup, request))
    if not takes:
        with pytest.raises(UserError, match="takes no reference pictures"):
            setup.graph(request.images[0], request, ["reference.png"])


def test_files_that_are_found_can_be_named_and_those_missing_are(client: ComfyClient, files, host):
    named = Setup.find(client, "flux-dev", ["clip_l.safetensors", "qwen_3_4b.safetensors"], "flux2-vae.safetensors")
    assert (*named.clips, named.vae) == ("clip_l.safetensors", "qwen_3_4b.safetensors", "flux2-vae.safetensors")
    with pytest.raises(UserError, match="takes 2 text encoders"):
        Setup.find(client, "flux-dev", ["clip_l.safetensors"])
    with pytest.raises(UserError, match=r"no mine\.safetensors in models/vae"):
        Setup.find(client, "flux-dev", vae="mine.safetensors")
    with pytest.raises(UserError, match="no model 'flux3'"):
        Setup.find(client, "flux3")
    path = host.base / "models" / "text_encoders" / "clip_l.safetensors"
    path.unlink()
    try:
        with pytest.raises(UserError, match=r"no file called clip_l\* in models/text_encoders.*--clip"):
            Setup.find(client, "flux-dev")
    finally:
        path.touch()


def test_out_of_memory_there_is_a_sentence_that_says_what_to_try():
    said = "SamplerCustomAdvanced (node sample) failed: Allocation on device 0 would exceed allowed memory."
    with pytest.raises(UserError, match=r"ran out of memory .*draw a smaller picture .*--lowvram"), memory_explained_there():
        raise UserError(said)
    with pytest.raises(UserError, match=r"^of another kind$"), memory_explained_there():
        raise UserError("of another kind")


def test_the_command_draws_on_the_server(server, run, tmp_path):
    output = run("draw", "tiny", "-o", tmp_path, "--prompt", "three", "--steps", 2, "--server", server.address)
    assert "three_0.png" in output
    assert Image.open(tmp_path / "three_0.png").size == (64, 64)
