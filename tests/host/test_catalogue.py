"""Every node says what it is: help page, tooltips, names. Fails for a node that was added without them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ask(server):
    def get(path: str) -> requests.Response:
        answer = requests.get(f"http://{server.address}/{path}", timeout=60)
        answer.raise_for_status()
        return answer

    return get


@pytest.fixture(scope="module")
def nodes(ask) -> dict[str, dict[str, Any]]:
    """The nodes of this pack as the server describes them, by id."""
    return {name: node for name, node in ask("object_info").json().items() if name.startswith("FluxPoke")}


@pytest.fixture(scope="module")
def names(ask) -> dict[str, dict[str, Any]]:
    """What locales/en/nodeDefs.json says of each node, as the page gets it."""
    found = ask("i18n").json()["en"]["nodeDefs"]
    return {name: entry for name, entry in found.items() if name.startswith("FluxPoke")}


def inputs(node: dict[str, Any]) -> dict[str, Any]:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def shown(name: str, entry: dict[str, Any]) -> str:
    """An input's name as the page shows it."""
    return entry.get("inputs", {}).get(name, {}).get("name", name)


def test_every_node_and_every_input_says_what_it_is_for(nodes):
    silent = [
        f"{node}.{name}"
        for node, described in nodes.items()
        for name, (_, *options) in inputs(described).items()
        if not (options and options[0].get("tooltip"))
    ]
    assert not silent
    assert all(node["description"] for node in nodes.values())
    assert not [name for name, node in nodes.items() if "`" in json.dumps([node["description"], node["input"]])]


def test_nodes_stand_in_the_menu_by_what_they_are_for_and_are_found_by_the_words_that_people_use(ask, nodes):
    under = Counter(node["category"] for node in nodes.values())
    translated = ask("i18n").json()["en"]["nodeCategories"]
    assert all(category.startswith("flux-poke/") and count > 1 for category, count in under.items())
    assert all(part in translated for category in under for part in category.split("/"))

    def found(word: str) -> set[str]:
        return {name.removeprefix("FluxPoke") for name, node in nodes.items() if word in node["search_aliases"]}

    assert {"Record", "RecordInternals", "Calibrate", "InternalsReport", "LoadRecording"} <= found("neuron") & found("firing")
    assert {"PlanByBudget", "PlanByCount", "LoadPrunedFlux", "SavePrunedFlux", "Calibrate"} <= found("prune")
    assert {"TapBlocks", "InternalsReport", "RecordInternals"} <= found("interpret")
    assert all(node["search_aliases"] for node in nodes.values())


def test_a_node_of_a_common_name_bears_that_of_the_pack(ask, nodes):
    others = {(node["display_name"] or name).lower() for name, node in ask("object_info").json().items() if name not in nodes}
    assert not {node["display_name"].lower() for node in nodes.values()} & others
    plain = {"Compare", "Record", "Calibrate", "Prompts", "Counter", "Random Int", "Random Size", "Queue Limit"}
    assert not plain & {node["display_name"] for node in nodes.values()}


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(ask, nodes, names):
    assert sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md")) == sorted(nodes)
    for name, node in nodes.items():
        folder = node["python_module"].removeprefix("custom_nodes.")
        page = ask(f"extensions/{folder}/docs/{name}.md").text
        assert page.startswith(f"# {node['display_name']}\n")
        missing = [shown(each, names[name]) for each in inputs(node) if f"**{shown(each, names[name])}**" not in page]
        missing += [each for each in node["output_name"] if f"**{each}**" not in page]
        assert not missing, f"{name}.md"


def test_the_names_in_the_locale_are_those_of_nodes_and_inputs_that_exist(nodes, names):
    assert sorted(names) == sorted(nodes)
    for name, entry in names.items():
        assert entry["display_name"] == nodes[name]["display_name"]
        assert set(entry.get("inputs", {})) <= set(inputs(nodes[name]))
        unreadable = [each for each in inputs(nodes[name]) if "_" in shown(each, entry)]
        assert not unreadable, f"{name}: give these a name for people in locales/en/nodeDefs.json"


@pytest.mark.parametrize("language", ["de", "ja", "zh"])
def test_the_page_gets_a_name_and_a_tooltip_of_every_input_in_other_languages(ask, nodes, language: str):
    translated = {name: entry for name, entry in ask("i18n").json()[language]["nodeDefs"].items() if name in nodes}
    assert sorted(translated) == sorted(nodes)
    for name, entry in translated.items():
        assert set(entry["inputs"]) == set(inputs(nodes[name])), name
        assert all(each["name"] and each["tooltip"] for each in entry["inputs"].values()), name


def test_a_node_shows_at_most_eight_values_until_all_are_asked_for(nodes):
    kinds = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    shown_first = {
        name: [each for each, (kind, *said) in inputs(node).items() if kind in kinds and not said[0].get("advanced")]
        for name, node in nodes.items()
    }
    assert max(map(len, shown_first.values())) <= 8, shown_first
    assert shown_first["FluxPokeRecord"] == ["name", "rows", "steps", "max_gb"]
