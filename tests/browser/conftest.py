"""Chromium on a real ComfyUI that has this pack.

Skipped where there is no ComfyUI (see ../conftest.py), and where Chromium is neither /usr/bin/chromium nor on the PATH.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, ElementHandle, JSHandle, Page, expect, sync_playwright

WORKFLOWS = Path(__file__).parents[2] / "workflows"

#: Where ComfyUI's page puts what is wrong with a graph: an overlay, in older versions a dialog.
COMPLAINTS = "[data-testid=error-overlay], [role=dialog]"

#: Milliseconds that anything on the page may take; a busy machine is slow to draw.
PATIENCE = 60_000


class Canvas:
    """A page with ComfyUI in it, and what a person does there."""

    def __init__(self, page: Page):
        self.page = page

    def visit(self, address: str) -> None:
        self.page.goto(f"http://{address}/", wait_until="domcontentloaded")
        self.page.wait_for_selector("[data-testid=queue-button]")
        self.page.wait_for_function("() => window.app?.vueAppReady && !document.querySelector('.p-blockui-mask')")
        self.page.wait_for_timeout(1000)  # a graph of ComfyUI's own is opened first; it would replace what is dropped earlier

    def drop(self, path: Path) -> None:
        """Opens a file, as if it were dragged onto the page, and waits for its graph."""
        self.page.evaluate("() => app.graph.clear()")
        self.page.set_input_files("#comfy-file-input", str(path))
        self.page.wait_for_function("() => app.graph.nodes.length > 0")
        self.page.wait_for_timeout(1500)  # what the graph lacks is looked up after it is drawn

    def layout(self) -> dict[str, Any]:
        """The page as it is drawn, in its pixels: `scale`, and `left, top, right, bottom` of `nodes`, `groups` and the `note`.

        A node is drawn on the canvas, or by Nodes 2.0 as an element of the page.
        """
        return self.page.evaluate(
            """() => {
                const {ds, canvas} = app.canvas, box = canvas.getBoundingClientRect()
                const drawn = ([x, y, width, height]) => [
                    box.x + (x + ds.offset[0]) * ds.scale, box.y + (y + ds.offset[1]) * ds.scale,
                    box.x + (x + width + ds.offset[0]) * ds.scale, box.y + (y + height + ds.offset[1]) * ds.scale,
                ]
                const place = node => {
                    const element = document.querySelector(`[data-node-id="${node.id}"]`)
                    if (!element) return drawn(node.boundingRect)
                    const {left, top, right, bottom} = element.getBoundingClientRect()
                    return [left, top, right, bottom]
                }
                const nodes = {}, note = app.graph.nodes.find(node => node.type === "MarkdownNote")
                for (const node of app.graph.nodes) if (node !== note) nodes[`${node.id} ${node.type}`] = place(node)
                const groups = Object.fromEntries(app.graph.groups.map(group => [group.title, drawn(group.boundingRect)]))
                return {scale: ds.scale, nodes, groups, note: note && place(note)}
            }"""
        )

    def graph(self) -> dict[str, Any]:
        """The graph on the canvas in the form that the server gets."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def complaints(self) -> str:
        """What the page says is wrong; empty if nothing."""
        return "\n".join(self.page.locator(COMPLAINTS).all_inner_texts())

    def wait_for_complaint(self) -> None:
        self.page.locator(COMPLAINTS).first.wait_for()

    def node(self, kind: str) -> JSHandle:
        """The first node of a class."""
        return self.page.evaluate_handle("kind => app.graph.nodes.find(node => node.type === kind)", kind)

    def write(self, kind: str, widget: str, value: object) -> None:
        """Puts `value` into a widget of the first node of class `kind`."""
        self.node(kind).evaluate(
            "(node, [name, value]) => { node.widgets.find(w => w.name === name).value = value }", [widget, value]
        )

    def run(self) -> str:
        """Presses Run and waits for the end; the name of ComfyUI's message of it."""
        self.page.evaluate(
            """() => { window.ended = new Promise(ended => {
                for (const end of ["execution_success", "execution_error", "execution_interrupted"])
                    app.api.addEventListener(end, () => ended(end), {once: true})
            }) }"""
        )
        self.page.get_by_test_id("queue-button").click()
        return self.page.evaluate("() => window.ended")

    def pictures(self, kind: str) -> list[list[int]]:
        """Width and height of every picture that the first node of a class shows; looks at it until there are some."""
        node = self.node(kind)
        self.look_at(kind)
        self.page.wait_for_function("node => node.imgs?.length && node.imgs.every(image => image.naturalWidth)", arg=node)
        return node.evaluate("node => node.imgs.map(image => [image.naturalWidth, image.naturalHeight])")

    def look_at(self, kind: str) -> None:
        """Moves the canvas so that the first node of a class is in view at its full size."""
        self.node(kind).evaluate(
            """node => {
                app.canvas.ds.scale = 1
                app.canvas.ds.offset = [120 - node.pos[0], 110 - node.pos[1]]
                app.canvas.draw(true, true)
            }"""
        )

    def part(self, kind: str, widget: str, selector: str) -> ElementHandle:
        """A part of the element of a widget of the first node of class `kind`, in view."""
        self.look_at(kind)
        found = self.page.wait_for_function(
            """([kind, name, selector]) => app.graph.nodes.find(node => node.type === kind)
                .widgets.find(widget => widget.name === name)?.element.querySelector(selector)""",
            arg=[kind, widget, selector],
        ).as_element()
        assert found
        found.wait_for_element_state("stable")
        return found

    def expect_text(self, text: str) -> None:
        """Waits until `text` can be seen somewhere on the page."""
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=PATIENCE)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium: neither /usr/bin/chromium nor on the PATH")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        with playwright.chromium.launch(executable_path=chromium, args=options) as running:
            yield running


@pytest.fixture(scope="session")
def models(host) -> None:
    """An empty file for each model that a workflow names, and a picture for each picture, so that the page misses none."""
    for path in WORKFLOWS.glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "LoadImage":
                Image.new("RGB", (64, 64)).save(host.base / "input" / node["widgets_values"][0])
            if node["type"] == "FluxPokeLoadRecording" and "tiny" not in path.stem:
                (recording := host.recorded(node["widgets_values"][0])).parent.mkdir(parents=True, exist_ok=True)
                recording.touch()
            for model in node["properties"].get("models", []):
                file = host.base / "models" / model["directory"] / model["name"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()


@pytest.fixture(scope="session")
def open_canvas(browser: Browser, models, server) -> Callable[..., AbstractContextManager[Canvas]]:
    """Opens a fresh page; with `nodes2`, nodes are Nodes 2.0, which are elements of the page, in place of drawn ones."""

    @contextmanager
    def opened(width: int = 1600, height: int = 900, nodes2: bool = False) -> Iterator[Canvas]:
        settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": nodes2}
        requests.post(f"http://{server.address}/settings", json=settings, timeout=60).raise_for_status()
        with browser.new_context(viewport={"width": width, "height": height}) as context:
            context.set_default_timeout(PATIENCE)
            canvas = Canvas(context.new_page())
            canvas.visit(server.address)
            yield canvas

    return opened


@pytest.fixture
def canvas(open_canvas) -> Iterator[Canvas]:
    """A fresh page."""
    with open_canvas() as opened:
        yield opened
