"""Record Atlas on the real server: places as an independent computation finds them, and the pictures that were drawn."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from flux_poke.analysis.atlas_sheet import neurons_sheet
from flux_poke.analysis.written import Writer, written_pictures
from flux_poke.errors import UserError
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.integrators import euler
from flux_poke.headless.client import ComfyClient
from flux_poke.recording.call import Call, TokenMask
from flux_poke.recording.places import PlacesRecorder
from flux_poke.recording.recording import Recording
from flux_poke.tiny.words import words_of
from PIL import Image

PROMPT = "a handwritten three"


@pytest.fixture
def graph(workflow, tiny_family):
    """The graph that ships with Record Atlas in the place of Record, and its twin without."""

    def make(name: str = "", seed: int = 1, **atlas) -> dict:
        graph = workflow("try_it_tiny")
        graph["1"] = tiny_family.node
        graph["5"] = tiny_family.empty(3)
        graph["6"]["inputs"] |= {"seed": seed, "steps": 6}
        graph["8"]["inputs"]["images"] = ["7", 0]
        del graph["9"], graph["10"]
        if name:
            inputs = {"model": ["1", 0], "name": name, "blocks": "all", "maps": True, "vae": ["1", 2], "clip": ["1", 1]} | atlas
            graph["2"] = {"class_type": "FluxPokeRecordAtlas", "inputs": inputs}
        else:
            graph["6"]["inputs"]["model"] = ["1", 0]
            del graph["2"]
        return graph

    return make


def pictures(client: ComfyClient, result) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in result.files("images", "8")]


def test_places_are_those_of_an_independent_computation(client: ComfyClient, host, graph, tiny_family):
    name = f"atlas {tiny_family.family}"
    drawn = pictures(client, client.run(graph(name)))
    np.testing.assert_array_equal(drawn, pictures(client, client.run(graph())))
    recording = Recording.open(host.output / "flux_poke" / name)
    atlas = recording.atlas()
    assert {(image.prompt, image.seed) for image in atlas.images} == {(PROMPT, 1)}
    padded = 504 if tiny_family.family == "flux2" else 0  # zeros that ComfyUI sets before
    assert {image.texts for image in atlas.images} == {("",) * padded + ("a", "handwritten", "three")}
    assert atlas.images[0].words == padded + 8
    stored = [np.asarray(Image.open(recording.atlas_picture(image.key))).astype(int) for image in atlas.images]
    nearest = [min(range(3), key=lambda n: np.abs(picture - drawn[n]).sum()) for picture in stored]
    assert sorted(nearest) == [0, 1, 2]
    for picture, number in zip(stored, nearest, strict=True):
        assert np.abs(picture - drawn[number]).max() <= 1  # ComfyUI cuts off where we round

    tiny = tiny_family.load()
    recorder, steps, sigmas = PlacesRecorder(tiny.flux.layout, tiny.flux.layout.sites), itertools.count(), tiny_family.sigmas(6)
    context, vector = tiny_family.texts([PROMPT] * 3)
    words = TokenMask(txt=(context != 0).any(-1)) if tiny_family.family == "flux2" else TokenMask()

    def velocity(x, sigma):
        with recorder.watching(tiny.flux, Call.at(x, sigma, sigmas, next(steps), mask=words, context=context)):
            return tiny.flux(x, sigma, context, vector)

    with torch.no_grad():
        euler(velocity, torch.randn(3, *tiny.latent_shape, generator=torch.Generator().manual_seed(1)), sigmas)
    for site, places in recorder.results().items():
        strongest = places.value.abs().sort(descending=True).values
        near = torch.isclose(atlas.sites[site].value.abs(), strongest, rtol=2e-2, atol=2e-3)
        assert near.float().mean() > 0.99  # rounded otherwise on the way


def test_the_same_picture_counts_once_and_others_add_up(client: ComfyClient, host, graph, tiny_family):
    name = f"atlas of several runs {tiny_family.family}"
    for seed in (1, 1, 2):
        longer = "a handwritten three by hand in chalk on black"
        result = client.run(graph(name, seed, maps=False, blocks="single", prompt=longer))
    assert result.texts["2"].startswith("6 images")
    assert "words of its text are not known" in result.texts["2"]  # another prompt is named than the one that is drawn
    atlas = Recording.open(host.output / "flux_poke" / name).atlas()
    assert (len(atlas.images), atlas.mapped) == (6, False)
    assert all(site.startswith("single") for site in atlas.sites)
    assert {image.texts for image in atlas.images} == {()}
    assert all((places.image[:, :6] >= 0).all() for places in atlas.sites.values())
    with pytest.raises(UserError, match="is an atlas of other MLPs, or without maps"):
        client.run(graph(name, 3, maps=True, blocks="single"))


def test_a_sheet_shows_what_neurons_write_as_without_a_host(client: ComfyClient, host, graph, tiny_family):
    name, chosen = f"atlas of what is written {tiny_family.family}", [("single-3", 5), ("double-img-0", 7), ("double-txt-1", 2)]
    shown = graph(name)
    inputs = {"names": ", ".join(f"{site}:{neuron}" for site, neuron in chosen), "count": 1, "places": 2}
    links = {"recording": ["2", 1], "after": ["6", 0], "model": ["1", 0], "vae": ["1", 2]}
    shown["9"] = {"class_type": "FluxPokeShowNeurons", "inputs": inputs | links}
    (file,) = client.run(shown).files("images", "9")
    sheet = Image.open(io.BytesIO(client.fetch(file)))
    recording, checkpoint = Recording.open(host.output / "flux_poke" / name), Checkpoint(tiny_family.checkpoint)
    writer, atlas = Writer(checkpoint, checkpoint.layout), recording.atlas()
    written = written_pictures(writer, tiny_family.load().autoencoder.decode, atlas, chosen)
    assert [picture is None for picture in written] == [False, False, True]
    expected = neurons_sheet(recording, atlas, chosen, 2, written)
    assert sheet.size == expected.size
    assert np.abs(np.asarray(sheet, float) - np.asarray(expected, float)).max() <= 6  # ComfyUI cuts off where we round
    family = "FLUX.2" if tiny_family.family == "flux1" else "FLUX.1"
    other = {"class_type": "FluxPokeLoadTinyFlux", "inputs": {"family": family}}
    recorded = {"class_type": "FluxPokeLoadRecording", "inputs": {"name": name}}
    inputs |= {"recording": ["2", 0], "model": ["1", 0], "vae": ["1", 2]}
    with pytest.raises(UserError, match="was recorded on another model than this model"):
        client.run({"1": other, "2": recorded, "9": {"class_type": "FluxPokeShowNeurons", "inputs": inputs}})


def test_the_shipped_graph_shows_what_neurons_look_for(client: ComfyClient, host, workflow):
    shipped = workflow("what_neurons_look_for_tiny")
    shipped["2"]["inputs"]["name"] = "atlas as shipped"
    shipped["6"]["inputs"]["steps"] = 4
    for seed in (1, 2):
        shipped["6"]["inputs"]["seed"] = seed
        result = client.run(shipped)
    assert "16 images" in result.texts["2"]
    atlas = Recording.open(host.output / "flux_poke" / "atlas as shipped").atlas()
    assert all(image.prompt and image.texts == tuple(words_of(image.prompt)) for image in atlas.images)
    assert "8 of 4,096 neurons" in result.texts["9"]
    (file,) = result.files("images", "9")
    assert Image.open(io.BytesIO(client.fetch(file))).width > 1100
    shipped["9"]["inputs"] |= {"names": "single-0:3, double-txt-9:1"}
    with pytest.raises(UserError, match="'double-txt-9:1' is no neuron of this atlas"):
        client.run(shipped)
