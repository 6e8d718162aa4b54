"""Flux Timer on a real server, beside ComfyUI's own schedulers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flux_poke.flux.sampling import FluxTimer
from flux_poke.headless.client import ComfyClient
from PIL import Image

TIMER = "7"


def timer_inputs(**given) -> dict:
    usual = {"steps": 20, "shift": "static", "static_shift": 1.0, "denoise": 1.0, "width": 1024, "height": 1024}
    return usual | given


@pytest.fixture
def pictures(client: ComfyClient, workflow):
    """What the tiny FLUX draws along the noise levels that `scheduler` gives, [4, 256, 256, 3]; nodes "20" and up are it."""

    def draw(**nodes: dict) -> np.ndarray:
        graph = workflow("flux_timer_tiny")
        graph = {key: node for key, node in graph.items() if int(key) < 12}
        for number, node in nodes.items():
            graph[number[1:]] = node
        graph["8"]["inputs"]["sigmas"] = ["20", 0]
        result = client.run(graph)
        shown = [Image.open(io.BytesIO(client.fetch(file))) for file in result.files("images", "11")]
        return np.stack([np.asarray(image, float) for image in shown])

    return draw


def node(kind: str, **given) -> dict:
    return {"class_type": kind, "inputs": given}


def test_the_workflow_draws_over_the_first_digits_from_a_lower_level(client: ComfyClient, workflow):
    result = client.run(workflow("flux_timer_tiny"))
    levels = {number: result.texts[number].split() for number in (TIMER, "14")}
    assert levels[TIMER][:2] == ["1.000", "0.950"]
    assert levels["14"][0] == f"{FluxTimer(20, denoise=0.75).sigmas()[0].item():.3f}" == "0.769"
    assert levels[TIMER][-1] == levels["14"][-1] == "0.000"
    curve = Image.open(io.BytesIO(client.fetch(result.files("images", TIMER)[0])))
    assert curve.width > curve.height > 200
    assert len(result.files("images", "18")) == 4


@pytest.mark.parametrize(
    ("given", "scheduler"),
    [
        (
            {"shift": "FLUX.1 (by size)", "steps": 8, "width": 1024, "height": 768},
            {
                "_19": node("ModelSamplingFlux", model=["1", 0], max_shift=1.15, base_shift=0.5, width=1024, height=768),
                "_20": node("BasicScheduler", model=["19", 0], scheduler="simple", steps=8, denoise=1.0),
            },
        ),
        (
            {"shift": "FLUX.2 (by size and steps)", "steps": 8, "width": 1024, "height": 768},
            {"_20": node("Flux2Scheduler", steps=8, width=1024, height=768)},
        ),
    ],
    ids=["FLUX.1", "FLUX.2"],
)
def test_pictures_are_the_same_as_along_comfyuis_own_levels(pictures, given, scheduler):
    theirs = pictures(**scheduler)
    ours = pictures(_20=node("FluxPokeFluxTimer", **timer_inputs(**given)))
    others = pictures(_20=node("FluxPokeFluxTimer", **timer_inputs(steps=8)))
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(others - theirs).max() > 10


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 28, 50])
@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (1360, 768), (2048, 1536)])
def test_levels_are_those_of_comfyuis_schedulers(in_process, steps, width, height):
    from comfy.model_sampling import CONST, ModelSamplingFlux
    from comfy.samplers import calculate_sigmas
    from comfy_extras.nodes_custom_sampler import BasicScheduler
    from comfy_extras.nodes_flux import Flux2Scheduler

    tokens = width * height // 256
    flux2 = Flux2Scheduler.execute(steps, width, height).args[0]
    torch.testing.assert_close(FluxTimer(steps, "flux2").sigmas(tokens), flux2, rtol=0, atol=2e-6)

    class Sampling(ModelSamplingFlux, CONST):
        pass

    class Model:
        def get_model_object(self, name: str):
            return sampling

    sampling = Sampling()
    sampling.set_parameters(shift=0.5 + 0.65 * (tokens - 256) / 3840)  # what the node ModelSamplingFlux sets
    whole = 10_000 % steps == 0  # "simple" takes levels out of a table of 10,000
    for denoise in (1.0, 0.6, 0.25):
        theirs = BasicScheduler.execute(Model(), "simple", steps, denoise).args[0]
        ours = FluxTimer(steps, "dynamic", denoise).sigmas(tokens)
        exact = whole and 10_000 % int(steps / denoise) == 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 if exact else 1e-3)
    assert torch.equal(calculate_sigmas(sampling, "simple", steps)[-1:], torch.zeros(1))


@pytest.mark.parametrize(("channels", "rows", "tokens"), [(16, 64, 1024), (4, 64, 1024), (128, 32, 1024), (16, 63, 1024)])
def test_a_latents_size_is_that_of_its_picture(in_process, channels, rows, tokens):
    from flux_poke.nodes.host import image_tokens

    assert image_tokens({"samples": torch.zeros(1, channels, rows, rows)}) == tokens
