"""The atlas (recording/places.py, recording/atlas.py): equal to a search through all activations, added up in any order."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from flux_poke.analysis.atlas_sheet import CELL, named_neurons, neurons_sheet, strongest_neurons
from flux_poke.analysis.sheets import GAP, MARGIN
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.integrators import euler
from flux_poke.parsing import read_image
from flux_poke.recording.atlas import MAP, PLACES, Atlas, AtlasImage, Places, add_to_atlas, merge_atlases
from flux_poke.recording.call import Call
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.places import PlacesRecorder, strongest
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import SHIPPED, TinyFlux
from PIL import Image

STEPS = 3
PROMPTS = [f"{template}{digit}" for template in ("", "a ") for digit in range(10)]


def drawn(tiny: TinyFlux, prompts, watcher, seed: int) -> None:
    """Draws prompts in one batch, watched."""
    context, vector = tiny.words(prompts)
    sigmas, steps = tiny.sigmas(STEPS), itertools.count()

    def velocity(x, sigma):
        call = Call.at(x, sigma, sigmas, next(steps), context=context)
        with watcher.watching(tiny.flux, call):
            return tiny.flux(x, sigma, context, vector)

    with torch.no_grad():
        euler(velocity, tiny.noise(len(prompts), seed), sigmas)


class Everything:
    """Keeps all activations of all sites: [images, steps, tokens, width]."""

    def __init__(self, layout):
        self.layout = layout
        self.kept: dict[str, list[torch.Tensor]] = {site.name: [] for site in layout.sites}

    def watching(self, model, call):
        hooks = ExitStack()
        for site in self.layout.sites:

            def keep(module, inputs, site=site):
                self.kept[site.name].append(inputs[0][..., site.down_column :].clone())

            hooks.enter_context(model.get_submodule(site.down).register_forward_pre_hook(keep))
        return hooks


@pytest.fixture(scope="module", params=["flux1", "flux2"])
def tiny(request) -> TinyFlux:
    return TinyFlux.load(family=request.param)


@pytest.fixture(scope="module")
def searched(tiny):
    """An atlas of 20 images, and all of their activations."""
    recorder, everything = PlacesRecorder(tiny.flux.layout, tiny.flux.layout.sites, maps=True), Everything(tiny.flux.layout)
    drawn(tiny, PROMPTS, recorder, seed=5)
    drawn(tiny, PROMPTS, everything, seed=5)
    fingerprint = Fingerprint.of_tensors(tiny.flux.state_dict())
    atlas = Atlas.new(tiny.flux.layout.family, fingerprint, recorder.results(), recorder.images)
    return atlas, recorder.images, {name: torch.stack(parts, 1) for name, parts in everything.kept.items()}


def test_the_strongest_places_are_those_of_all_activations(searched):
    atlas, images, everything = searched
    order = [[image.key for image in images].index(image.key) for image in atlas.images]
    for name, kept in everything.items():
        kept = kept[order]  # as the atlas has them
        strength, where = kept.abs().flatten(1, 2).max(1)  # [images, width]
        best, image = strength.sort(dim=0, descending=True, stable=True)
        places = atlas.sites[name]
        assert places.value.shape == (kept.shape[-1], PLACES)
        torch.testing.assert_close(places.value.abs().T, best[:PLACES], rtol=0, atol=0)
        assert places.image.T.equal(image[:PLACES].int())
        found = where.gather(0, image[:PLACES])
        assert (places.step.T.long() * kept.shape[2] + places.token.T).equal(found)
        values = kept.flatten(1, 2)[image[:PLACES], found, torch.arange(kept.shape[-1])]
        assert places.value.T.equal(values)


def test_a_map_shows_the_image_at_that_step(searched, tiny):
    atlas, images, everything = searched
    side = atlas.images[0].rows
    order = [[image.key for image in images].index(image.key) for image in atlas.images]
    for name, kept in everything.items():
        places, words = atlas.sites[name], kept.shape[2] - side * side
        if "txt" in name:
            assert not places.map.any()
            continue
        for neuron, place in ((0, 0), (17, 3), (100, PLACES - 1)):
            tokens = kept[order][places.image[neuron, place], places.step[neuron, place].long(), words:, neuron].abs()
            wide = tokens.unflatten(0, (side, side)).repeat_interleave(MAP // side, 0).repeat_interleave(MAP // side, 1)
            expected = (wide / places.value[neuron, place].abs() * 255).round().byte()
            torch.testing.assert_close(places.map[neuron, place].int(), expected.int(), rtol=0, atol=1)


def test_images_know_their_size_and_words(searched, tiny):
    image = searched[0].images[0]
    assert (image.rows * image.columns, image.words) == (tiny.tokens["img"], tiny.tokens["txt"])
    assert len({image.key for image in searched[0].images}) == 20


def test_tokens_that_do_not_count_are_never_strongest():
    h = torch.randn(3, 300, 40, generator=torch.Generator().manual_seed(1))
    counts = torch.rand(3, 300, generator=torch.Generator().manual_seed(2)) < 0.1
    counts[2] = False
    value, token = strongest(h, counts)
    for image in range(2):
        allowed = h[image].abs().masked_fill(~counts[image, :, None], -1)
        assert token[image].equal(allowed.argmax(0))
        assert value[image].equal(h[image].gather(0, token[image][None])[0])
    assert not value[2].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_found(wrong):
    h = torch.randn(1, 300, 5)
    h[0, 290, 3] = wrong
    assert not strongest(h)[0].isfinite().all()


def test_a_run_that_is_not_finite_is_left_out():
    tiny = TinyFlux.load()
    tiny.flux.get_parameter("single_blocks.1.linear1.weight")[-1, 0] = float("inf")
    recorder = PlacesRecorder(tiny.flux.layout, tiny.flux.layout.sites)
    drawn(tiny, ["a 3"], recorder, seed=1)
    assert recorder.results() == {}
    assert "not finite: this run is left out of the atlas" in recorder.note


def parted(atlas: Atlas, keys: set[str]) -> Atlas:
    """What an atlas of these images alone would hold, of one that holds all of its images' places."""
    images = tuple(image for image in atlas.images if image.key in keys)
    numbers = torch.tensor(
        [[one.key for one in images].index(image.key) if image.key in keys else -1 for image in atlas.images]
    )
    sites = {name: Places.strongest([site.of_images(numbers)]) for name, site in atlas.sites.items()}
    return replace(atlas, sites=sites, images=images)


def equal(a: Atlas, b: Atlas) -> bool:
    parts = [(a.sites[name].tensors, b.sites[name].tensors) for name in a.sites]
    return a.images == b.images and all(
        one["image"].equal(other["image"])
        and all(one[name][one["image"] >= 0].equal(other[name][other["image"] >= 0]) for name in one)
        for one, other in parts
    )


def random_atlas(seed: int, images: range, width: int = 30) -> Atlas:
    """An atlas of few values, so that many places are equally strong."""
    generator = torch.Generator().manual_seed(seed)
    tiny = TinyFlux.load()
    count = len(images)
    values = torch.stack(
        [torch.randint(-3, 4, (width,), generator=torch.Generator().manual_seed(n)).float() for n in images], 1
    )
    token = torch.stack([torch.randint(9, (width,), generator=torch.Generator().manual_seed(n)).int() for n in images], 1)
    order = torch.randperm(count, generator=generator)
    places = Places(
        values[:, order], torch.arange(count).int().expand(width, -1), token[:, order], torch.zeros(width, count).short()
    )
    known = [AtlasImage(f"{(images[n] * 7919) % 1000:03}", 4, 4, 8) for n in order.tolist()]
    fingerprint = Fingerprint.of_tensors(tiny.flux.state_dict())
    return Atlas.new("flux1", fingerprint, {"double-img-0": places}, known)


def test_adding_up_is_exact_in_any_order_and_counts_an_image_once():
    whole = random_atlas(0, range(50))
    parts = [random_atlas(1, range(20)), random_atlas(2, range(15, 30)), random_atlas(3, range(28, 50))]
    for order in itertools.permutations(parts):
        total = order[0].merge(order[1]).merge(order[2])
        assert equal(total, whole)
        assert equal(total.merge(order[0]), whole)
    assert equal(parts[0].merge(parts[1].merge(parts[2])), whole)


def test_files_come_back_and_add_up(tmp_path, searched):
    atlas = searched[0]
    keys = [image.key for image in atlas.images]
    add_to_atlas(tmp_path / "a.safetensors", parted(atlas, {*keys[:12]}))
    total = add_to_atlas(tmp_path / "a.safetensors", parted(atlas, {*keys[8:]}))
    assert [image.key for image in total.images] == keys
    assert equal(Atlas.load(tmp_path / "a.safetensors"), total)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(UserError, match="none of those to add up"):
        merge_atlases(tmp_path / "b.safetensors", [tmp_path / "a.safetensors"])


def test_atlases_of_other_neurons_are_refused(searched):
    atlas = searched[0]
    without = replace(atlas, sites={name: replace(site, map=None) for name, site in atlas.sites.items()})
    with pytest.raises(UserError, match=r"without maps.*with them"):
        atlas.merge(without)
    few = replace(atlas, sites=dict([*atlas.sites.items()][:3]))
    with pytest.raises(UserError, match="is of 3 MLPs"):
        atlas.merge(few, "few.safetensors")


def test_a_recording_holds_the_atlas_with_pictures(tmp_path):
    recording, file = Recording.at(tmp_path / "digits"), SHIPPED["flux1"] / "flux.safetensors"
    for _ in range(2):
        assert record(file, ["a 3", "seven", "1"], recording, Wanted(atlas=True), seed=2, steps=2, batch=2) == ()
    assert recording.kinds == {"atlas"}
    atlas = recording.atlas()
    assert {(image.prompt, image.seed) for image in atlas.images} == {("a 3", 2), ("seven", 3), ("1", 4)}
    assert atlas.images[0].texts in {("a", "3"), ("seven",), ("1",)}
    assert {path.stem for path in (tmp_path / "digits" / "atlas").iterdir()} == {image.key for image in atlas.images}
    with pytest.raises(UserError, match="recorded on another model"):
        record(SHIPPED["flux2"] / "flux.safetensors", ["a 3"], recording, Wanted(atlas=True), steps=2)


def test_a_sheet_shows_the_places_of_neurons(tmp_path):
    recording, file = Recording.at(tmp_path / "digits"), SHIPPED["flux1"] / "flux.safetensors"
    record(file, PROMPTS[:6], recording, Wanted(atlas=True), steps=2)
    atlas = recording.atlas()
    chosen = named_neurons("double-img-1:7, double-txt-0:400", atlas)
    assert chosen == [("double-img-1", 7), ("double-txt-0", 400)]
    sheet = neurons_sheet(recording, atlas, chosen, places=4)
    assert sheet.height == 2 * MARGIN + 2 * (CELL + GAP)
    for row, (name, neuron) in enumerate(chosen):
        image = atlas.images[atlas.sites[name].image[neuron, 0]]
        drawn = read_image(recording.atlas_picture(image.key)).convert("L").resize((CELL, CELL), Image.Resampling.BICUBIC)
        left = sheet.width - MARGIN - 4 * (CELL + GAP)
        top = MARGIN + row * (CELL + GAP)
        cell = sheet.crop((left, top, left + CELL, top + CELL)).convert("L")
        likeness = np.corrcoef(np.asarray(cell)[: CELL - 20].ravel(), np.asarray(drawn)[: CELL - 20].ravel())[0, 1]
        assert likeness > 0.7
    best = strongest_neurons(atlas, 5)
    means = {name: site.value[:, 0].abs().mean() for name, site in atlas.sites.items()}
    ranked = sorted(
        ((site.value[neuron, 0].abs() / means[name]).item(), name, neuron)
        for name, site in atlas.sites.items()
        for neuron in range(len(site.value))
    )
    assert best == [(name, neuron) for _, name, neuron in ranked[:-6:-1]]


@pytest.mark.parametrize("names", ["", "double-img-0", "double-img-0:512", "single-9:1", "double-img-0:x", "-:1"])
def test_neurons_that_are_not_there_are_refused(names: str):
    with pytest.raises(UserError, match=r"is no neuron of this atlas|are named"):
        named_neurons(names, random_atlas(0, range(3), width=512))
