"""`flux-poke capture` and `decode` without ComfyUI, on the tiny FLUX."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flux_poke.analysis.generation import find_previews
from flux_poke.analysis.raw import final_layer, read_raw
from flux_poke.analysis.taps import Tap
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block
from flux_poke.tiny.model import SHIPPED, TinyFlux
from PIL import Image
from safetensors.torch import load_file, save_file

DENSE = SHIPPED["flux1"] / "flux.safetensors"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), float)


@pytest.fixture(scope="module")
def captured(run, tmp_path_factory):
    """What was printed, and the folder of a generation with raw states."""
    out = tmp_path_factory.mktemp("captured")
    options = ("--model", DENSE, "--num-steps", 5, "--seed", 7, "--blocks", "double, single 0", "--steps-to-tap", "1, 3-4")
    output = run("capture", "--prompt", "a 7", *options, "--raw", "--output-dir", out)
    return output, out


def test_the_id_comes_first_and_the_chosen_blocks_and_steps_are_there(captured):
    output, out = captured
    (folder,) = out.iterdir()
    assert output.splitlines()[0] == f"{folder.name}: a 7"
    blocks = [Block("double", 0), Block("double", 1), Block("single", 0)]
    assert [tap for tap, _ in find_previews(folder)] == [Tap(step, block) for step in (1, 3, 4) for block in blocks]
    names = {path.name for path in folder.iterdir()}
    assert names == {"img_0.jpg", "metadata.json", "contributions.png", "sheet.png", "differences.png", "intermediates", "raw"}
    found = json.loads((folder / "metadata.json").read_text())
    assert (found["generation_id"], found["prompt"], found["seed"], found["num_steps"]) == (folder.name, "a 7", 7, 5)
    tiny = TinyFlux.load()
    expected = tiny.autoencoder.decode(tiny.sample(["a 7"], tiny.noise(1, 7), torch.linspace(1, 0, 6)))[0]
    assert np.abs(pixels(folder / "img_0.jpg") - 255 * expected.movedim(0, -1).numpy()).mean() < 3  # a JPEG


@torch.no_grad()
def test_raw_states_are_those_of_the_model(captured):
    folder = next(captured[1].iterdir())
    kept = load_file(folder / "raw" / "step_3" / "double_block_1.safetensors")
    context = load_file(folder / "raw" / "step_3" / "context.safetensors")
    assert context["sigma"].item() == pytest.approx(0.4)
    assert context["sigma_next"].item() == pytest.approx(0.2)
    tiny, seen = TinyFlux.load(), dict[str, torch.Tensor]()
    tiny.flux.double_blocks[1].register_forward_hook(lambda _, __, out: seen.update(img=out[0].clone(), txt=out[1].clone()))
    text, vector = tiny.words(["a 7"])
    torch.testing.assert_close(context["text"], text[0])
    tiny.flux(context["x"][None], context["sigma"].reshape(1), text, vector)
    torch.testing.assert_close(kept["img"], seen["img"][0])
    torch.testing.assert_close(kept["txt"], seen["txt"][0])


def test_decoding_raw_states_gives_the_same_pictures_again_and_others_in_another_view(run, captured):
    folder = next(captured[1].iterdir())
    previews = {tap: (path, pixels(path)) for tap, path in find_previews(folder)}
    chart = pixels(folder / "contributions.png")
    for path, _ in previews.values():
        path.unlink()
    assert "9 predictions decoded" in run("decode", folder)
    assert all(np.abs(pixels(path) - before).max() <= 3 for path, before in previews.values())
    assert np.abs(pixels(folder / "contributions.png") - chart).mean() < 1
    run("decode", folder, "--view", "euler")
    path, before = previews[Tap(1, Block("double", 0))]
    assert np.abs(pixels(path) - before).max() > 20


def test_states_are_read_through_the_final_layer_of_their_model_alone(captured, tmp_path, shapes):
    folder = next(captured[1].iterdir())
    layer, layout = final_layer(DENSE)
    whole = TinyFlux.load().flux.final_layer
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in layer.state_dict().items())
    assert len(read_raw(folder, layer, layout)) == 9
    wide = tmp_path / "wide.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes(hidden=256).items()}, wide)
    with pytest.raises(UserError, match=r"are 128 wide, .* 256"):
        read_raw(folder, *final_layer(wide))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no folder raw"):
        read_raw(tmp_path / "other", layer, layout)


def test_what_does_not_fit_is_said_before_anything_is_drawn(run, tmp_path):
    def capture(*options: object) -> str:
        return run("capture", "--prompt", "a 7", "--model", "tiny", "--output-dir", tmp_path / "out", *options)

    for options, said in (
        (("--blocks", "double 9"), "double"),
        (("--steps-to-tap", "soon"), "not understood"),
        (("--vae", "ae.safetensors"), "are for ComfyUI"),
        (("--lens", tmp_path / "none.safetensors"), "none.safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            capture(*options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not say how an image came about"):
        run("decode", tmp_path)


def test_without_pictures_latents_are_written_and_without_metadata_nothing_is_in_them(run, tmp_path):
    options = ("--no-decode-intermediates", "--no-add-sampling-metadata", "--num-steps", 2)
    run("capture", "--prompt", "a 7", "--model", "tiny", "--output-dir", tmp_path, *options)
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {"img_0.jpg", "metadata.json", "contributions.png", "step_0.safetensors", "step_1.safetensors"}
    assert not Image.open(folder / "img_0.jpg").getexif()
