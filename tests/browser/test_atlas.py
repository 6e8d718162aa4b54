"""The page of an atlas in a browser, from the disk."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_poke.analysis.written import Writer, written_pictures
from flux_poke.cli import app
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.tiny.model import SHIPPED, autoencoder_of
from PIL import Image
from playwright.sync_api import Page, expect
from typer.testing import CliRunner

PROMPTS = [f"{template}{digit}" for digit in range(10) for template in ("", "a ")]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    recording, file = Recording.at(tmp_path_factory.mktemp("recorded") / "digits"), SHIPPED["flux1"] / "flux.safetensors"
    record(file, PROMPTS, recording, Wanted(internals=True, atlas=True, rows=RowChoice(rows=4, steps=2)), seed=1, steps=4)
    shown = CliRunner().invoke(app, ["atlas", "show", f"{recording.folder}", "--checkpoint", f"{file}"], catch_exceptions=False)
    assert "4,096 neurons, 20 images" in shown.output
    return recording


@pytest.fixture
def page(browser, recording):
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(f"{error}"))
        page.goto(f"{(recording.folder / 'page' / 'index.html').as_uri()}")
        expect(page.locator(".card")).to_have_count(60)
        yield page
        assert not wrong


def shown(page: Page) -> list[int]:
    return [int(name.rpartition(":")[2]) for name in page.locator(".card .name").all_inner_texts()]


def wait_for_pictures(page: Page) -> None:
    """Until those of the first cards have arrived."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.card:nth-child(-n+4) img')].every(image => image.complete && image.naturalWidth)"
    )


def test_the_strongest_neurons_come_first_with_their_pictures(page, recording):
    places = recording.atlas().sites["double-img-0"]
    assert shown(page) == places.value[:, 0].abs().argsort(descending=True, stable=True)[:60].tolist()
    assert page.locator(".card:first-child .place").count() == 8
    wait_for_pictures(page)
    first = page.locator(".card:first-child .place").first
    box, square = first.bounding_box(), first.locator("i").bounding_box()
    token = int(places.token[shown(page)[0], 0])
    assert square["x"] - box["x"] == pytest.approx(token % 4 * box["width"] / 4, abs=1)
    assert square["y"] - box["y"] == pytest.approx(token // 4 * box["height"] / 4, abs=1)


def test_neurons_are_found_by_number_by_name_and_by_word(page, recording):
    search = page.locator("#search")
    search.fill("single-2:77")
    search.press("Enter")
    expect(page.locator(".card .name")).to_have_text(["single-2:77"])
    search.fill("7")
    search.press("Enter")
    expect(page.locator(".card .name")).to_have_text(["single-2:7"])
    page.locator("#site").select_option("double-txt-1")
    search.fill("three")
    search.press("Enter")
    expect(page.locator("#page")).to_have_text("none")
    search.fill("a")
    search.press("Enter")
    atlas = recording.atlas()
    places = atlas.sites["double-txt-1"]
    words = [[(*image.texts, *("",) * 8)[token] for image, token in zip([atlas.images[n] for n in row], tokens, strict=True)]
             for row, tokens in zip(places.image.tolist(), places.token.tolist(), strict=True)]  # fmt: skip
    share = torch.tensor([row.count("a") for row in words])
    found = shown(page)
    assert share[found].tolist() == share.sort(descending=True).values[:60].tolist()
    expect(page.locator("#page")).to_contain_text(f"of {int((share > 0).sum())}")


def test_a_neuron_tells_its_prompts_its_likes_and_its_histogram(page, recording):
    page.locator(".card").first.click()
    expect(page.locator("dialog figure")).to_have_count(16)
    neuron, atlas = shown(page)[0], recording.atlas()
    image = atlas.images[atlas.sites["double-img-0"].image[neuron, 0]]
    expect(page.locator("dialog figcaption").first).to_contain_text(f"{image.prompt}, seed {image.seed}")
    assert page.locator(".bars span").count() == 40
    page.locator("dialog .link").first.click()
    expect(page.locator("dialog h2")).not_to_have_text(f"double-img-0:{neuron}")


def test_a_neuron_shows_what_it_writes_and_those_of_the_text_do_not(page, recording):
    checkpoint, atlas = Checkpoint(SHIPPED["flux1"] / "flux.safetensors"), recording.atlas()
    page.locator("#site").select_option("single-1")
    expect(page.locator(".card .name").first).to_contain_text("single-1")
    page.wait_for_function(
        """async () => {
          const sheet = new Image()
          sheet.src = "sites/single-1.jpg"
          await sheet.decode()
          return true
        }"""
    )
    neurons = shown(page)[:6]
    autoencoder = autoencoder_of(checkpoint)
    assert autoencoder is not None
    writer = Writer(checkpoint, checkpoint.layout)
    found = written_pictures(writer, autoencoder.decode, atlas, [("single-1", neuron) for neuron in neurons])
    pictures = [picture for picture in found if picture is not None]
    assert len(pictures) == len(neurons)
    for card in range(len(pictures)):
        page.locator(".card").nth(card).click()
        square = Image.open(io.BytesIO(page.locator("dialog .writes").screenshot()))
        seen, *drawn = (np.asarray(one.convert("L").resize((32, 32)), float)[2:-2, 2:-2] for one in (square, *pictures))
        far = [np.abs(seen - other).mean() for other in drawn]
        assert far[card] == min(far) < 12  # corners are round, and JPEG loses a little
        page.locator("#close").click()
    page.locator("#site").select_option("double-txt-1")
    expect(page.locator(".card .name").first).to_contain_text("double-txt-1")
    expect(page.locator(".card .writes")).to_have_count(0)


def test_only_a_page_is_replaced(recording, tmp_path: Path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "thesis.txt").write_text("mine")
    refused = CliRunner().invoke(app, ["atlas", "show", f"{recording.folder}", "-o", f"{tmp_path / 'page'}"])
    assert refused.exit_code
    assert "thesis.txt, which is something else" in str(refused.exception)
    assert (tmp_path / "page" / "thesis.txt").read_text() == "mine"


def test_recordings_of_several_machines_add_up(recording, tmp_path: Path):
    file = SHIPPED["flux1"] / "flux.safetensors"
    for name, prompts, seed in (("one", PROMPTS[:12], 1), ("other", PROMPTS[8:], 9)):
        record(file, prompts, Recording.at(tmp_path / name), Wanted(atlas=True), seed=seed, steps=4)
    merged = ["atlas", "merge", *(f"{tmp_path / name}" for name in ("one", "other")), "-o", f"{tmp_path / 'all'}"]
    CliRunner().invoke(app, merged, catch_exceptions=False)
    whole, total = recording.atlas(), Recording.open(tmp_path / "all").atlas()
    assert total.images == whole.images
    assert all(Recording.at(tmp_path / "all").atlas_picture(image.key).is_file() for image in total.images)
