"""Block states and trajectories (states.py, block_states.py): they are what the model saw and gave."""

import json
from typing import Any

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.model import Flux
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.call import Call
from flux_poke.recording.states import StateChoice, StateRecorder, estimated_state_bytes, indices_around
from flux_poke.recording.store import MANIFEST, HiddenStates, Limit
from flux_poke.recording.trajectories import Trajectories
from safetensors.torch import load_file, save_file

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
EXACT = StateChoice(steps=2, dtype=torch.float32)


@pytest.fixture
def flux(tensors) -> Flux:
    return Flux.load(tensors("flux1"))


@pytest.fixture
def store(tmp_path, flux) -> HiddenStates:
    return store_of(flux, tmp_path / "hidden")


def store_of(flux, folder):
    return HiddenStates.for_model(folder, flux.layout.family, Fingerprint.of_tensors(flux.state_dict()))


@torch.no_grad()
def draw(flux, recorder, inputs, images=None, **told):
    """Two images; every step sees inputs of its own, seed = step. The steps that were recorded."""
    with recorder.run() as run:
        for step in range(4):
            given = inputs(flux, batch=2 if images is None else len(images), seed=step)
            with run.watching(flux, Call.at(given["x"], given["sigma"], SIGMAS, step, images, **told)):
                flux(**given)
        return sorted(run.steps)


def all_indices(flux):
    return range(flux.layout.depth + flux.layout.depth_single + 1)


@pytest.mark.parametrize("family", ["flux1", "flux2"])
@torch.no_grad()
def test_each_block_turns_its_state_into_the_next(family, tensors, inputs, tmp_path):
    flux = Flux.load(tensors(family))
    draw(flux, StateRecorder("blocks", store_of(flux, tmp_path), EXACT, indices=all_indices(flux)), inputs)
    states = BlockStates.open(tmp_path)
    assert states.indices == [0, 1, 2, 3, 4]
    assert len(states) == 4
    state = states.batch(torch.arange(4), 0)
    double: object = state.vec
    single: object = state.vec
    if family == "flux2":
        double = (flux.double_stream_modulation_img(state.vec), flux.double_stream_modulation_txt(state.vec))
        single = flux.single_stream_modulation(state.vec)
    for block_index in range(4):
        state, after = states.batch(torch.arange(4), block_index), states.batch(torch.arange(4), block_index + 1)
        if block_index < 2:
            img, txt = flux.double_blocks[block_index](img=state.img, txt=state.txt, vec=double, pe=state.pe)
        else:
            tokens = flux.single_blocks[block_index - 2](torch.cat((state.txt, state.img), 1), vec=single, pe=state.pe)
            txt, img = tokens[:, :5], tokens[:, 5:]
        torch.testing.assert_close(img, after.img)
        torch.testing.assert_close(txt, after.txt)


@torch.no_grad()
def test_blocks_that_add_in_place_do_not_reach_what_was_recorded(flux, store, inputs):
    def in_place(module, args, kwargs, output):  # as ComfyUI's blocks do
        kwargs["img"].copy_(output[0])
        kwargs["txt"].copy_(output[1])
        return kwargs["img"], kwargs["txt"]

    recorder = StateRecorder("blocks", store, StateChoice(steps=4, dtype=torch.float32), indices=all_indices(flux))
    draw(flux, recorder, inputs)
    for block in flux.double_blocks:
        block.register_forward_hook(in_place, with_kwargs=True)
    draw(flux, recorder, inputs)
    states = BlockStates.open(store.folder)
    for block_index in states.indices:
        plain, changed = states.batch(torch.arange(8), block_index), states.batch(torch.arange(8, 16), block_index)
        torch.testing.assert_close(plain.img, changed.img)
        torch.testing.assert_close(plain.txt, changed.txt)


@torch.no_grad()
def test_trajectories_are_what_the_model_was_told_and_answered(store, flux, inputs):
    draw(flux, StateRecorder("trajectories", store, StateChoice(dtype=torch.float32)), inputs, seed=(7, 8), prompts=("a", "b"))
    samples = Trajectories.open(HiddenStates.open(store.folder))
    (captures,) = (shard.captures for shard in HiddenStates.open(store.folder).manifest.shards)
    step = captures[0].step
    given = inputs(flux, batch=2, seed=step)
    point = samples.batch(torch.tensor([1, 0]))
    for name in ("x", "sigma", "context", "vector"):
        torch.testing.assert_close(getattr(point, name), given[name][[1, 0]])
    torch.testing.assert_close(point.velocity, flux(**given)[[1, 0]])
    assert [(c.image, c.prompt, c.seed, c.sigma) for c in captures] == [(0, "a", 7, SIGMAS[step]), (1, "b", 8, SIGMAS[step])]


def test_prompts_and_seed_are_those_that_the_first_call_tells(store, flux, inputs):
    given = inputs(flux)
    recorder = StateRecorder("trajectories", store, StateChoice(4))
    with recorder.run() as run, torch.no_grad():
        first: dict[str, Any] = {"prompts": ("a", "b"), "seed": 7}
        for step, told in enumerate((first, {}, {})):
            with run.watching(flux, Call.at(given["x"], given["sigma"], SIGMAS, step, **told)):
                flux(**given)
    captures = [capture for shard in store.manifest.shards for capture in shard.captures]
    assert [(c.prompt, c.seed) for c in captures] == [("a", 7), ("b", 7)] * 3


def test_rows_without_an_image_are_left_out(store, flux, inputs):
    draw(flux, StateRecorder("trajectories", store, EXACT), inputs, images=[None, None, 0, 1])
    samples = Trajectories.open(store)
    assert samples.image.tolist() == [0, 1, 0, 1]
    step = store.manifest.shards[0].captures[0].step
    point = samples.batch(torch.tensor([0, 1]))
    torch.testing.assert_close(point.x, inputs(flux, batch=4, seed=step)["x"][2:])


def test_one_step_in_twenty_is_recorded_and_the_same_ones_for_the_same_seed(store, flux, inputs, tmp_path):
    again = store_of(flux, tmp_path / "again")
    steps = [draw(flux, StateRecorder("blocks", s, indices={0}), inputs) for s in (store, again)]
    assert len(steps[0]) == 1
    assert steps[0] == steps[1]


def test_only_the_states_around_the_chosen_blocks_are_stored_and_the_vector_once(store, flux, inputs):
    indices = indices_around({Block("double", 1), Block("single", 1)}, flux.layout)
    draw(flux, StateRecorder("blocks", store, indices=indices), inputs)
    tensors = load_file(store.folder / store.manifest.shards[0].file)
    assert tensors.keys() == {f"{k}-{stream}" for k in (1, 2, 3, 4) for stream in ("img", "txt")} | {"vec", "pe"}
    assert tensors["1-img"].dtype == torch.bfloat16
    assert tensors["pe"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["blocks", "trajectories"])
def test_the_estimate_is_what_is_taken(kind, store, flux, inputs):
    indices = all_indices(flux)
    draw(flux, StateRecorder(kind, store, EXACT, indices=indices), inputs)
    estimate = estimated_state_bytes(kind, flux.layout, indices, EXACT, calls=4, image_tokens=24, words=5)
    pe = 29 * 64 * 4 * 4  # once a file, not once a row
    assert estimate == store.bytes(kind) + (2 * pe if kind == "blocks" else 4 * 4)


def test_recording_stops_where_the_limit_is(store, flux, inputs):
    recorder = StateRecorder("blocks", store, StateChoice(steps=4), Limit(250e3 / 1e9, "stop"), indices=all_indices(flux))
    draw(flux, recorder, inputs)
    assert recorder.full
    assert 0 < store.bytes("blocks") <= 250e3
    assert len(BlockStates.open(store.folder)) == 2 * len(store.manifest.shards)
    before = len(store.manifest.shards)
    draw(flux, recorder, inputs)
    assert len(store.manifest.shards) == before


def test_hooks_are_gone_afterwards_and_the_output_is_the_same(store, flux, inputs):
    with torch.no_grad():
        expected = flux(**inputs(flux, seed=0))
        recorder = StateRecorder("blocks", store, StateChoice(steps=4), indices={0, 4})
        given = inputs(flux, seed=0)
        with recorder.run() as run, run.watching(flux, Call.at(given["x"], given["sigma"], SIGMAS, 0)):
            found = flux(**given)
    assert torch.equal(found, expected)
    for module in flux.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_originals_folders_load(tmp_path):
    torch.manual_seed(0)
    for name in ("a", "b"):
        file: dict[str, torch.Tensor] = {}
        for k in range(3):
            file |= {f"{k}-img": torch.randn(1, 6, 8), f"{k}-txt": torch.randn(1, 2, 8), f"{k}-vec": torch.randn(1, 8)}
            file[f"{k}-pe"] = torch.randn(1, 1, 8, 4, 2, 2)
        save_file({key: tensor.bfloat16() for key, tensor in file.items()}, tmp_path / f"{name}.safetensors")
    states = BlockStates.open(tmp_path)
    assert states.indices == [0, 1, 2]
    assert states.image.tolist() == [0, 1]
    state = states.batch(torch.tensor([1]), 2)
    assert torch.equal(state.vec, file["2-vec"].bfloat16().float())
    assert state.pe.shape == (1, 1, 8, 4, 2, 2)


def test_another_size_of_image_is_another_group(store, flux, inputs):
    recorder = StateRecorder("blocks", store, StateChoice(steps=4), indices={0, 1})
    draw(flux, recorder, inputs)
    given = inputs(flux, batch=1)
    given["x"] = given["x"][..., :4]
    call = Call.at(given["x"], given["sigma"], SIGMAS, 0)
    with recorder.run() as run, torch.no_grad(), run.watching(flux, call):
        flux(**given)
    states = BlockStates.open(store.folder)
    assert [group.tolist() for group in states.groups] == [list(range(8)), [8]]


def test_states_of_another_model_are_refused(store, flux, inputs, tensors):
    draw(flux, StateRecorder("blocks", store, indices={0, 1}), inputs)
    states = BlockStates.open(store.folder)
    other = Fingerprint.of_tensors(tensors("flux1", seed=5))
    with pytest.raises(UserError, match="another model"):
        states.require(other, 128, "that one")
    with pytest.raises(UserError, match="0 to 1, but 2 is needed"):
        states.batch(torch.tensor([0]), 2)


def test_an_empty_folder_and_a_damaged_manifest_are_named(tmp_path, store):
    with pytest.raises(UserError, match="no block states"):
        BlockStates.open(tmp_path)
    with pytest.raises(UserError, match="no trajectories"):
        Trajectories.open(store)
    manifest = json.loads((store.folder / MANIFEST).read_text())
    manifest["shards"] = [{"file": "x", "kind": "blocks", "bytes": 1, "captures": [{"nothing": 1}]}]
    (store.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        BlockStates.open(store.folder)


def test_images_are_told_apart_by_noise_and_text(store, flux, inputs):
    recorders = [StateRecorder(kind, store, StateChoice(4), indices={0}) for kind in ("trajectories", "blocks")]
    found = []
    for recorder, seed, text in ((0, 1, 1), (1, 1, 1), (0, 2, 2), (1, 1, 2), (0, 1, 1)):
        given = {**inputs(flux, seed=seed), "context": inputs(flux, seed=text)["context"]}
        call = Call.at(given["x"], given["sigma"], SIGMAS, 0, context=given["context"])
        with recorders[recorder].run() as run, run.watching(flux, call), torch.no_grad():
            flux(**given)
        assert run.drawing is not None
        found.append((run.drawing.first, "recorded before" in run.note))
    assert found == [(0, False), (0, False), (2, False), (4, False), (0, True)]


@pytest.mark.parametrize("kind", ["blocks", "trajectories"])
def test_a_call_that_skips_a_block_is_not_kept_and_said_to_be_left_out(kind, store, flux, inputs, skipping):
    given = inputs(flux)
    call = Call.at(given["x"], given["sigma"], SIGMAS, 0)
    for indices in ({0, 4}, {3}):
        before = len(store.manifest.shards)
        recorder = StateRecorder(kind, store, StateChoice(4), indices=indices)
        with recorder.run() as run, torch.no_grad():
            for index in (0, 1):
                with run.watching(flux, call), skipping(flux, index):
                    flux(**given)
            with run.watching(flux, call):
                flux(**given)
        assert run.note.startswith("2 model calls that skip blocks")
        assert len(store.manifest.shards) == before + 1


@pytest.mark.parametrize("kind", ["blocks", "trajectories"])
def test_a_call_whose_numbers_are_not_finite_is_not_kept(kind, store, flux, inputs):
    recorder = StateRecorder(kind, store, StateChoice(4), indices={0, 4})
    given = {**inputs(flux), "context": torch.full((2, 5, 32), float("nan"))}
    with recorder.run() as run, torch.no_grad(), run.watching(flux, Call.at(given["x"], given["sigma"], SIGMAS, 0)):
        flux(**given)
    assert "recorded numbers are not finite" in run.note
    assert not store.manifest.shards
    assert store.image_count() == 0


def test_two_recordings_of_equal_shape_have_two_digests(flux, inputs, tmp_path):
    digests = set()
    for name in "ab":
        store = store_of(flux, tmp_path / name)
        for kind in ("blocks", "trajectories"):
            draw(flux, StateRecorder(kind, store, EXACT, indices={0, 1}), inputs)
        digests |= {BlockStates.open(store.folder).digest, Trajectories.open(store).digest}
    assert len(digests) == 4


def test_states_have_another_digest_once_more_are_recorded(store, flux, inputs):
    for kind in ("blocks", "trajectories"):
        draw(flux, StateRecorder(kind, store, EXACT, indices={0, 1}), inputs)
    before = BlockStates.open(store.folder).digest, Trajectories.open(store).digest
    draw(flux, StateRecorder("trajectories", store, StateChoice(1)), inputs)
    assert BlockStates.open(store.folder).digest == before[0]
    assert Trajectories.open(store).digest != before[1]


@pytest.mark.parametrize("kind", ["blocks", "trajectories"])
def test_states_that_are_not_finite_are_refused_where_they_are_read(kind, store, flux, inputs):
    draw(flux, StateRecorder(kind, store, EXACT, indices={0, 1}), inputs)
    path = store.folder / store.manifest.shards[0].file
    tensors = load_file(path)
    tensors["1-img" if kind == "blocks" else "velocity"][1] = float("inf")
    save_file(tensors, path)
    read = {
        "blocks": lambda sample: BlockStates.open(store.folder).batch(torch.tensor([sample]), 1),
        "trajectories": lambda sample: Trajectories.open(store).batch(torch.tensor([sample])),
    }[kind]
    read(0)
    with pytest.raises(UserError, match=rf"{path.name} is damaged: \d+ numbers of"):
        read(1)
