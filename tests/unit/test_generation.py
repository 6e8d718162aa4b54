"""Decoding block predictions to files and pictures."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from flux_poke.analysis.contributions import block_contributions, contributions_figure
from flux_poke.analysis.decoding import decode_taps
from flux_poke.analysis.generation import Generation, find_previews, generation_files, save_jpeg, write_generations
from flux_poke.analysis.sheets import contact_sheet, difference_sheet
from flux_poke.analysis.taps import BlockTaps, Tap, TapRecorder
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block, blocks_of, choose_blocks
from flux_poke.flux.integrators import euler
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.recording.call import Call
from PIL import Image
from PIL.ExifTags import IFD, Base
from safetensors.torch import load_file
from torch import Tensor

LAYOUT = Layout.of("flux1", 128, 2, 2, context=32, vector=32, ratio=2)
BLOCKS = blocks_of(LAYOUT)


def decode(latents: Tensor) -> Tensor:
    """Three latent channels as colours, eight times as large."""
    return torch.nn.functional.interpolate(latents[:, :3].sigmoid(), scale_factor=8.0)


@pytest.fixture(scope="module")
def run() -> tuple[BlockTaps, Tensor]:
    """Two images of two steps with every block tapped, and their final latents."""
    torch.manual_seed(0)
    flux = Flux(LAYOUT).eval().requires_grad_(False)
    context, vector, sigmas = torch.randn(2, 5, 32), torch.randn(2, 32), FluxTimer(2).sigmas()
    taps, recorder = BlockTaps(), TapRecorder(LAYOUT, choose_blocks("all", LAYOUT))

    def velocity(x, sigma):
        with recorder.watching(flux, Call.at(x, sigma, sigmas), taps):
            return flux(x, sigma, context, vector)

    return taps, euler(velocity, torch.randn(2, 16, 6, 4), sigmas)


def generation(prompt: str = "a füchs, 7 o'clock") -> Generation:
    return Generation("flux1-tiny", prompt, width=32, height=48, seed=7, guidance=2.5, timesteps=[1.0, 0.5, 0.0])


def written(tmp_path, run, decode=decode, **options):
    taps, latents = run
    finals = [Image.new("RGB", (32, 48), (0, 100 * number, 255)) for number in range(len(latents))]
    generations = [generation(), generation()]
    return write_generations(tmp_path, generations, taps, decode, finals, **options), generations, finals


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_every_prediction_is_decoded_in_order_whatever_the_batch(run, batch):
    taps, _ = run
    frames = list(decode_taps(taps, decode, batch))
    assert [(frame.tap, frame.number) for frame in frames] == [(tap, number) for tap in taps for number in (0, 1)]
    for frame in frames[::5]:
        alone = decode(taps.latent(frame.tap)[frame.number][None])[0]
        np.testing.assert_array_equal(np.asarray(frame.image), (alone * 255).round().byte().permute(1, 2, 0).numpy())


def test_latents_go_to_the_autoencoders_space_before_they_are_decoded(run):
    taps, _ = run
    moved = BlockTaps(to_autoencoder=lambda latents: latents / 2 + 1)
    moved._steps = taps._steps
    seen: list[Tensor] = []

    def keep(latents: Tensor) -> Tensor:
        seen.append(latents)
        return decode(latents)

    list(decode_taps(moved, keep, batch=2))
    assert torch.equal(seen[0], taps.latent(Tap(0, BLOCKS[0])) / 2 + 1)


def test_files_lie_where_the_first_tools_put_them(tmp_path, run):
    folders, generations, finals = written(tmp_path, run)
    assert [folder.name for folder in folders] == [one.generation_id for one in generations]
    assert all(re.fullmatch("[0-9a-f]{8}", folder.name) for folder in folders)
    for folder, final in zip(folders, finals, strict=True):
        assert {path.name for path in folder.iterdir()} == {
            "img_0.jpg", "metadata.json", "sheet.png", "differences.png", "contributions.png", "intermediates",
        }  # fmt: skip
        assert [name for name in generation_files(folder) if "/" in name] == [
            f"intermediates/decoded/step_{step}/{kind}_block_{index}.jpg"
            for step in (0, 1)
            for kind in ("double", "single")
            for index in (0, 1)
        ]
        with Image.open(folder / "img_0.jpg") as image:
            assert np.abs(np.asarray(image, int) - np.asarray(final, int)).mean() < 8
    assert [tap for tap, _ in find_previews(folders[0])] == list(run[0])


def test_previews_of_each_image_of_the_batch_are_its_own(tmp_path, run):
    folders, _, _ = written(tmp_path, run)
    taps, _ = run
    for number, folder in enumerate(folders):
        for tap, path in find_previews(folder):
            with Image.open(path) as image:
                own = decode(taps.latent(tap))[number].permute(1, 2, 0).mul(255).numpy()
                assert np.abs(np.asarray(image) - own).mean() < 8


def test_metadata_says_how_the_image_came_about(tmp_path, run):
    (folder, _), (one, _), _ = written(tmp_path, run)
    found = json.loads((folder / "metadata.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.pop("timestamp"))
    assert found == {
        "generation_id": folder.name, "model": "flux1-tiny", "prompt": one.prompt, "width": 32, "height": 48, "num_steps": 2,
        "timesteps": [1.0, 0.5, 0.0], "seed": 7, "guidance": 2.5,
    }  # fmt: skip


@pytest.mark.parametrize(("prompt", "workflow", "left"), [(10, 10, 2), (60_000, 10_000, 1), (10, 70_000, 0)])
def test_a_jpeg_has_as_much_of_the_graph_as_there_is_room_for(tmp_path, prompt, workflow, left):
    graph = {"workflow": json.dumps("w" * workflow), "prompt": json.dumps("p" * prompt)}
    save_jpeg(tmp_path / "a.jpg", Image.new("RGB", (8, 8)), generation(), graph)
    with Image.open(tmp_path / "a.jpg") as image:
        exif = image.getexif()
        found = [exif[tag] for tag in (Base.Make, Base.HostComputer) if tag in exif]
        assert found == [f"{key}:{graph[key]}" for key in graph][:left]
        assert exif[Base.Model] == generation().model


def test_pictures_carry_generation_and_graph_unless_that_is_disabled(tmp_path, run):
    (folder, _), (one, _), _ = written(tmp_path, run, in_pictures={"workflow": '{"nodes": []}'})
    for path in (folder / "img_0.jpg", find_previews(folder)[3][1]):
        with Image.open(path) as image:
            exif = image.getexif()
            assert (exif[Base.Software], exif[Base.Model]) == ("flux-poke", "flux1-tiny")
            comment = exif.get_ifd(IFD.Exif)[Base.UserComment]
            assert json.loads(comment.removeprefix(b"ASCII\0\0\0")) == json.loads(one.to_json())
    with Image.open(folder / "img_0.jpg") as image:
        assert image.getexif()[Base.Make] == 'workflow:{"nodes": []}'
    with Image.open(folder / "sheet.png") as image:
        assert image.info["workflow"] == '{"nodes": []}'
        assert json.loads(image.info["flux-poke"]) == json.loads(one.to_json())
    (folder, _), _, _ = written(tmp_path, run, in_pictures=None)
    for path in folder.rglob("*.*g"):
        with Image.open(path) as image:
            assert not image.getexif()
            assert not set(image.info) & {"workflow", "prompt", "flux-poke", "exif"}


def test_progress_counts_to_the_end_and_stops_when_it_raises(tmp_path, run):
    seen: list[tuple[float, float, int]] = []
    shown: list[Image.Image] = []
    written(tmp_path / "all", run, progress=lambda _, *how_far: seen.append((*how_far, len(shown))), show=shown.append)
    assert seen == [(done, 16, done) for done in range(1, 17)]

    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "some", run, progress=stop)
    assert len(list((tmp_path / "some").rglob("*_block_*.jpg"))) == 3


def test_captions_make_previews_taller(tmp_path, run):
    (folder, _), _, _ = written(tmp_path, run, captions=True)
    with Image.open(find_previews(folder)[0][1]) as image:
        assert image.height / image.width > 48 / 32


def test_without_decoding_the_latents_are_written_in_the_place_of_pictures(tmp_path, run):
    folders, _, _ = written(tmp_path, run, decode=None)
    taps, _ = run
    for number, folder in enumerate(folders):
        assert {path.name for path in folder.iterdir()} == {"img_0.jpg", "metadata.json", "contributions.png", "intermediates"}
        for step in (0, 1):
            latents = load_file(folder / "intermediates" / "latents" / f"step_{step}.safetensors")
            assert set(latents) == {f"{kind}_block_{index}" for kind in ("double", "single") for index in (0, 1)}
            assert torch.equal(latents["single_block_1"], taps.latent(Tap(step, BLOCKS[-1]))[number])


def test_nothing_tapped_is_said_in_a_sentence():
    with pytest.raises(UserError, match="no block predictions"):
        list(decode_taps(BlockTaps(), decode))
    with pytest.raises(UserError, match="no block predictions"):
        block_contributions(BlockTaps())


def plain_images(blocks=BLOCKS, steps=(0, 1, 5)) -> dict[Tap, Image.Image]:
    """Each tap a grey of its own, from 40 up."""
    taps = [Tap(step, block) for step in steps for block in blocks]
    return {tap: Image.new("RGB", (64, 48), (40 + 10 * place,) * 3) for place, tap in enumerate(taps)}


def test_a_sheet_has_steps_across_and_blocks_down():
    images = plain_images()
    pixels = np.asarray(contact_sheet(images, "title"))[..., 0]
    places = {tap: np.argwhere(pixels == 40 + 10 * place) for place, tap in enumerate(images)}
    cells = {tap: np.median(place, axis=0) for tap, place in places.items() if len(place) > 2000}
    assert set(cells) == set(images)
    for tap, (y, x) in cells.items():
        for other, (oy, ox) in cells.items():
            assert (tap.step < other.step) == (x + 50 < ox)
            assert (tap.block < other.block) == (y + 40 < oy)


def test_a_difference_sheet_is_black_where_a_preview_is_the_final_image():
    images = plain_images(BLOCKS[:1])
    sheet = np.asarray(difference_sheet(images, images[Tap(5, BLOCKS[0])]))
    assert (sheet == (0, 0, 3)).all(-1).sum() == 112 * 84  # inferno's lowest colour
    brightest = sheet[(sheet == (252, 254, 164)).all(-1)]
    assert len(brightest) == 112 * 84  # step 0 is the furthest away


def test_a_sheet_of_the_largest_model_stays_below_its_size_limit():
    blocks = [*(Block("double", i) for i in range(19)), *(Block("single", i) for i in range(38))]
    sheet = contact_sheet(plain_images(blocks, range(50)), "FLUX.1-dev", dict.fromkeys(range(50), 0.5))
    assert max(sheet.size) < 4600


def test_contributions_are_those_of_the_definitions(run):
    taps, _ = run
    rows = block_contributions(taps)
    assert [row.tap for row in rows] == list(taps)
    final = taps.latent(Tap(1, BLOCKS[-1])).double().numpy()
    for row in rows:
        x0 = taps.latent(row.tap).double().numpy()
        error = np.mean([((x0[n] - final[n]) ** 2).sum() / (final[n] ** 2).sum() for n in (0, 1)])
        assert row.error == pytest.approx(error, rel=1e-4, abs=1e-9)
        own, last = (taps.velocity(tap).double().numpy() for tap in (row.tap, Tap(row.tap.step, BLOCKS[-1])))
        cosines = [(own[n] * last[n]).sum() / np.linalg.norm(own[n]) / np.linalg.norm(last[n]) for n in (0, 1)]
        assert row.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
        assert row.change == pytest.approx(taps.change(row.tap).mean().item())
    assert rows[-1].error == 0


def test_the_chart_shows_one_line_a_step_in_each_of_three_panels(run):
    figure = contributions_figure(block_contributions(run[0]))
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert len(panels) == 3
    assert all(len(axis.lines) == 2 for axis in panels)
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == [block.name for block in BLOCKS]
