"""The tiny twins of the klein workflows, run by their API form: the nodes and links of the large ones, on the tiny FLUX.2."""

from __future__ import annotations

import io
import re

import numpy as np
import torch
from flux_poke.headless.client import ComfyClient, Result
from flux_poke.recording.recording import Recording
from flux_poke.recording.trajectories import Trajectories
from flux_poke.tiny.data import read_digits
from PIL import Image

#: What the tiny FLUX.2 has of blocks, and at how many steps they are tapped.
BLOCKS, TAPPED = 6, 3


def pictures(client: ComfyClient, graph: dict, result: Result, kind: str = "SaveImage") -> torch.Tensor:
    """What the node of a kind shows, [pictures, 3, 64, 64] in 0..1."""
    files = result.files("images", of_kind(graph, kind))
    found = [np.asarray(Image.open(io.BytesIO(client.fetch(file))).convert("RGB").resize((64, 64))) for file in files]
    return torch.tensor(np.stack(found)).permute(0, 3, 1, 2) / 255


def of_kind(graph: dict, kind: str) -> str:
    return next(number for number, node in graph.items() if node["class_type"] == kind)


def test_klein_text_to_image_draws_records_and_taps(client, host, workflow):
    graph = workflow("klein_text_to_image_tiny")
    result = client.run(graph)
    assert read_digits(pictures(client, graph, result)).tolist() == [3]
    found = Recording.open(host.output / "flux_poke" / "klein_tiny")
    assert found.kinds >= {"internals", "rows"}
    internals = found.internals()
    assert (internals.family, internals.steps) == ("flux2", 20)
    assert internals.sites["double-img-0"].tokens == 20 * 16
    assert internals.sites["double-txt-0"].tokens < 20 * 16  # of 512
    assert f"{BLOCKS * TAPPED} predictions" in result.texts[of_kind(graph, "FluxPokeDecodeBlockPreviews")]
    assert "FLUX.2" in result.texts[of_kind(graph, "FluxPokeInternalsReport")]


def test_klein_image_to_image_edits_a_picture_and_records_the_edit(client, host, workflow):
    graph = workflow("klein_image_to_image_tiny")
    result = client.run(graph)
    before, after = pictures(client, graph, result, "PreviewImage"), pictures(client, graph, result)
    assert before.mean() < 0.5 < after.mean()
    assert read_digits(torch.cat([before, 1 - after])).tolist() == [3, 3]
    found = Recording.open(host.output / "flux_poke" / "klein_edits_tiny")
    assert found.internals().sites["double-img-0"].tokens == 20 * 16  # those of the picture that is edited are left out
    samples = Trajectories.open(found.states())
    assert samples.batch(torch.tensor([0])).references[0].shape == (1, 128, 4, 4)


def test_klein_prune_and_compare_cuts_a_quarter_of_the_neurons(client, host, workflow):
    graph = workflow("klein_prune_and_compare_tiny")
    result = client.run(graph)
    assert "30 images drawn" in result.texts[of_kind(graph, "FluxPokeCalibrate")]
    told = result.texts[of_kind(graph, "FluxPokeCompare")]
    assert float(re.findall(r"PSNR ([\d.]+) dB", told)[0]) > 20
    dense, pruned = re.findall(r"([\d.]+) -> ([\d.]+) MB in memory, PSNR .* s a step", told)[0]
    assert float(pruned) < float(dense)
    planned = re.findall(r"([\d,]+) of ([\d,]+) neurons kept", result.texts[of_kind(graph, "FluxPokePlanByBudget")])
    kept, neurons = (int(number.replace(",", "")) for number in planned[0])
    assert kept == 0.75 * neurons
