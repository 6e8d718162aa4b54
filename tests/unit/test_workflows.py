"""What the shipped workflows ask of a person: few values, no name twice, and notes that name what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
#: What nodes are called in sentences: without the pack's name, by which a search tells them from others.
PAGES = {
    re.match(r"# (.+?)(?: \(Flux Poke\))?\n", path.read_text())[1]  # type: ignore[index]
    for path in (WORKFLOWS.parent / "web" / "docs").glob("*.md")
}

#: Inputs of ours that name a file or a folder.
FILES = ("name", "folder", "file", "save_as", "unet_name")
#: What a seed becomes after a run: a value without an input of its own.
AFTER_RUNS = ("randomize", "fixed")
#: What stands for the checkpoint that a plan knows.
OF_THE_PLAN = "as in the plan"


def graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def values(name: str) -> list[tuple[str, str, Any]]:
    """Node, input and value of all that is typed or chosen on nodes of ours; what comes through a link is not."""
    found = []
    for node in graph(name)["nodes"]:
        if node["type"].startswith("FluxPoke"):
            widgets = [entry for entry in node["inputs"] if "widget" in entry]
            typed = [value for value in node.get("widgets_values", []) if value not in AFTER_RUNS]
            given = zip(widgets, typed, strict=True)
            found += [(node["type"], entry["name"], value) for entry, value in given if entry["link"] is None]
    return found


def test_pruning_and_comparing_takes_sixteen_values_beside_the_choice_of_the_model():
    given = values("prune_and_compare_tiny")
    assert len(given) <= 17
    assert ("FluxPokeLoadTinyFlux", "family", "FLUX.1") in given
    assert len(graph("prune_and_compare_tiny")["nodes"]) <= 15
    assert len(graph("prune_and_compare_tiny")["links"]) <= 24


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_typed_twice(name: str):
    named = [value for _, entry, value in values(name) if entry in FILES and value not in ("", OF_THE_PLAN)]
    if "all_in_one" in name:  # what plans is switched off once it has planned, and what reads the plan stays
        named.remove(next(value for kind, entry, value in values(name) if (kind, entry) == ("FluxPokeLoadPlan", "file")))
    assert len(named) == len(set(named)), named


@pytest.mark.parametrize("name", NAMES)
def test_every_link_joins_an_output_and_an_input_of_its_type(name: str):
    found = graph(name)
    nodes = {node["id"]: node for node in found["nodes"]}
    for number, source, slot, goal, place, kind in found["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[goal]["inputs"][place]
        assert number in output["links"]
        assert entry["link"] == number
        assert kind == output["type"]
        assert entry["type"] == "*" or {*kind.split(",")} & {*entry["type"].split(",")}, (
            f"{nodes[goal]['type']}.{entry['name']}"
        )
    assert sum(entry.get("link") is not None for node in nodes.values() for entry in node["inputs"]) == len(found["links"])


@pytest.mark.parametrize("name", NAMES)
def test_nodes_that_a_note_or_a_help_page_names_are_there(name: str):
    for node in graph(name)["nodes"]:
        if node["type"] == "MarkdownNote":
            for named in re.findall(
                r"(?<!\*)\*((?:Record|Load|Save|Plan|Retrain|Choose|Tap|Decode) [^*]+)\*(?!\*)", node["widgets_values"][0]
            ):
                assert named in PAGES or named in ("Plan Pruning",), named


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_opens_at_its_first_step_in_letters_that_can_be_read(name: str):
    view, steps = graph(name)["extra"].get("ds", {"scale": 0, "offset": [0, 0]}), graph(name)["groups"]
    assert view["scale"] >= 0.8  # below .6, the canvas draws grey boxes in place of text
    corner = (min(group["bounding"][axis] for group in steps) for axis in (0, 1))
    assert all(0 <= (place + offset) * view["scale"] < 160 for place, offset in zip(corner, view["offset"], strict=True))
