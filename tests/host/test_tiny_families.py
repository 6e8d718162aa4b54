"""Load Tiny FLUX on a real server: what stock nodes draw with either family, from a prompt and from a reference."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flux_poke.flux.model import Flux
from flux_poke.headless.client import ComfyClient
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.recording.internals import Internals
from flux_poke.tiny.data import digit_images, read_digits
from flux_poke.tiny.words import DIGIT_WORDS
from PIL import Image
from safetensors.torch import load_file, save_file


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def drawing(tiny_family, prompt: str, seed: int, batch: int = 1, model: list | None = None, cond: str = "text") -> dict:
    return {
        "tiny": tiny_family.node,
        "text": node("CLIPTextEncode", clip=["tiny", 1], text=prompt),
        "none": node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": tiny_family.empty(batch),
        "sample": node(
            "KSampler", model=model or ["tiny", 0], positive=[cond, 0], negative=["none", 0], latent_image=["empty", 0],
            seed=seed, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["tiny", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="flux_poke/tiny"),
        "latent": node("SaveLatent", samples=["sample", 0], filename_prefix="flux_poke/tiny"),
    }  # fmt: skip


def drawn(client: ComfyClient, host, graph: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and images [batch, 3, 64, 64] in 0..1."""
    found = client.run(graph)
    pictures = [np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in found.files("images", "save")]
    (file,) = found.files("latents", "latent")
    latents = load_file(host.output / file["subfolder"] / file["filename"])["latent_tensor"]
    return latents, torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_stock_nodes_draw_what_the_reference_draws(client: ComfyClient, host, tiny_family):
    """The host computes in bfloat16 or float32, as it chooses for the file."""
    latents, images = drawn(client, host, drawing(tiny_family, "a handwritten three", seed=1, batch=4))
    expected = tiny_family.latents(tiny_family.load().flux, "a handwritten three", seed=1, batch=4)
    assert relative(tiny_family.load().autoencoder.decode(unscaled(tiny_family, latents)), images) < 0.02
    assert relative(unscaled(tiny_family, latents), expected) < 0.05


def unscaled(tiny_family, latents: torch.Tensor) -> torch.Tensor:
    """ComfyUI keeps FLUX.1's latents in its latent format, and FLUX.2's as they are."""
    return (latents - 0.1159) * 0.3611 if tiny_family.family == "flux1" else latents


def test_stock_nodes_draw_right_digits_with_flux2(client: ComfyClient, host, tiny_flux2):
    right = 0
    for digit, word in enumerate(DIGIT_WORDS):
        _, images = drawn(client, host, drawing(tiny_flux2, f"the digit {word}", seed=digit, batch=2))
        right += int((read_digits(images) == digit).sum())
    assert right >= 15


@pytest.fixture
def reference(host) -> torch.Tensor:
    """A real digit 6 [1, 3, 64, 64], in the server's input folder as digit.png."""
    images, digits = digit_images()
    picture = (images[digits == 6][:1] * 255).round()
    Image.fromarray(picture[0].permute(1, 2, 0).byte().numpy()).save(host.base / "input" / "digit.png")
    return picture / 255


def test_a_reference_latent_is_drawn_in_negative_as_the_reference_transformer_draws_it(
    client: ComfyClient, host, tiny_flux2, reference
):
    graph = drawing(tiny_flux2, "the negative of it", seed=3, cond="referred") | {
        "picture": node("LoadImage", image="digit.png"),
        "encode": node("VAEEncode", pixels=["picture", 0], vae=["tiny", 2]),
        "referred": node("ReferenceLatent", conditioning=["text", 0], latent=["encode", 0]),
    }
    latents, images = drawn(client, host, graph)
    tiny = tiny_flux2.load()
    encoded = tiny.autoencoder.encode(reference)
    expected = tiny_flux2.latents(tiny.flux, "the negative of it", seed=3, batch=1, references=(encoded,))
    assert relative(latents, expected) < 0.05
    assert read_digits(1 - images).tolist() == [6]
    assert relative(images, 1 - reference) < 0.2
    without, _ = drawn(client, host, drawing(tiny_flux2, "the negative of it", seed=3))
    assert relative(without, expected) > 0.2


def test_vae_loader_takes_the_autoencoder_of_flux2_as_taef2(client: ComfyClient, host, tiny_flux2):
    """ComfyUI knows FLUX.2's small autoencoder by two files in models/vae_approx."""
    folder = host.base / "models" / "vae_approx"
    folder.mkdir(exist_ok=True)
    tensors = load_file(tiny_flux2.checkpoint.parent / "autoencoder.safetensors")
    for part in ("encoder", "decoder"):
        prefix = f"taesd_{part}."
        held = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        save_file(held, folder / f"taef2_{part}.safetensors")
    graph = drawing(tiny_flux2, "a 7", seed=2)
    plain = drawn(client, host, graph)[1]
    graph["loaded"] = node("VAELoader", vae_name="taef2")
    graph["decode"]["inputs"]["vae"] = ["loaded", 0]
    assert torch.equal(drawn(client, host, graph)[1], plain)


def test_flux2_is_recorded_cut_repaired_saved_and_drawn_as_the_reference_draws_the_same_cut(
    client: ComfyClient, host, tiny_flux2
):
    """Of the text, padding is left out of what is recorded."""
    prompts = ("a three", "the digit 8", "number five", "a handwritten one")
    record = {"record": node("FluxPokeRecord", model=["tiny", 0], name="flux2", rows=48, steps=6, max_gb=1.0, probe_steps=2)}
    for seed, prompt in enumerate(prompts):
        client.run(record | drawing(tiny_flux2, prompt, seed, batch=4, model=["record", 0]))
    internals = Internals.load(host.recorded("flux2"))
    assert internals.family == "flux2"
    calls = len(prompts) * 20 * 4
    assert {name: site.tokens for name, site in internals.sites.items() if name.endswith("-0")} == {
        "double-img-0": calls * 16,
        "double-txt-0": calls * 8,
        "single-0": calls * 24,
    }

    pruned = {
        "recording": node("FluxPokeLoadRecording", name="flux2"),
        "plan": node(
            "FluxPokePlanByBudget", recording=["recording", 0], unet_name=tiny_flux2.file, budget="share of the neurons",
            amount=0.5, touch="both", precision="stored", protect="", save_as="flux2",
        ),
        "load": node("FluxPokeLoadPrunedFlux", plan=["plan", 0], repair="affine", weight_dtype="default"),
        "file": node(
            "FluxPokeSavePrunedFlux", plan_or_model=["plan", 0], repair="affine", save_as="flux2_half", fold=False,
            precision="as planned",
        ),
    }  # fmt: skip
    latents, _ = drawn(client, host, pruned | drawing(tiny_flux2, "a three", 9, batch=2, model=["load", 0]))
    saved = Pruned.open(host.base / "models" / "diffusion_models" / "flux2_half.safetensors")
    assert sum(len(kept) for kept in saved.plan.kept.values()) == 8 * 384 // 2
    cut = tiny_flux2.latents(Flux.load(dict(saved.tensors), torch.float32), "a three", seed=9, batch=2)
    dense = tiny_flux2.latents(tiny_flux2.load().flux, "a three", seed=9, batch=2)
    assert relative(latents, cut) < 0.05
    assert relative(latents, cut) < 0.5 * relative(latents, dense)
