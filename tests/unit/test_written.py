"""What a neuron writes (analysis/written.py): what turning it up does to the velocity where no later block has its say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_poke.analysis.atlas_sheet import CELL, named_neurons, neurons_sheet
from flux_poke.analysis.lens import Lens
from flux_poke.analysis.sheets import GAP, MARGIN
from flux_poke.analysis.written import Writer, written_pictures
from flux_poke.cli import app
from flux_poke.errors import UserError
from flux_poke.flux.autoencoder import to_picture
from flux_poke.flux.blocks import blocks_of
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import SiteWeights
from flux_poke.parsing import read_image
from flux_poke.poking.poke import BlockPoke, poked
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import SHIPPED, TinyFlux, autoencoder_of
from PIL import Image, ImageChops
from safetensors.torch import save_file
from torch.nn import functional as F
from typer.testing import CliRunner


@pytest.fixture(scope="module", params=["flux1", "flux2"])
def checkpoint(request) -> Checkpoint:
    return Checkpoint(SHIPPED[request.param] / "flux.safetensors")


def latents_of(checkpoint: Checkpoint, name: str, sign: float = 1.0, lens: Lens | None = None) -> torch.Tensor:
    writer, site = Writer.of(checkpoint, checkpoint.layout, lens), checkpoint.layout.site(name)
    assert writer is not None
    found = writer.latents(site, SiteWeights.read(checkpoint, site, up=False).down, torch.full((site.width,), sign))
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["double-img-0", "double-img-1", "single-0", "single-3"])
@torch.no_grad()
def test_it_is_what_turning_the_neuron_up_takes_from_the_velocity_without_later_blocks(checkpoint, name: str):
    tiny, layout = TinyFlux.load(checkpoint.path), checkpoint.layout
    site, patch = layout.site(name), layout.patch
    context, vector = tiny.words(["three"])
    x = 0.5 * tiny.noise(1, 3) + 0.5 * tiny.sample(["three"], tiny.noise(1, 4), tiny.sigmas(4))
    paths = [block.path for block in blocks_of(layout)]
    later = [BlockPoke((block,)) for block in blocks_of(layout)[paths.index(site.block) + 1 :]]

    def velocity(neuron: int | None) -> torch.Tensor:
        def turn_up(module, inputs):
            if neuron is not None:
                inputs[0][..., site.down_column + neuron] += 0.01

        with poked(tiny.flux, later), tiny.flux.get_submodule(site.down).register_forward_pre_hook(turn_up):
            return tiny.flux(x, torch.full((1,), 0.5), context, None if vector is None else torch.zeros_like(vector))

    plain = velocity(None)
    found = []
    expected = latents_of(checkpoint, name)
    for neuron in range(0, site.width, 40):
        change = F.unfold(plain - velocity(neuron), patch, stride=patch).mean(-1)[0]  # over the tokens of the image
        found.append(F.cosine_similarity(change, expected[neuron, :, :patch, :patch].flatten(), dim=0))
    alike = torch.stack(found)
    assert alike.median() > 0.97  # the layer norm also takes away what lies along the token itself
    assert alike.min() > 0.8


def test_all_are_of_one_size_and_of_the_sign_of_their_strongest_place(checkpoint):
    latents = latents_of(checkpoint, "single-1")
    torch.testing.assert_close(latents.square().mean((1, 2, 3)), torch.ones(len(latents)))
    assert latents_of(checkpoint, "single-1", -1.0).equal(-latents)
    half = latents.shape[-1] // 2
    assert latents[..., :half, :half].equal(latents[..., half:, half:])  # every token is written to


def test_the_texts_own_neurons_write_nothing_that_is_decoded(checkpoint):
    site = checkpoint.layout.site("double-txt-1")
    down = SiteWeights.read(checkpoint, site, up=False).down
    assert Writer(checkpoint, checkpoint.layout).latents(site, down, torch.ones(site.width)) is None


def test_a_lens_says_what_later_blocks_do_with_it(checkpoint):
    layout = checkpoint.layout
    blocks = blocks_of(layout)[:-1]
    turned = {block: -torch.eye(layout.hidden) for block in blocks}
    lens = Lens(layout.family, turned, {block: torch.ones(layout.hidden) for block in blocks}, {}, {}, 2, 2)
    torch.testing.assert_close(latents_of(checkpoint, "double-img-1", lens=lens), -latents_of(checkpoint, "double-img-1"))
    assert latents_of(checkpoint, "single-3", lens=lens).equal(latents_of(checkpoint, "single-3"))  # the last block has no map
    few = Lens(layout.family, dict([*turned.items()][1:]), lens.biases, {}, {}, 2, 2)
    with pytest.raises(UserError, match="Fit a lens for it"):
        latents_of(checkpoint, "double-img-1", lens=few)


def test_nothing_is_said_of_models_that_no_autoencoder_is_at_hand_for(tmp_path, checkpoint):
    assert autoencoder_of(checkpoint) is not None
    layout = Layout.of("flux1", 128, 1, 1, context=96, vector=96)  # of another text encoder
    save_file(Flux(layout).state_dict(), tmp_path / "flux.safetensors")
    assert autoencoder_of(Checkpoint(tmp_path / "flux.safetensors")) is None
    shown = ["atlas", "show", f"{tmp_path}", "--checkpoint", f"{tmp_path / 'flux.safetensors'}", "--lens", "lens.safetensors"]
    assert "a FLUX of the tiny kind" in str(CliRunner().invoke(app, shown).exception)


def test_nothing_is_said_of_chroma():
    assert Writer.of({}, Layout.of("chroma", 3072, 1, 1)) is None


def test_a_sheet_begins_with_what_each_writes(tmp_path, checkpoint):
    recording = Recording.at(tmp_path / "digits")
    record(checkpoint.path, ["a 3", "seven"], recording, Wanted(atlas=True), steps=2)
    atlas, tiny = recording.atlas(), TinyFlux.load(checkpoint.path)
    names = "double-txt-0:4, double-img-1:7, single-2:9"
    chosen = named_neurons(names, atlas)
    pictures = written_pictures(Writer(checkpoint, checkpoint.layout), tiny.autoencoder.decode, atlas, chosen)
    assert pictures[0] is None
    for (name, neuron), picture in zip(chosen[1:], pictures[1:], strict=True):
        sign = atlas.sites[name].value[neuron, 0].sign().item()
        (expected,) = tiny.autoencoder.decode(latents_of(checkpoint, name, sign)[neuron][None])
        assert picture is not None
        assert np.abs(np.asarray(picture, int) - np.asarray(to_picture(expected), int)).max() <= 2
    told = CliRunner().invoke(
        app, ["atlas", "sheet", f"{recording.folder}", "--checkpoint", f"{checkpoint.path}", "--neurons", names, "-o",
              f"{tmp_path / 'sheet.png'}", "--places", "1"], catch_exceptions=False,
    )  # fmt: skip
    assert "3 neurons" in told.output
    sheet, plain = read_image(tmp_path / "sheet.png"), neurons_sheet(recording, atlas, chosen, 1)
    assert sheet.size == (plain.width + CELL + 4 * GAP, plain.height)
    left = sheet.width - MARGIN - 2 * CELL - 5 * GAP
    for row, picture in enumerate(pictures):
        top = MARGIN + row * (CELL + GAP)
        cell = sheet.crop((left, top, left + CELL, top + CELL - 16))
        if picture is None:
            assert np.ptp(np.asarray(cell), axis=(0, 1)).max() == 0
        else:
            whole = picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
            assert ImageChops.difference(cell, whole.crop((0, 0, CELL, CELL - 16))).getbbox() is None
