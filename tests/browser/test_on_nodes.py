"""What is seen on nodes, in both kinds of them that the page has, and what comes back from files that were written."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flux_poke.pruning.plan import PruningPlan
from flux_poke.recording.internals import Internals

TEXT, VIEW = "$$node-text-preview", "flux_poke_view"
PLAN, REPORT = "FluxPokePlanByBudget", "FluxPokeInternalsReport"
COMPARE, DECODE = "FluxPokeCompare", "FluxPokeDecodeBlockPreviews"


def graph(seed: int) -> dict:
    """A small run of everything that shows text and pictures; the seed is that of the recorded one."""

    def node(kind: str, **inputs: object) -> dict:
        return {"class_type": kind, "inputs": inputs}

    def sampler(model: str, seed: int, latents: str) -> dict:
        rest = {"positive": ["words", 0], "negative": ["none", 0], "latent_image": [latents, 0]}
        how = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return node("KSampler", model=[model, 0], seed=seed, **rest, **how)

    named = {
        "load": node("FluxPokeLoadTinyFlux", family="FLUX.1"),
        "words": node("CLIPTextEncode", clip=["load", 1], text="a seven"),
        "none": node("ConditioningZeroOut", conditioning=["words", 0]),
        "many": node("EmptySD3LatentImage", width=64, height=64, batch_size=16),
        "one": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "record": node("FluxPokeRecord", model=["load", 0], name="on_nodes", rows=64, steps=4, max_gb=1.0, probe_steps=1),
        "tap": node("FluxPokeTapBlocks", model=["load", 0], blocks="all", at_steps="0, 3", lens="", memory_gb=1.0),
        "sample": sampler("record", seed, "many"),
        "tapped": sampler("tap", seed, "one"),
        "other": sampler("load", seed + 1, "one"),
        "report": node(REPORT, recording=["record", 1], after=["sample", 0]),
        "plan": node(
            PLAN, recording=["record", 1], after=["sample", 0], unet_name="tiny FLUX (ships with the pack)", amount=0.3,
            budget="share of the neurons", touch="neurons", precision="stored", protect="", save_as="on_nodes_plan.safetensors",
        ),
        "compare": node(COMPARE, reference=["tapped", 0], variant=["other", 0], names="the other", file=""),
        "decode": node(
            DECODE, block_taps=["tap", 1], vae=["load", 2], after=["tapped", 0], view="x0", captions=False, decode=True,
            metadata=True, largest=64,
        ),
        "animate": node(
            "FluxPokeAnimateBlockPreviews", folder=["decode", 4], format="mp4", fps=2.0, order="step", block_type="all",
            max_blocks=0, font_size=0,
        ),
    }  # fmt: skip
    numbers = {name: f"{number}" for number, name in enumerate(named, start=1)}
    for made in named.values():
        for name, value in made["inputs"].items():
            if isinstance(value, list):
                made["inputs"][name] = [numbers[value[0]], value[1]]
    return {numbers[name]: made for name, made in named.items()}


@dataclass
class Seen:
    """A page on which the graph has run."""

    canvas: Any
    nodes_2: bool
    #: What the server got, and the folder of the generation.
    made_with: dict
    folder: Path


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def seen(request, host, open_canvas, tmp_path_factory) -> Iterator[Seen]:
    path = tmp_path_factory.mktemp("graphs") / "on_nodes.json"
    path.write_text(json.dumps(graph(seed=request.param)))
    with open_canvas(nodes2=request.param) as canvas:
        before = {*(host.output / "flux_poke").glob("*/blocks.mp4")}
        canvas.drop(path)
        canvas.page.evaluate("() => app.graph.nodes.forEach((node, at) => { node.pos = [800 * at, 0] })")
        made_with = canvas.graph()
        assert canvas.run() == "execution_success"
        (film,) = {*(host.output / "flux_poke").glob("*/blocks.mp4")} - before
        yield Seen(canvas, request.param, made_with, film.parent)


def caption(seen: Seen, kind: str) -> str:
    return seen.canvas.part(kind, VIEW, ".flux-poke-caption").inner_text()


def point(seen: Seen, kind: str, across: float, down: float, press: bool = False) -> str:
    """What a node's chart tells of a place in it, as shares of its width and height; `press` drags there."""
    mouse, box = seen.canvas.page.mouse, seen.canvas.part(kind, VIEW, "svg").bounding_box()
    x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
    if press:
        mouse.move(x - 40, y)
        mouse.down()
    mouse.move(x, y)
    told = caption(seen, kind)
    if press:
        mouse.up()
    mouse.move(5, 500)
    return told


def test_text_on_a_node_keeps_its_lines_and_its_table(seen, host):
    table = seen.canvas.part(PLAN, TEXT, "table")
    header, *rows = [[cell.strip() for cell in row.split("\t")] for row in table.inner_text().splitlines()]
    assert header == ["site", "width", "kept", "cut", "predicted error"]
    plan = PruningPlan.load(host.output / "flux_poke" / "on_nodes_plan.safetensors")
    assert {row[0]: [int(cell) for cell in row[1:3]] for row in rows} == {
        site: [512, len(left)] for site, left in plan.kept.items()
    }
    assert len(rows) > 3
    tops = table.evaluate("table => [...table.rows].map(row => row.getBoundingClientRect().top)")
    assert tops == sorted({*tops})


def test_no_word_of_a_text_is_broken(seen):
    for kind in (PLAN, REPORT, COMPARE, DECODE):
        words = seen.canvas.part(kind, TEXT, "*").evaluate(
            """part => [...part.parentElement.querySelectorAll("div, td")].flatMap(line =>
                [...line.textContent.matchAll(/\\S+/g)].map(word => {
                    const range = document.createRange()
                    range.setStart(line.firstChild, word.index)
                    range.setEnd(line.firstChild, word.index + word[0].length)
                    return [word[0], new Set([...range.getClientRects()].map(box => Math.round(box.top))).size]
                }))"""
        )
        assert words
        assert {word for word, lines in words if lines != 1} == set()


def test_text_and_pictures_are_there_once(seen):
    page, node = seen.canvas.page, seen.canvas.node(DECODE)
    for kind, text in (
        (PLAN, "by budget, 30% of the neurons"),
        (DECODE, "12 predictions in"),
        (COMPARE, "the other: relative"),
    ):
        seen.canvas.part(kind, TEXT, "*")
        assert page.locator(".lg-node, .dom-widget").get_by_text(re.compile(f"^{text}")).count() == 1
    page.wait_for_function("node => node.imgs?.length", arg=node)
    if seen.nodes_2:
        images = "id => document.querySelectorAll(`[data-node-id='${id}'] img`).length"
        page.wait_for_function(f"id => ({images})(id) === 1", arg=node.evaluate("node => node.id"))
        assert page.evaluate(images, seen.canvas.node(PLAN).evaluate("node => node.id")) == 0
    else:
        shown = "node => node.widgets.map(widget => widget.name).filter(name => /preview|view/.test(name) && name !== 'view')"
        assert node.evaluate(shown) == [TEXT, "$$canvas-image-preview"]
        assert seen.canvas.node(PLAN).evaluate(shown) == [TEXT, VIEW]


def test_a_chart_fills_its_node(seen):
    svg = seen.canvas.part(REPORT, VIEW, "svg").bounding_box()
    width, height = seen.canvas.node(REPORT).evaluate("node => [...node.size]")
    assert svg["width"] > 0.9 * width
    assert svg["height"] > 0.3 * height


def test_the_map_tells_block_neuron_and_how_often_it_fires(seen, host):
    recorded = Internals.load(host.recorded("on_nodes"))
    for down in (0.25, 0.5, 0.75):
        told = point(seen, REPORT, 0.4, down)
        expected = r"([\w-]+) · neuron ([\d,]+) of ([\d,]+) · fires at ([\d.e-]+) % of tokens"
        found = re.fullmatch(expected, told)
        assert found
        name, neuron, of, percent = found.groups()
        rate = recorded.sites[name].rate
        assert int(of) == len(rate)
        assert float(percent) == pytest.approx(100 * rate[int(neuron)].item(), rel=0.01, abs=0.002)


def test_dragging_the_budget_asks_for_what_the_next_plan_does(seen):
    canvas = seen.canvas
    amount = "node => node.widgets.find(widget => widget.name === 'amount').value"
    before = canvas.node(PLAN).evaluate(amount)
    assert caption(seen, PLAN).startswith("This plan: MB saved")
    told = point(seen, PLAN, 0.7, 0.5, press=True)
    asked = canvas.node(PLAN).evaluate(amount)
    assert 0 < before < asked < 1
    assert caption(seen, PLAN) == f"Asked for: {told}. Run to plan it."
    assert canvas.graph() != seen.made_with

    assert canvas.run() == "execution_success"
    shown = canvas.part(PLAN, VIEW, ".flux-poke-caption")
    canvas.page.wait_for_function("caption => caption.innerText.startsWith('This plan')", arg=shown)
    cut = [int(re.findall(r"neurons cut ([\d,]+)", text)[0].replace(",", "")) for text in (told, caption(seen, PLAN))]
    assert cut[0] == cut[1]
    assert cut[0] / 4096 == pytest.approx(asked, rel=3e-3)


def test_before_and_after_are_parted_where_the_pointer_is(seen):
    stage = seen.canvas.part(COMPARE, VIEW, ".flux-poke-stage")
    box = stage.bounding_box()
    for share in (0.25, 0.75):
        seen.canvas.page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        left = stage.query_selector("img:last-of-type").evaluate("image => image.style.clipPath.match(/[\\d.]+%/)[0]")
        assert float(left[:-1]) == pytest.approx(100 * (1 - share), abs=1)
    widths = (
        "stage => Promise.all([...stage.querySelectorAll('img')].map(image => image.decode().then(() => image.naturalWidth)))"
    )
    assert len(stage.evaluate(widths)) == 2


@pytest.mark.parametrize("name", ["img_0.jpg", "blocks.mp4"])
def test_files_that_were_written_bring_their_graph_back(seen, name: str):
    seen.canvas.drop(seen.folder / name)
    assert seen.canvas.graph() == seen.made_with


def test_a_picture_dropped_on_the_canvas_brings_its_graph_back(seen):
    page = seen.canvas.page
    page.evaluate("() => app.graph.clear()")
    page.evaluate(
        """base64 => {
            const bytes = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0)), transfer = new DataTransfer()
            transfer.items.add(new File([bytes], "img_0.jpg", {type: "image/jpeg"}))
            const options = {dataTransfer: transfer, bubbles: true, cancelable: true, clientX: 600, clientY: 500}
            app.canvas.canvas.dispatchEvent(new DragEvent("drop", options))
        }""",
        base64.b64encode((seen.folder / "img_0.jpg").read_bytes()).decode(),
    )
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(seen.made_with))
    assert seen.canvas.graph() == seen.made_with
