"""How the shipped workflows look on ComfyUI's page, with nodes of both kinds: drawn on the canvas (classic), and Nodes 2.0.

Each is opened once for each kind, on one page, at the size of one screen, which then becomes that of another.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from playwright.sync_api import expect
from shipped import CANVAS, untitled

#: The screen that a workflow is opened on, and the one that it is looked at then; by whether nodes are Nodes 2.0.
SCREENS = {False: ((1600, 1000), (1280, 800)), True: ((1280, 800), (1600, 1000))}

#: Milliseconds that the page may take to draw what was changed.
PATIENCE = 60_000

#: What covers the canvas, in pixels: the sidebar on the left, tabs and the name of the graph at the top.
SIDEBAR, TOP = 58, 90

#: Quick ones, with what makes them quicker still, or record under a name of their own.
RUN = {
    "try_it_tiny": [("FluxPokeRecordInternals", "name", "layouts")],
    "see_every_block_tiny": [("FluxPokeTapBlocks", "at_steps", "0, 19")],
    "flux_timer_tiny": [],
}


@pytest.fixture(scope="module", params=SCREENS, ids=["classic", "nodes 2.0"])
def nodes2(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def page(open_canvas, nodes2: bool):
    width, height = SCREENS[nodes2][0]
    with open_canvas(width, height, nodes2) as canvas:
        yield canvas


def seen(canvas, nodes2: bool) -> dict[str, Any]:
    """The layout, when every node is on the page and none of them grows any more."""
    count = "() => document.querySelectorAll('[data-node-id]').length === app.graph.nodes.length"
    canvas.page.wait_for_function(count if nodes2 else "() => !document.querySelector('[data-node-id]')")
    layouts = [canvas.layout(), {}]
    while layouts[0] != layouts[1]:
        canvas.page.wait_for_timeout(500)
        layouts = [canvas.layout(), layouts[0]]
    return layouts[0]


def overlapping(layout: dict[str, Any]) -> list[tuple[str, str]]:
    places = {**layout["nodes"], "note": layout["note"]}
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(places.items(), 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1
    ]


def out_of_groups(layout: dict[str, Any]) -> list[str]:
    return [
        name
        for name, (left, top, right, bottom) in layout["nodes"].items()
        if not any(a < left and b < top and right < c and bottom < d for a, b, c, d in layout["groups"].values())
    ]


@pytest.mark.parametrize("name", CANVAS)
def test_a_workflow_opens_readable_at_its_note_and_first_step_and_is_the_one_for_the_api(page, nodes2, workflow, name: str):
    page.page.set_viewport_size(dict(zip(("width", "height"), SCREENS[nodes2][0], strict=True)))
    page.drop(CANVAS[name])
    assert page.complaints() == ""
    assert untitled(page.graph()) == untitled(workflow(name))
    for width, height in SCREENS[nodes2]:
        page.page.set_viewport_size({"width": width, "height": height})
        layout = seen(page, nodes2)
        assert layout["scale"] >= 0.75  # below .6, grey boxes are drawn in place of text
        for left, top, right, bottom in (layout["note"], next(iter(layout["groups"].values()))):
            assert SIDEBAR <= left < right <= width, f"{width} x {height}"
            assert TOP <= top < bottom <= height, f"{width} x {height}"
        assert overlapping(layout) == []
        assert out_of_groups(layout) == []


@pytest.mark.parametrize("name", RUN)
def test_nodes_stay_apart_and_in_their_groups_when_they_show_what_came_of_a_run(page, nodes2, name: str):
    page.drop(CANVAS[name])
    for kind, widget, value in RUN[name]:
        page.write(kind, widget, value)
    assert page.run() == "execution_success"
    page.page.wait_for_function("() => Object.values(app.nodeOutputs).some(output => output.images?.length)")
    if nodes2:
        page.page.wait_for_function(
            "() => { const found = [...document.querySelectorAll('[data-node-id] img')];"
            " return found.length && found.every(image => image.complete && image.naturalWidth) }"
        )
    layout = seen(page, nodes2)
    assert overlapping(layout) == []
    assert out_of_groups(layout) == []


def test_inputs_without_effect_are_out_of_sight_and_keep_their_values(page, nodes2, workflow):
    page.drop(CANVAS["flux_timer_tiny"])
    page.look_at("FluxPokeFluxTimer")
    node = page.node("FluxPokeFluxTimer")

    def choose(shift: str, asked: set[str]) -> None:
        """Of all that may be without effect, `asked` is in sight then."""
        node.evaluate(
            "(node, shift) => { const widget = node.widgets.find(w => w.name === 'shift');"
            " widget.value = shift; widget.callback(shift) }",
            shift,
        )
        for name in ("static_shift", "width", "height"):
            if nodes2:
                element = page.page.locator(f"[data-node-id='{node.evaluate('node => node.id')}']")
                label = element.get_by_text(name.replace("_", " "), exact=True)
                expect(label).to_have_count(int(name in asked), timeout=PATIENCE)
            else:
                shown = "(node, name) => node.isWidgetVisible(node.widgets.find(widget => widget.name === name))"
                assert node.evaluate(shown, name) == (name in asked)

    choose("static", {"static_shift"})  # its latent is linked, and says the size
    assert untitled(page.graph()) == untitled(workflow("flux_timer_tiny"))
    choose("FLUX.1 (by size)", set())
    (timer,) = (entry["inputs"] for entry in page.graph().values() if entry["inputs"].get("shift") == "FLUX.1 (by size)")
    assert {"static_shift", "width", "height"} <= timer.keys()
    node.evaluate("node => node.disconnectInput(node.findInputSlot('latent'))")
    choose("FLUX.2 (by size and steps)", {"width", "height"})
