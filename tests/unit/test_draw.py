"""`flux-poke draw` without ComfyUI, on the tiny FLUX."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_poke.draw import Asked, DrawRequest, draw_tiny, write_drawings
from flux_poke.errors import UserError
from flux_poke.tiny.data import digit_images
from flux_poke.tiny.model import SHIPPED, TinyFlux
from PIL import Image
from safetensors.torch import save_file

DENSE = SHIPPED["flux1"] / "flux.safetensors"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), float)


def test_pictures_are_those_of_the_model_with_their_seed_and_prompt_in_them(run, tmp_path):
    output = run(
        "draw", DENSE, "-o", tmp_path, "--prompt", "three", "--prompt", "a 7", "--num-samples", 2, "--seed", 5, "--steps", 8
    )
    names = ["three_5.png", "three_6.png", "a-7_7.png", "a-7_8.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "grid.png"])
    assert all(name in output for name in names)
    tiny = TinyFlux.load()
    sigmas = torch.linspace(1, 0, 9)
    expected = tiny.autoencoder.decode(tiny.sample(["three", "three", "a 7", "a 7"], tiny.noise(4, 5), sigmas))
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_allclose(pixels(tmp_path / name), 255 * image.movedim(0, -1).numpy(), atol=1)
    with Image.open(tmp_path / "a-7_7.png") as picture:
        assert picture.info["Description"] == "a 7"
        found = json.loads(picture.info["flux-poke"])
    asked = {"prompt": "a 7", "seed": 7, "steps": 8, "width": 64, "height": 64, "integrator": "euler", "model": DENSE.name}
    assert found | asked == found
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * (128 + 24)


def test_each_picture_is_the_same_by_its_own_seed_whatever_is_drawn_beside_it():
    tiny = TinyFlux.load()
    request = DrawRequest(["three"], num_samples=5, seed=3, integrator="stochastic", steps=6)
    together = {one.seed: picture for one, picture in draw_tiny(tiny, request)}
    two_at_once = {one.seed: picture for one, picture in draw_tiny(tiny, request, batch=2)}
    ((alone, picture),) = draw_tiny(tiny, DrawRequest(["three"], seed=6, integrator="stochastic", steps=6))
    for found in (two_at_once[6], picture):
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(together[6], float), atol=1)
    assert alone == Asked("three", 6, 0)
    assert np.abs(np.asarray(together[5], float) - np.asarray(together[6], float)).max() > 50


@pytest.mark.parametrize("integrator", ["heun", "dpmpp_2m", "stochastic"])
def test_integrators_and_shifts_draw_other_pictures_of_the_same_digit(integrator):
    tiny = TinyFlux.load()

    def drawn(**given) -> np.ndarray:
        ((_, picture),) = draw_tiny(tiny, DrawRequest(["three"], seed=3, steps=10, **given))
        return np.asarray(picture, float)

    usual = drawn()
    assert 0.5 < np.abs(usual - drawn(integrator=integrator)).max() < 256
    assert np.abs(usual - drawn(shift=3.0)).max() > 0.5
    assert np.corrcoef(usual.ravel(), drawn(integrator=integrator).ravel())[0, 1] > 0.5


def test_a_negative_prompt_is_drawn_away_from():
    tiny = TinyFlux.load()

    def drawn(**given) -> torch.Tensor:
        ((_, picture),) = draw_tiny(tiny, DrawRequest(["three"], seed=3, steps=4, **given))
        return torch.from_numpy(np.asarray(picture, float))

    assert torch.equal(drawn(guidance=1.0), drawn())
    noise, sigmas = tiny.noise(1, 3), torch.linspace(1, 0, 5)
    away = tiny.words(["eight"])

    def velocity(x, sigma):
        positive, negative = tiny.flux(x, sigma, *tiny.words(["three"])), tiny.flux(x, sigma, *away)
        return negative + 2.5 * (positive - negative)

    with torch.no_grad():
        for now, after in pairwise(sigmas):
            noise = noise + (after - now) * velocity(noise, now[None])
    expected = 255 * tiny.autoencoder.decode(noise)[0].movedim(0, -1)
    torch.testing.assert_close(drawn(guidance=2.5, negative="eight"), expected.double(), atol=1.0, rtol=0)


def test_another_size_is_drawn_at_that_size():
    ((_, picture),) = draw_tiny(TinyFlux.load(), DrawRequest(["three"], steps=2, width=96, height=48))
    assert picture.size == (96, 48)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": []}, "nothing to draw"),
        ({"prompts": ["a"], "width": 100}, "multiple of 16"),
        ({"prompts": ["a"], "negative": "b"}, "--guidance is 1"),
        ({"prompts": ["a"], "input_images": (Path("x.png"),)}, "takes no reference pictures"),
    ],
)
def test_what_cannot_be_drawn_is_said_before(given, said):
    with pytest.raises(UserError, match=said):
        next(draw_tiny(TinyFlux.load(), DrawRequest(**given)))


def test_nothing_is_drawn_where_a_file_stands_that_is_no_picture(tmp_path):
    (tmp_path / "three_0.png").write_text("notes")
    with pytest.raises(UserError, match="something else than its ending says"):
        write_drawings(tmp_path, iter([]), DrawRequest(["three"]), "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["three_0.png"]


def test_a_folder_for_pictures_that_is_a_file_is_told_of(run, tmp_path):
    (tmp_path / "out.png").write_text("mine")
    with pytest.raises(UserError, match="is a file, and a folder is needed"):
        run("draw", SHIPPED["flux1"] / "flux.safetensors", "-o", tmp_path / "out.png", "--prompt", "three", "--steps", 2)


def test_a_model_of_another_text_encoder_is_sent_to_comfyui(run, tmp_path, shapes):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes().items()}, path)
    with pytest.raises(UserError, match="--comfyui FOLDER or --server"):
        run("draw", path, "-o", tmp_path / "out", "--prompt", "three")
    assert not (tmp_path / "out").exists()


def test_a_shift_that_is_none_and_options_of_comfyui_are_refused(run, tmp_path):
    for shift in ("-1", "nan", "many"):
        with pytest.raises(UserError, match=r"--shift|static shift"):
            run("draw", DENSE, "-o", tmp_path, "--prompt", "three", "--shift", shift)
    with pytest.raises(UserError, match="--clip and --vae are for ComfyUI"):
        run("draw", DENSE, "-o", tmp_path, "--prompt", "three", "--vae", "ae.safetensors")


def test_out_of_memory_is_a_sentence_that_says_what_to_try(tmp_path):
    """In a process that may take no more than it has when it begins to draw."""
    code = f"""
import resource
from flux_poke.draw import *
tiny = open_tiny(Path({str(DENSE)!r}))
request = DrawRequest(["three"], width=2048, height=2048, steps=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, -1))
try:
    next(draw_tiny(tiny, request))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "takes more memory than there is: draw smaller pictures (--width, --height)" in done.stdout, done.stderr[-500:]


def test_a_flux2_draws_from_a_reference_picture(run, tmp_path):
    images, _ = digit_images()
    Image.fromarray((255 * images[3]).round().byte().movedim(0, -1).numpy()).save(tmp_path / "digit.png")
    checkpoint = SHIPPED["flux2"] / "flux.safetensors"
    given = ("--prompt", "the negative of it", "--input-image", tmp_path / "digit.png", "--seed", 4)
    run("draw", checkpoint, "-o", tmp_path / "out", *given)
    tiny = TinyFlux.load(family="flux2")
    reference = torch.from_numpy(pixels(tmp_path / "digit.png")).movedim(-1, 0)[None].float() / 255
    expected = 255 * tiny.draw(["the negative of it"], 4, [reference])[0].movedim(0, -1).numpy()
    drawn = pixels(tmp_path / "out" / "the-negative-of-it_4.png")
    assert np.abs(drawn - expected).mean() < 1
    assert np.abs(drawn - 255 * tiny.draw(["three"], 4)[0].movedim(0, -1).numpy()).mean() > 30
