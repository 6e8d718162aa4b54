"""Sampled rows (store.py, rows.py): they are what the MLPs read, shared out evenly, and safe on disk."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.layout import select_sites
from flux_poke.flux.model import Flux
from flux_poke.recording.call import Call, TokenMask
from flux_poke.recording.rows import RowChoice, RowRecorder, estimated_bytes
from flux_poke.recording.split import held_out
from flux_poke.recording.store import MANIFEST, HiddenStates, Limit
from safetensors import safe_open
from safetensors.torch import save_file

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


@pytest.fixture
def flux(tensors) -> Flux:
    return Flux.load(tensors("flux1"))


@pytest.fixture
def store(tmp_path, flux) -> HiddenStates:
    return HiddenStates.for_model(tmp_path / "hidden", "flux1", Fingerprint.of_tensors(flux.state_dict()))


def call_of(given, step, **known) -> Call:
    return Call.at(given["x"], given["sigma"], SIGMAS, step, **known)


def draw(flux, recorder, inputs, mask=None, batch=2, seed=1):
    """One sampling run whose calls all see the same input; returns the run and the last output."""
    given = inputs(flux, batch=batch, seed=seed)
    with recorder.run() as run:
        for step in range(len(SIGMAS) - 1):
            with run.watching(flux, call_of(given, step, mask=mask)), torch.no_grad():
                output = flux(**given)
    return run, output


def everything(store, site):
    return next(iter(store.rows(site, size=10**9)))


def captured(flux, inputs, module, batch=2, seed=1):
    """The whole input of a module [batch, tokens, ...] in one call."""
    seen = []
    handle = flux.get_submodule(module).register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    with torch.no_grad():
        flux(**inputs(flux, batch=batch, seed=seed))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_rows_are_what_the_mlp_reads(family, tensors, inputs, tmp_path):
    flux = Flux.load(tensors(family))
    store = HiddenStates.for_model(tmp_path, family, Fingerprint.of_tensors(flux.state_dict()))
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=2)), inputs)
    for site in flux.layout.sites:
        rows = everything(store, site.name)
        assert len(rows) == 2 * 2 * 4
        whole = captured(flux, inputs, site.up).bfloat16()
        attention = captured(flux, inputs, site.down)[..., : site.down_column].bfloat16()
        for n in range(len(rows)):
            tokens = (whole[rows.image[n]] == rows.x[n]).all(-1).nonzero()
            assert len(tokens) == 1
            if site.stream == "single":
                assert torch.equal(rows.attn[n], attention[rows.image[n], tokens[0, 0]])
        assert (rows.attn is None) == (site.stream != "single")
        torch.testing.assert_close(rows.sigma, torch.tensor(SIGMAS)[rows.step])


def test_masked_tokens_are_never_drawn(flux, store, inputs):
    txt = torch.zeros(2, 5, dtype=torch.bool)
    txt[:, 1:3] = True
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=40, steps=5)), inputs, TokenMask(txt=txt))
    rows = everything(store, "double-txt-0")
    assert len(rows) == 2 * 5 * 2
    whole = captured(flux, inputs, "double_blocks.0.txt_mlp.0").bfloat16()
    for n in range(len(rows)):
        assert any(torch.equal(whole[rows.image[n], word], rows.x[n]) for word in (1, 2))
    assert len(everything(store, "single-0")) == 2 * 5 * (2 + 24)
    assert len(everything(store, "double-img-0")) == 2 * 5 * 24


def test_the_model_computes_what_it_did_and_keeps_no_hook(flux, store, inputs):
    with torch.no_grad():
        expected = flux(**inputs(flux))
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=5))
    assert torch.equal(draw(flux, recorder, inputs)[1], expected)
    with pytest.raises(KeyboardInterrupt), recorder.run() as run, run.watching(flux, call_of(inputs(flux), 0)):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in flux.modules())


def test_an_interrupted_run_leaves_nothing(flux, store, inputs):
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=5))

    def interrupted():
        with recorder.run() as run:
            with run.watching(flux, call_of(inputs(flux), 0)), torch.no_grad():
                flux(**inputs(flux))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in store.folder.iterdir() if path.suffix == ".safetensors"] == []


def test_every_image_gives_the_same_share(flux, store, inputs):
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=3, steps=2))
    for seed in range(3):
        draw(flux, recorder, inputs, seed=seed)
    image = everything(store, "single-1").image
    assert Counter(image.tolist()) == dict.fromkeys(range(6), 6)


def test_the_same_seed_draws_the_same_and_another_seed_other_steps():
    sigmas = [1 - n / 40 for n in range(41)]
    steps = [RowChoice(seed=0).drawn_steps(sigmas, str(image)) for image in range(50)]
    assert steps == [RowChoice(seed=0).drawn_steps(sigmas, str(image)) for image in range(50)]
    assert all(len(drawn) == 2 for drawn in steps)  # 5 % of 40
    assert len(set().union(*steps)) > 25
    assert steps != [RowChoice(seed=1).drawn_steps(sigmas, str(image)) for image in range(50)]


def test_short_runs_give_one_step_and_a_sigma_range_is_kept():
    assert len(RowChoice().drawn_steps(SIGMAS, "0")) == 1
    drawn = [RowChoice(steps=5, sigmas=(0.3, 0.7)).drawn_steps(SIGMAS, str(image)) for image in range(5)]
    assert drawn == [frozenset({2, 3})] * 5


def test_another_batch_row_order_is_told_by_images(flux, store, inputs):
    """Under guidance each image stands in the batch twice."""
    given = inputs(flux, batch=4)
    with RowRecorder(flux.layout.sites, store, RowChoice(rows=2, steps=5)).run() as run, torch.no_grad():
        for step in range(5):
            with run.watching(flux, call_of(given, step, images=[0, 1, 0, 1])):
                flux(**given)
    assert Counter(everything(store, "double-img-0").image.tolist()) == {0: 20, 1: 20}


def test_the_estimate_is_what_is_written(flux, store, inputs):
    choice = RowChoice(rows=5, steps=3)
    sites = select_sites(flux.layout, streams=("img", "single"))
    for seed in range(2):
        draw(flux, RowRecorder(sites, store, choice), inputs, seed=seed)
    expected = estimated_bytes(replace(flux.layout, sites=sites), choice, steps=5, images=4)
    assert store.bytes("rows") == expected
    assert sum(path.stat().st_size for path in store.folder.glob("rows-*")) == pytest.approx(expected, rel=0.2)


def test_a_second_recording_adds(flux, store, inputs):
    for seed in range(2):
        again = HiddenStates.for_model(store.folder, "flux1", Fingerprint.of_tensors(flux.state_dict()))
        draw(flux, RowRecorder(flux.layout.sites, again, RowChoice(rows=4, steps=1)), inputs, seed=seed)
    assert again.images("double-img-0").tolist() == [0, 1, 2, 3]
    assert HiddenStates.open(store.folder).count("double-img-0") == 16


def test_another_models_folder_is_refused(store, tensors):
    other = Fingerprint.of_tensors(Flux.load(tensors("flux1", seed=5)).state_dict())
    with pytest.raises(UserError, match="recorded on another model"):
        HiddenStates.for_model(store.folder, "flux1", other)


def test_at_the_limit_all_images_lose_the_same(flux, store, inputs):
    choice, sites = RowChoice(rows=24, steps=5), select_sites(flux.layout, streams=("img",))
    each = estimated_bytes(replace(flux.layout, sites=sites), choice, steps=5, images=2)
    recorder = RowRecorder(sites, store, choice, Limit(5.5 * each / 1e9, "thin"))
    for seed in range(8):
        draw(flux, recorder, inputs, seed=seed)
    assert store.bytes("rows") <= 5.5 * each
    assert store.manifest.halvings == 1
    shares = Counter(everything(store, "double-img-1").image.tolist())
    assert shares == dict.fromkeys(range(16), 24 * 5 // 2)


def test_no_mlp_is_thinned_below_the_rows_that_a_regression_on_it_needs(flux, store, inputs):
    choice, sites = RowChoice(rows=24, steps=5), select_sites(flux.layout, streams=("img",))
    each = estimated_bytes(replace(flux.layout, sites=sites), choice, steps=5, images=2)
    recorder = RowRecorder(sites, store, choice, Limit(3.5 * each / 1e9, "thin"))  # 840 rows; halved, fewer than 512
    for seed in range(5):
        draw(flux, recorder, inputs, seed=seed)
    assert recorder.full
    assert (store.manifest.halvings, store.count("double-img-0")) == (0, 3 * 240)
    assert store.count("double-img-0") > 512 == sites[0].regressors


def test_a_halving_that_was_cut_off_is_finished_by_the_next(flux, store, inputs):
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=16, steps=1))
    for seed in range(2):
        draw(flux, recorder, inputs, seed=seed)
    before = (store.folder / MANIFEST).read_text()
    store._halve()
    first = store.manifest.shards[0]
    (store.folder / MANIFEST).write_text(before)  # as if the program had ended before the manifest was written
    reopened = HiddenStates.open(store.folder)
    reopened._halve()
    assert Counter(everything(reopened, "single-0").image.tolist()) == dict.fromkeys(range(4), 8)
    assert replace(reopened.manifest.shards[0], id=first.id) == first


def test_at_the_limit_recording_can_stop(flux, store, inputs):
    choice = RowChoice(rows=8, steps=1)
    each = estimated_bytes(flux.layout, choice, steps=5, images=2)
    recorder = RowRecorder(flux.layout.sites, store, choice, Limit(1.5 * each / 1e9, "stop"))
    for seed in range(3):
        run, _ = draw(flux, recorder, inputs, seed=seed)
    assert recorder.full
    assert run.steps == frozenset()
    assert store.images("single-0").tolist() == [0, 1]


def test_rows_of_some_images_are_read_in_pieces(flux, store, inputs):
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=10, steps=2))
    for seed in range(3):
        draw(flux, recorder, inputs, seed=seed)
    pieces = list(store.rows("single-0", images={1, 4}, size=16))
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    whole = everything(store, "single-0")
    wanted = torch.isin(whole.image, torch.tensor([1, 4]))
    assert torch.equal(torch.cat([piece.x for piece in pieces]), whole.x[wanted])
    assert torch.equal(torch.cat([piece.attn for piece in pieces]), whole.attn[wanted])


def test_held_out_images_are_others():
    fit, judge = held_out(torch.arange(3, 23))
    assert (len(fit), len(judge)) == (16, 4)
    assert fit | judge == set(range(3, 23))
    assert len({number % 5 for number in judge}) > 1  # prompts may come in turns
    assert (fit, judge) == held_out(torch.arange(3, 23))
    fit, judge = held_out(torch.tensor([4, 7]))
    assert sorted(fit | judge) == [4, 7]
    assert len(judge) == 1
    with pytest.raises(UserError, match="at least 2 are needed"):
        held_out(torch.tensor([4]))


def test_blocks_are_chosen_by_kind_and_stream(flux):
    chosen = select_sites(flux.layout, double=(1, 1), single=(0, 0))
    assert [site.name for site in chosen] == ["double-img-1", "double-txt-1", "single-0"]
    with pytest.raises(UserError, match="double blocks are 0 to 1"):
        select_sites(flux.layout, double=(0, 2))


def test_a_folder_without_rows_says_how_to_record(tmp_path):
    with pytest.raises(UserError, match="Record it first"):
        HiddenStates.open(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", json.dumps({"format": "flux-poke hidden states 2"}), json.dumps({"format": "x"})]
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="manifest"):
        HiddenStates.open(tmp_path)


def test_amplifications_add_up_by_noise_level(store):
    store.add_amplification({"single-0": {1.0: (3.0, 2), 0.5: (4.0, 1)}})
    store.add_amplification({"single-0": {1.0: (1.0, 2)}})
    found = HiddenStates.open(store.folder)
    assert found.manifest.amplification == {"single-0": {1.0: (4.0, 4), 0.5: (4.0, 1)}}
    assert found.amplification == {"single-0": pytest.approx((0.5 * 4 + 1) / 1.5)}  # the lowest level counts half


def test_amplifications_measured_at_other_noise_levels_compare(store):
    """Both are 1 + 4 sigma: 1, 2 and 5 at all levels; each alone has another mean."""
    store.add_amplification(
        {"single-0": {0.0: (1.0, 1), 1.0: (10.0, 2)}, "single-1": {0.0: (1.0, 1), 0.25: (2.0, 1), 1.0: (5.0, 1)}}
    )
    assert store.amplification == pytest.approx({"single-0": 7.5 / 2.5, "single-1": 7.5 / 2.5})


def test_rows_count_by_the_amplification_at_their_noise_level(store):
    sigma = torch.tensor([1.0, 0.75, 0.5, 0.1])
    assert store.importance("single-0", sigma).tolist() == [1, 1, 1, 1]
    store.add_amplification({"single-0": {1.0: (1.0, 1), 0.5: (9.0, 3), 0.1: (9.0, 1)}})
    mean = (1 + 3 + 0.5 * 9) / 2.5
    torch.testing.assert_close(store.importance("single-0", sigma), torch.tensor([1.0, 2.0, 3.0, 3.0]) / mean)
    assert store.importance("single-1", sigma).tolist() == [1, 1, 1, 1]


def test_rows_count_alike_where_errors_move_nothing(store):
    store.add_amplification({"single-0": {1.0: (0.0, 1), 0.5: (0.0, 1)}})
    assert store.importance("single-0", torch.tensor([1.0, 0.2])).tolist() == [1, 1]


def test_each_kind_has_a_digest_of_its_own(store, flux, inputs):
    before = {kind: store.digest(kind) for kind in ("rows", "lens", "blocks", "trajectories", "amplification")}
    store.add_amplification({"single-0": {1.0: (1.0, 1)}})
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4)), inputs)
    after = HiddenStates.open(store.folder)
    assert {kind for kind, digest in before.items() if after.digest(kind) != digest} == {"rows", "amplification"}
    assert after.digest("rows", "lens") == store.digest("rows", "lens")


def test_rows_that_were_thinned_have_another_digest(store, flux, inputs):
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=16)), inputs)
    before = store.digest("rows")
    store._halve()
    assert store.digest("rows") != before
    assert HiddenStates.open(store.folder).digest("rows") == store.digest("rows")


def test_two_recordings_of_equal_shape_have_two_digests(flux, inputs, tmp_path):
    digests = set()
    for name in "ab":
        store = HiddenStates.for_model(tmp_path / name, "flux1", Fingerprint.of_tensors(flux.state_dict()))
        draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4)), inputs)
        digests.add(store.digest("rows"))
    assert len(digests) == 2


def test_an_image_keeps_its_number_when_it_is_recorded_again_and_gives_other_rows(store, flux, inputs):
    def record(seed):
        run, _ = draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=2)), inputs, seed=seed)
        assert ("recorded before" in run.note) == (seed in seen)
        seen.add(seed)
        return sorted(run.steps)

    seen: set[int] = set()
    first = [record(1), record(2)]
    assert store.images("single-0").tolist() == [0, 1, 2, 3]
    again = [record(1) for _ in range(4)]
    assert store.images("single-0").tolist() == [0, 1, 2, 3]
    assert store.image_count() == HiddenStates.open(store.folder).image_count("rows") == 4
    assert any(steps != first[0] for steps in again)


def test_images_of_a_run_that_was_given_up_do_not_count(store, flux, inputs):
    def given_up():
        with RowRecorder(flux.layout.sites, store, RowChoice(steps=5)).run() as run:
            with run.watching(flux, call_of(inputs(flux), 0)), torch.no_grad():
                flux(**inputs(flux))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given_up()
    assert store.image_count() == 0
    assert len(store.manifest.drawings) == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_run_whose_rows_are_not_finite_is_left_out_with_the_count(store, flux, inputs, wrong):
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=1))
    given = {**inputs(flux), "context": torch.full((2, 5, 32), wrong)}
    with recorder.run() as run, torch.no_grad():
        for step in range(5):
            with run.watching(flux, call_of(given, step)):
                flux(**given)
    assert re.search(r"[\d,]+ recorded numbers are not finite", run.note)
    assert not store.manifest.shards
    assert store.image_count() == 0
    assert draw(flux, recorder, inputs)[0].note == ""
    assert store.count("double-img-0") == 8


def test_rows_that_are_not_finite_are_refused_where_they_are_read(store, flux, inputs):
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4)), inputs)
    path = store.folder / store.manifest.shards[0].file
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors["single-0.x"][2, 5] = float("nan")
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"rows-00000\.safetensors is damaged: 1 numbers of single-0\.x are not finite"):
        everything(store, "single-0")
    assert len(everything(store, "single-1")) == 8


@pytest.mark.parametrize("damage", ["sigma is missing", "a part is shorter"])
def test_a_shard_that_lacks_something_is_named(store, flux, inputs, damage):
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4)), inputs)
    path = store.folder / store.manifest.shards[0].file
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    sigma = tensors.pop("single-0.sigma")
    if damage == "a part is shorter":
        tensors["single-0.sigma"] = sigma[1:].clone()
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"rows-00000\.safetensors is damaged at single-0"):
        everything(store, "single-0")


@pytest.mark.parametrize(
    "wrong", [{"file": "../x.safetensors"}, {"kind": "cows"}, {"file": "lens-00000.safetensors"}, {"id": None}]
)
def test_a_manifest_names_files_of_its_own_folder_alone(store, flux, inputs, wrong):
    draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(rows=4)), inputs)
    manifest = json.loads((store.folder / MANIFEST).read_text())
    manifest["shards"][0] |= wrong
    (store.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        HiddenStates.open(store.folder)


@pytest.mark.parametrize("wrong", [{0.5: [float("nan"), 1]}, {0.5: [-1.0, 1]}, {0.5: [1.0, 0]}, {-0.5: [1.0, 1]}, {0.5: 1.0}])
def test_amplifications_that_cannot_have_been_measured_are_damage(store, wrong):
    manifest = json.loads((store.folder / MANIFEST).read_text())
    manifest["amplification"] = {"single-0": wrong}
    (store.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        HiddenStates.open(store.folder)


@pytest.mark.parametrize("index", [0, 1])
def test_a_call_that_skips_a_block_is_left_out_and_said_to_be(store, flux, inputs, skipping, index):
    recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=5))
    given = inputs(flux)
    with recorder.run() as run, torch.no_grad():
        for step in range(5):
            with run.watching(flux, call_of(given, step)):
                flux(**given)
            with run.watching(flux, call_of(given, step)), skipping(flux, index):
                flux(**given)
    assert run.note.startswith("5 model calls that skip blocks")
    assert store.count("double-img-0") == store.count("single-0") == 2 * 4 * 5


def test_no_step_within_the_range_of_noise_levels_is_said(store, flux, inputs):
    run, _ = draw(flux, RowRecorder(flux.layout.sites, store, RowChoice(sigmas=(0.85, 0.95))), inputs)
    assert run.note == "No step of this run has a noise level from 0.85 to 0.95: nothing was recorded of it."


@pytest.mark.parametrize("sigmas", [(0.0, 1.0), (0.0, 0.9), (0.3, 0.7)])
@pytest.mark.parametrize("steps", [None, 1, 4, 9])
def test_at_most_is_never_less_than_what_is_written(store, flux, inputs, sigmas, steps):
    choice = RowChoice(rows=5, steps=steps, sigmas=sigmas)
    draw(flux, RowRecorder(flux.layout.sites, store, choice), inputs)
    assert store.bytes("rows") <= estimated_bytes(flux.layout, choice, steps=5, images=2)


@pytest.mark.parametrize("gigabytes", [0, -1, float("nan"), float("inf"), 10**20])
def test_a_limit_that_is_not_a_size_is_refused(gigabytes):
    with pytest.raises(UserError, match="number of gigabytes above 0"):
        Limit(gigabytes)


def test_a_run_that_keeps_its_rows_in_memory_leaves_all_of_them_or_none(flux, store, inputs):
    given = inputs(flux, batch=2, seed=1)
    for written, shard_bytes in ((5, 1), (0, math.inf)):
        recorder = RowRecorder(flux.layout.sites, store, RowChoice(rows=4, steps=5), shard_bytes=shard_bytes)
        run, before = recorder.begin(), len(store.manifest.shards)
        for step in range(len(SIGMAS) - 1):
            with run.watching(flux, call_of(given, step, known_drawn=f"{shard_bytes}")), torch.no_grad():
                flux(**given)
        assert len(store.manifest.shards) - before == written
    run.finish()
    assert len(store.manifest.shards) - before == 1
    assert [drawing.name for drawing in store.manifest.drawings] == ["1", "inf"]
