"""Blueprints of `subgraphs/`: found by the page's search, dropped into a graph, and run there."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from playwright.sync_api import Page, TimeoutError

BLUEPRINTS = sorted((Path(__file__).parents[2] / "subgraphs").glob("*.json"))

#: ComfyUI's own template of FLUX.1-dev: a subgraph of loaders, prompt, sampler and decoder.
STOCK = "flux_dev_full_text_to_image"

#: Sets the graph that is open up for the tiny FLUX: `Load Tiny FLUX` takes the place of the loaders in it.
WITH_TINY_FLUX = """() => {
    const graph = app.canvas.graph, tiny = LiteGraph.createNode("FluxPokeLoadTinyFlux")
    graph.add(tiny)
    for (const [slot, type] of ["UNETLoader", "DualCLIPLoader", "VAELoader"].entries()) {
        const loader = graph.nodes.find(node => node.type === type)
        for (const id of [...loader.outputs[0].links]) {
            const {target_id, target_slot} = graph.getLink(id)
            tiny.connect(slot, graph.getNodeById(target_id), target_slot)
        }
        graph.remove(loader)
    }
    graph.nodes.find(node => node.type === "KSampler").widgets.find(widget => widget.name === "steps").value = 4
}"""

#: Connects by the names of slots: [[node, output], [node, input]], nodes by title or type.
CONNECT = """links => {
    const graph = app.canvas.graph
    const node = name => graph.nodes.find(node => node.title === name) ?? graph.nodes.find(node => node.type === name)
    for (const [[from, output], [to, input]] of links) {
        const slots = [node(from).outputs.findIndex(o => o.name === output), node(to).inputs.findIndex(i => i.name === input)]
        if (slots.includes(-1)) throw Error(`no ${from}.${output} or ${to}.${input}`)
        node(from).connect(slots[0], node(to), slots[1])
    }
}"""

SET = """([name, values]) => {
    const node = app.canvas.graph.nodes.find(node => node.title === name)
    for (const [widget, value] of Object.entries(values)) node.widgets.find(w => w.name === widget).value = value
}"""


def open_search(page: Page) -> None:
    """A double click on the empty canvas, once more where the page was too busy to take the two for one."""
    for _ in range(3):
        page.mouse.dblclick(700, 450)
        with suppress(TimeoutError):
            page.wait_for_function("() => document.activeElement?.tagName === 'INPUT'", timeout=20_000)
            return
    pytest.fail("no search came up")


@pytest.fixture
def drop(canvas):
    """Finds a blueprint by its name, as a person does: double click, type, Enter, and a click where it is to be."""
    count = 0

    def into_graph(name: str) -> None:
        nonlocal count
        count += 1
        canvas.page.evaluate(
            "at => { app.canvas.ds.scale = 0.8; app.canvas.ds.offset = [at, at]; app.canvas.draw(true, true) }", 3000 * count
        )
        open_search(canvas.page)
        canvas.page.keyboard.type(name)
        canvas.page.get_by_text("Subgraph Blueprints / Flux Poke").first.wait_for()
        canvas.page.keyboard.press("Enter")
        canvas.page.get_by_role("dialog").wait_for(state="hidden")
        canvas.page.mouse.click(700, 450)
        canvas.page.wait_for_function(
            "name => app.canvas.graph.nodes.some(node => node.title === name && node.subgraph)", arg=name
        )

    return into_graph


def test_a_blueprint_is_one_subgraph_called_as_its_file_that_says_what_it_is_for():
    assert len(BLUEPRINTS) == 4
    for path in BLUEPRINTS:
        found = json.loads(path.read_text(encoding="utf-8"))
        (node,), (subgraph,) = found["nodes"], found["definitions"]["subgraphs"]
        assert node["type"] == subgraph["id"]
        assert node["title"] == subgraph["name"] == path.stem
        assert subgraph["description"]
        assert all(inner["mode"] == 0 for inner in subgraph["nodes"])


def test_comfyuis_own_flux_template_is_recorded_and_seen_when_blueprints_are_dropped_into_it(
    canvas, drop, host, server, tmp_path
):
    answer = requests.get(f"http://{server.address}/templates/{STOCK}.json", timeout=60)
    if not answer.ok:
        pytest.skip(f"this ComfyUI has no template {STOCK}")
    (tmp_path / "stock.json").write_bytes(answer.content)
    canvas.drop(tmp_path / "stock.json")
    canvas.page.evaluate(
        """() => {
            const outer = app.graph.nodes.find(node => node.subgraph)
            const given = {width: 64, height: 64, text: "a handwritten three"}
            for (const [name, value] of Object.entries(given)) outer.widgets.find(w => w.name === name).value = value
            app.canvas.setGraph(outer.subgraph)
        }"""
    )
    canvas.page.evaluate(WITH_TINY_FLUX)
    record, see = "Flux Poke Record and report", "Flux Poke See every block"
    drop(record)
    drop(see)
    canvas.page.evaluate(
        CONNECT,
        [
            [["FluxPokeLoadTinyFlux", "MODEL"], [record, "model"]], [[record, "model"], [see, "model"]],
            [[see, "model"], ["KSampler", "model"]], [["KSampler", "LATENT"], [record, "latent"]],
            [["KSampler", "LATENT"], [see, "latent"]], [["FluxPokeLoadTinyFlux", "VAE"], [see, "vae"]],
        ],
    )  # fmt: skip
    canvas.page.evaluate(SET, [record, {"name": "stock_template"}])
    canvas.page.evaluate(SET, [see, {"at steps": "0, 3"}])
    before = {*(host.output / "flux_poke").glob("*/sheet.png")}
    assert canvas.run() == "execution_success"
    assert Internals.load(host.recorded("stock_template")).runs == 1
    assert Recording.open(host.recorded("stock_template").parent).kinds >= {"internals", "rows"}
    assert len({*(host.output / "flux_poke").glob("*/sheet.png")} - before) == 1


def test_what_a_blueprint_records_is_planned_cut_saved_and_compared_by_two_others(canvas, drop, host):
    record, plan, compare = "Flux Poke Record and report", "Flux Poke Plan, cut and save", "Flux Poke Compare"
    canvas.page.evaluate(
        """() => {
            app.graph.clear()
            const values = {KSampler: {steps: 4, cfg: 1, seed: 1}, CLIPTextEncode: {text: "a handwritten five"},
                            EmptySD3LatentImage: {width: 64, height: 64, batch_size: 80}}
            for (const type of ["FluxPokeLoadTinyFlux", "ConditioningZeroOut", ...Object.keys(values)]) {
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                for (const [name, value] of Object.entries(values[type] ?? {}))
                    node.widgets.find(widget => widget.name === name).value = value
            }
        }"""
    )
    for name in (record, plan, compare):
        drop(name)
    tiny, sampler, prompt, none = "FluxPokeLoadTinyFlux", "KSampler", "CLIPTextEncode", "ConditioningZeroOut"
    canvas.page.evaluate(
        CONNECT,
        [
            [[tiny, "CLIP"], [prompt, "clip"]], [[prompt, "CONDITIONING"], [none, "conditioning"]],
            [[tiny, "MODEL"], [record, "model"]], [[record, "model"], [sampler, "model"]],
            [[prompt, "CONDITIONING"], [sampler, "positive"]], [[none, "CONDITIONING"], [sampler, "negative"]],
            [["EmptySD3LatentImage", "LATENT"], [sampler, "latent_image"]], [[sampler, "LATENT"], [record, "latent"]],
            [[record, "recording"], [plan, "recording"]], [[sampler, "LATENT"], [plan, "latent"]],
            [[tiny, "MODEL"], [compare, "model"]], [[plan, "model"], [compare, "other model"]],
            [[prompt, "CONDITIONING"], [compare, "positive"]], [[none, "CONDITIONING"], [compare, "negative"]],
            [["EmptySD3LatentImage", "LATENT"], [compare, "latent"]], [[tiny, "VAE"], [compare, "vae"]],
        ],
    )  # fmt: skip
    saved = host.base / "models" / "diffusion_models" / "from-blueprint.safetensors"
    canvas.page.evaluate(SET, [record, {"name": "blueprints"}])
    canvas.page.evaluate(SET, [plan, {"checkpoint": "tiny FLUX (ships with the pack)", "save as": saved.name}])
    canvas.page.evaluate(SET, [compare, {"steps": 4}])
    assert canvas.run() == "execution_success", canvas.complaints()
    assert Pruned.open(saved).plan.masked_count.startswith("img")
    pictures = """name => {
        const {id, subgraph} = app.graph.nodes.find(node => node.title === name)
        const inside = Object.entries(app.nodeOutputs).filter(([inner]) => inner.match(`^(${id}|${subgraph.id}):`))
        return inside.some(([, shown]) => shown.images?.length)
    }"""
    canvas.page.wait_for_function(pictures, arg=compare)
