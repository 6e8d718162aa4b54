"""The tiny FLUX.2 that ships: what it draws from a prompt and from a reference, and that the commands of the loop take it."""

from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.integrators import euler
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.tiny.data import digit_accuracy, digit_images
from flux_poke.tiny.model import SHIPPED, TinyFlux
from flux_poke.tiny.words import FLUX2_TEXT, NEGATIVE_TEMPLATES, digit_prompts, pad_text

CHECKPOINT = SHIPPED["flux2"] / "flux.safetensors"


@pytest.fixture(scope="module")
def tiny() -> TinyFlux:
    return TinyFlux.load(family="flux2")


@pytest.fixture(scope="module")
def references() -> tuple[torch.Tensor, list[int]]:
    """Forty real digits."""
    images, digits = digit_images()
    return images[:400:10], digits[:400:10].tolist()


def test_both_families_together_are_smaller_than_20_mb():
    files = [file for folder in SHIPPED.values() for file in folder.glob("*.safetensors")]
    assert len(files) == 6
    assert sum(file.stat().st_size for file in files) < 20_000_000


def test_the_shipped_shape_is_that_of_klein_at_hidden_128():
    layout = Checkpoint(CHECKPOINT).layout
    assert (layout.family, layout.hidden, layout.head_dim, layout.depth, layout.depth_single) == ("flux2", 128, 128, 2, 4)
    assert (layout.context, layout.vector, layout.guidance, layout.in_channels, layout.patch) == (64, None, False, 128, 1)
    assert {(site.width, site.gated, site.biased) for site in layout.sites} == {(384, True, False)}
    assert layout.modulated == ()


def test_six_of_seven_drawings_read_as_the_digit_asked_for(tiny):
    digits = [number % 10 for number in range(100)]
    prompts = [digit_prompts(digit)[number // 10 % 26] for number, digit in enumerate(digits)]
    assert digit_accuracy(tiny.draw(prompts, seed=1), digits) >= 6 / 7


@torch.no_grad()
def test_text_padded_as_comfyui_pads_it_draws_right_digits_too(tiny):
    digits, latents = list(range(10)), tiny.noise(10, 1)
    context = pad_text(tiny.words([digit_prompts(digit)[0] for digit in digits])[0])
    assert context.shape[1] == FLUX2_TEXT
    latents = euler(lambda x, sigma: tiny.flux(x, sigma, context), latents, tiny.sigmas())
    assert digit_accuracy(tiny.autoencoder.decode(latents), digits) >= 0.8


def test_the_negative_of_a_reference_is_the_same_digit_with_black_and_white_swapped(tiny, references):
    given, digits = references
    prompts = [NEGATIVE_TEMPLATES[number % len(NEGATIVE_TEMPLATES)] for number in range(len(given))]
    drawn = tiny.draw(prompts, seed=1, references=[given])
    assert digit_accuracy(1 - drawn, digits) >= 0.9
    assert (drawn - (1 - given)).square().mean() < 0.1 * (given - (1 - given)).square().mean()
    others = tiny.draw(prompts, seed=1, references=[given.roll(1, 0)])
    assert digit_accuracy(1 - others, digits) < 0.5, "the digit is in the reference alone"


def test_the_prompt_says_whether_a_reference_is_drawn_in_negative(tiny, references):
    given, digits = references
    drawn = tiny.draw(["a copy of it"] * len(given), seed=1, references=[given])
    assert digit_accuracy(drawn, digits) >= 0.9
    assert drawn.mean() < 0.5 < tiny.draw(["the negative of it"] * len(given), seed=1, references=[given]).mean()


def test_the_autoencoder_gives_images_and_their_negatives_back_at_30_db(tiny):
    images = digit_images()[0][::45]
    for pictures in (images, 1 - images):
        error = (tiny.autoencoder.decode(tiny.autoencoder.encode(pictures)) - pictures).square().mean()
        assert -10 * torch.log10(error) > 30


def test_a_tiny_flux1_takes_no_reference(references):
    with pytest.raises(UserError, match="takes no reference pictures"):
        TinyFlux.load().draw(["three"], references=[references[0][:1]])


def test_every_command_of_the_loop_takes_it(run, tmp_path: Path):
    """record, plan, prune, retrain, replace, fit, inspect."""
    texts = tmp_path / "prompts.txt"
    texts.write_text("\n".join(digit_prompts(number % 10)[0] for number in range(20)))
    digits, plan = tmp_path / "digits", tmp_path / "plan.safetensors"
    kinds = ("--what", "internals,rows,trajectories", "--keep-steps", 4)
    run("record", CHECKPOINT, digits, "--prompts", texts, "--steps", 4, *kinds)
    told = run("plan", digits, "--checkpoint", CHECKPOINT, "--neurons", 0.5, "--multiple", 32, "-o", plan)
    assert "50% of the neurons" in told
    run("prune", plan, "-o", tmp_path / "pruned.safetensors")
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    assert sum(len(kept) for kept in pruned.plan.kept.values()) == 8 * 384 // 2
    quick = ("--steps", 2, "--batch", 8, "--save-dtype", "float32")
    run("retrain", plan, "--method", "distill", *quick, "--out", tmp_path / "layers")
    run("replace", tmp_path / "layers", "--checkpoint", CHECKPOINT, "--out", tmp_path / "retrained.safetensors")
    short = ("--neurons", 0.5, "--count", 6, "--steps", 4)
    run("fit", CHECKPOINT, "--prompts", texts, "--out", tmp_path / "fitted.safetensors", *short, "--recording", digits)
    for name in ("pruned", "retrained", "fitted"):
        file = tmp_path / f"{name}.safetensors"
        assert "FLUX.2" in run("inspect", file)
        assert TinyFlux.load(file).draw(["three"]).shape == (1, 3, 64, 64)
