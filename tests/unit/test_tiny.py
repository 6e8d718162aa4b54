"""The tiny FLUX that ships: it draws what it is asked for."""

import shutil

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.tiny.data import digit_accuracy, digit_images
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts


def test_all_that_ships_is_smaller_than_10_mb():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) < 10_000_000


def test_the_shipped_shape_is_flux1_with_2_double_and_4_single_blocks_of_hidden_128():
    layout = Checkpoint(FOLDER / "flux.safetensors").layout
    assert (layout.family, layout.hidden, layout.head_dim, layout.depth, layout.depth_single) == ("flux1", 128, 128, 2, 4)
    assert (layout.context, layout.vector, layout.in_channels) == (64, 64, 64)


def test_nine_of_ten_drawings_read_as_the_digit_asked_for():
    tiny = TinyFlux.load()
    digits = [number % 10 for number in range(200)]
    prompts = [digit_prompts(digit)[number // 10 % 26] for number, digit in enumerate(digits)]
    assert digit_accuracy(tiny.draw(prompts, seed=1), digits) >= 0.9


def test_the_autoencoder_gives_images_back_at_40_db():
    tiny = TinyFlux.load()
    images, _ = digit_images()
    error = (tiny.autoencoder.decode(tiny.autoencoder.encode(images[::18])) - images[::18]).square().mean()
    assert -10 * torch.log10(error) > 40


def test_an_image_depends_on_its_own_seed_and_prompt_alone():
    tiny = TinyFlux.load()
    together = tiny.draw(["three", "a 7"], seed=5)
    alone = tiny.draw(["a 7"], seed=6)
    assert torch.allclose(together[1], alone[0], atol=1e-4)


@pytest.mark.parametrize("name", ["words.safetensors", "autoencoder.safetensors"])
def test_files_beside_a_checkpoint_that_are_something_else_are_named(tmp_path, name):
    shutil.copy(FOLDER / "flux.safetensors", tmp_path)
    TinyFlux.load(tmp_path / "flux.safetensors")
    for content, said in ((FOLDER / "flux.safetensors", "does not hold"), (None, "cannot be read as safetensors")):
        if content is None:
            (tmp_path / name).write_text("mine")
        else:
            shutil.copy(content, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} {said}") as raised:
            TinyFlux.load(tmp_path / "flux.safetensors")
        assert "\n" not in str(raised.value)
