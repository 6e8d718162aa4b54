"""What the shipped workflows ask of a person: few values, no name twice, and notes that name what is there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from shipped import CANVAS, WORKFLOWS

NAMES = list(CANVAS)
#: What nodes are called in sentences: without the pack's name, by which a search tells them from others.
PAGES = {
    re.match(r"# (.+?)(?: \(Flux Poke\))?\n", path.read_text(encoding="utf-8"))[1]  # type: ignore[index]
    for path in (WORKFLOWS.parent / "web" / "docs").glob("*.md")
}

#: Inputs of ours that name a file or a folder.
FILES = ("name", "folder", "file", "save_as", "unet_name")
#: What a seed becomes after a run: a value without an input of its own.
AFTER_RUNS = ("randomize", "fixed")
#: What stands for the checkpoint that a plan knows.
OF_THE_PLAN = "as in the plan"


def graph(name: str) -> dict[str, Any]:
    return json.loads(CANVAS[name].read_text(encoding="utf-8"))


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


def test_pruning_and_comparing_takes_sixteen_values_beside_the_choice_of_the_model_and_how_to_save():
    given = [value for value in values("prune_and_compare_tiny") if value[0] != "FluxPokeSavePrunedFlux"]
    assert len(given) <= 17
    assert ("FluxPokeLoadTinyFlux", "family", "FLUX.1") in given
    assert len(graph("prune_and_compare_tiny")["nodes"]) <= 16
    assert len(graph("prune_and_compare_tiny")["links"]) <= 27


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_typed_twice(name: str):
    lists = ("FluxPokeCalibrate", "file")  # of prompts, the same for all of its nodes
    named = [
        value for kind, entry, value in values(name)
        if entry in FILES and (kind, entry) != lists and value not in ("", OF_THE_PLAN)
    ]  # fmt: skip
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
        assert kind == output["type"] or output["type"] == "*"
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
def test_notes_name_workflows_and_steps_that_are_there(name: str):
    titles = {re.sub(r"^Flux Poke \d\d ", "", path.stem) for path in CANVAS.values()}
    steps = {found[1] for group in graph(name)["groups"] if (found := re.match(r"(\d) · ", group["title"]))}
    assert sorted(steps) == [str(number) for number in range(1, len(steps) + 1)]
    for node in graph(name)["nodes"]:
        if node["type"] == "MarkdownNote":
            text = node["widgets_values"][0]
            assert {found for found in re.findall(r"`([^`]+)`", text) if re.search(r" \(.+\)$", found)} <= titles
            assert {number for found in re.findall(r"\(([\d, ]+)\)", text) for number in found.split(", ")} <= steps


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_tiny")])
def test_steps_have_the_same_numbers_for_the_large_model_as_for_the_tiny_one(name: str):
    tiny = "try_it_tiny" if name == "record_internals" else f"{name}_tiny"
    of_large, of_tiny = (
        sorted(found for group in graph(twin)["groups"] for found in re.findall(r"^(\d) · ", group["title"]))
        for twin in (name, tiny)
    )
    assert of_large == of_tiny


def test_every_node_is_in_a_workflow():
    pages = {path.stem for path in (WORKFLOWS.parent / "web" / "docs").glob("FluxPoke*.md")}  # a host test: one for each node
    assert pages - {node["type"] for name in NAMES for node in graph(name)["nodes"]} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_can_be_downloaded_says_where(name: str):
    """As on ComfyUI's own templates: the page offers to download what is missing."""
    made = {value for kind, entry, value in values(name) if entry == "save_as"}
    for node in graph(name)["nodes"]:
        if node["type"] != "MarkdownNote":
            offered = {model["name"]: model for model in node["properties"].get("models", [])}
            chosen = {value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")}
            if node["type"] != "FluxPokeLoadPlan":  # names a plan
                assert offered.keys() == chosen - made, node["type"]
            for model in offered.values():
                assert model["url"].startswith("https://huggingface.co/")
                assert model["url"].endswith(f"/{model['name']}")
                assert model["directory"] in ("diffusion_models", "text_encoders", "vae", "loras")


def test_titles_sort_with_what_to_try_first_and_the_tiny_twin_before_the_large_one():
    assert NAMES[0] == "try_it_tiny"
    for name in NAMES:
        if f"{name}_tiny" in NAMES:
            assert NAMES.index(name) == NAMES.index(f"{name}_tiny") + 1
    assert [int(path.stem.split()[2]) for path in CANVAS.values()] == list(range(1, len(NAMES) + 1))
