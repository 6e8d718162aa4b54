"""The tuned lens: its rows, its fit (against scikit-learn), its file."""

from __future__ import annotations

import random

import pytest
import torch
from flux_poke.analysis.lens import Lens, fit_lens
from flux_poke.analysis.taps import BlockTaps, Tap, TapRecorder
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block, blocks_of, choose_blocks
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.recording.call import Call
from flux_poke.recording.lens_rows import LensRecorder, LensRows
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.store import HiddenStates, Limit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from torch import Tensor

LAYOUT = Layout.of("flux1", 128, 2, 2, context=32, vector=32, ratio=2)
FIRST, LAST = Block("double", 0), Block("single", 1)


@pytest.fixture
def flux() -> Flux:
    torch.manual_seed(0)
    return Flux(LAYOUT).eval().requires_grad_(False)


def call(flux: Flux, batch: int = 2):
    x, sigma = torch.randn(batch, 16, 8, 8), torch.full((batch,), 0.5)
    return x, sigma, torch.randn(batch, 5, 32), torch.randn(batch, 32)


@torch.no_grad()
def record(recorder, flux, x, sigma, context, vector):
    with recorder.run() as run, run.watching(flux, Call.at(x, sigma, (0.5, 0.0), context=context)):
        flux(x, sigma, context, vector)
    return run


@pytest.fixture
def store(tmp_path, flux) -> HiddenStates:
    return HiddenStates.for_model(tmp_path / "hidden", "flux1", Fingerprint.of_tensors(flux.state_dict()))


def rows_of(store: HiddenStates, states: dict[str, Tensor], images: Tensor) -> LensRows:
    store.append("lens", {**states, "image": images, "sigma": torch.zeros(len(images))})
    return LensRows(store.folder)


def related(images: int = 20, tokens: int = 10, hidden: int = 8, noise: float = 0.0) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens after two blocks, the second an affine map of the first plus noise."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(images * tokens, hidden, generator=generator)
    y = h @ torch.randn(hidden, hidden, generator=generator).T + torch.randn(hidden, generator=generator)
    y = y + noise * torch.randn(y.shape, generator=generator)
    return {"double-0": h, "single-1": y}, torch.arange(images).repeat_interleave(tokens)


def test_rows_are_the_same_tokens_after_every_block(flux, store):
    x, sigma, context, vector = call(flux)
    states: dict[str, Tensor] = {}
    for index, block in enumerate(flux.double_blocks):
        block.register_forward_hook(lambda _, __, out, index=index: states.update({f"double-{index}": out[0]}))
    for index, block in enumerate(flux.single_blocks):
        block.register_forward_hook(lambda _, __, out, index=index: states.update({f"single-{index}": out[:, 5:]}))
    assert not record(LensRecorder(LAYOUT, store, RowChoice(rows=3)), flux, x, sigma, context, vector).note
    rows = LensRows(store.folder)
    assert rows.images.tolist() == [0, 0, 0, 1, 1, 1]
    places = [
        [
            int((states[block.name][image] == row).all(-1).nonzero())
            for image, row in zip([0] * 3 + [1] * 3, rows[block], strict=True)
        ]
        for block in rows
    ]
    assert len(places) == 4
    assert all(found == places[0] for found in places)
    assert len(set(places[0][:3])) == 3


def test_runs_add_shards_until_there_is_no_room(flux, store):
    recorder = LensRecorder(LAYOUT, store, RowChoice(rows=4))
    for _ in range(2):
        assert not record(recorder, flux, *call(flux, batch=1)).note
    recorder.limit = Limit(1e-9)
    assert "as large as it may become" in record(recorder, flux, *call(flux, batch=1)).note
    rows = LensRows(store.folder)
    assert sorted(rows.images.tolist()) == [0] * 4 + [1] * 4
    assert {rows[block].shape for block in rows} == {(8, 128)}


def test_rows_of_the_same_images_again_are_said_to_be(flux, store):
    given = call(flux)
    notes = [record(LensRecorder(LAYOUT, store, RowChoice(rows=4)), flux, *given).note for _ in range(2)]
    assert notes[0] == ""
    assert "recorded before" in notes[1]
    assert LensRows(store.folder).images.unique().tolist() == [0, 1]


def test_an_affine_relation_is_found_and_holds_on_new_images(store):
    states, images = related()
    lens = fit_lens(rows_of(store, states, images))
    assert lens.errors[FIRST] < 1e-4
    assert lens.raw_errors[FIRST] > 0.5
    torch.testing.assert_close(lens(FIRST, states["double-0"]), states["single-1"], rtol=0.02, atol=0.05)


def test_the_fit_is_ridge_regression_of_the_distance_to_the_last_block(store):
    states, images = related(noise=0.3)
    lens = fit_lens(rows_of(store, states, images))
    x, y = states["double-0"].double().numpy(), states["single-1"].double().numpy()
    new = torch.isin(images, torch.tensor(random.Random(20).sample(range(20), 4))).numpy()
    found = []
    for alpha in (1e-4, 1e-3, 1e-2, 1e-1):
        centred = x[~new] - x[~new].mean(0)
        model = Ridge(alpha=alpha * (centred**2).sum(0).mean()).fit(x[~new], (y - x)[~new])
        residual = (y - x)[new] - model.predict(x[new])
        found.append((residual**2).sum() / ((y[new] - y[~new].mean(0)) ** 2).sum())
    assert lens.errors[FIRST] == pytest.approx(min(found), rel=0.01)


def test_noise_is_not_predicted(store):
    generator = torch.Generator().manual_seed(2)
    states = {name: torch.randn(200, 8, generator=generator) for name in ("double-0", "single-1")}
    lens = fit_lens(rows_of(store, states, torch.arange(20).repeat_interleave(10)))
    assert 0.9 < lens.errors[FIRST] < 1.3


def test_a_lens_that_predicts_the_last_block_makes_every_prediction_the_last_ones(flux):
    """Maps that ignore their input and give one token: predictions are the final layer's of that token."""
    token = torch.randn(128)
    blocks = blocks_of(LAYOUT)[:-1]
    lens = Lens(
        "flux1", {b: torch.zeros(128, 128) for b in blocks}, dict.fromkeys(blocks, token), dict.fromkeys(blocks, 0.0), {}, 0, 0
    )
    lens.check_fits(LAYOUT)
    taps, sigmas = BlockTaps(), torch.tensor([0.5, 0.0])
    x, sigma, context, vector = call(flux)
    vecs = []
    flux.final_layer.register_forward_pre_hook(lambda _, args: vecs.append(args[1]))
    recorder = TapRecorder(LAYOUT, choose_blocks("all", LAYOUT), lens=lens)
    with recorder.watching(flux, Call.at(x, sigma, sigmas), taps):
        velocity = flux(x, sigma, context, vector)
    patches = flux.final_layer(token.expand(2, 16, 128), vecs[0])
    expected = x - 0.5 * torch.nn.functional.fold(patches.mT, (8, 8), 2, stride=2)
    for block in blocks:
        torch.testing.assert_close(taps.latent(Tap(0, block)), expected)
    assert torch.equal(taps.latent(Tap(0, LAST)), x - 0.5 * velocity)


def test_a_file_gives_back_the_lens(store, tmp_path):
    states, images = related(noise=0.3)
    lens = fit_lens(rows_of(store, states, images))
    lens.save(tmp_path / "lens.safetensors")
    again = Lens.load(tmp_path / "lens.safetensors")
    assert (again.errors, again.raw_errors, again.rows, again.images) == (lens.errors, lens.raw_errors, 200, 20)
    assert torch.equal(again(FIRST, states["double-0"]), lens(FIRST, states["double-0"]))


@pytest.mark.parametrize(("key", "wrong"), [("double-0.weight", float("nan")), ("double-0.bias", float("inf"))])
def test_a_lens_with_numbers_that_are_not_finite_is_refused(store, tmp_path, key, wrong):
    path = tmp_path / "lens.safetensors"
    fit_lens(rows_of(store, *related())).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), load_file(path)
    tensors[key].flatten()[0] = wrong
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"damaged lens.*double block 0"):
        Lens.load(path)


def test_lens_rows_that_are_not_finite_are_left_out_and_refused_where_they_are_read(flux, store):
    x, sigma, context, vector = call(flux)
    note = record(LensRecorder(LAYOUT, store, RowChoice(rows=4)), flux, x, sigma, context, vector / 0).note
    assert "not finite" in note
    assert not store.manifest.shards
    states, images = related()
    states["double-0"][3] = float("inf")
    with pytest.raises(UserError, match=r"lens-00000\.safetensors is damaged: 8 numbers of double-0 are not finite"):
        fit_lens(rows_of(store, states, images))


def test_other_files_and_folders_are_refused(store):
    with pytest.raises(UserError, match="holds no lens rows"):
        LensRows(store.folder)
    with pytest.raises(UserError, match="holds no hidden states"):
        LensRows(store.folder.parent)
    rows_of(store, *related())
    with pytest.raises(UserError, match="is not a lens"):
        Lens.load(store.folder / "lens-00000.safetensors")


def test_a_lens_of_another_model_and_rows_of_one_image_are_refused(store):
    states, images = related()
    with pytest.raises(UserError, match="at least 2 are needed"):
        fit_lens(rows_of(store, states, torch.zeros_like(images)))
    with pytest.raises(UserError, match="of 2 blocks of width 8"):
        fit_lens(rows_of(store, states, images)).check_fits(LAYOUT)
