"""The names of nodes in every language: none is missing, and none is one that the page would misread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).parents[2] / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
PAGES = sorted(path.stem for path in (LOCALES.parent / "web" / "docs").glob("*.md"))


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def texts(entry: Any) -> list[str]:
    return [entry] if isinstance(entry, str) else [text for value in entry.values() for text in texts(value)]


def test_there_are_english_german_japanese_and_chinese():
    assert LANGUAGES == ["de", "en", "ja", "zh"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_and_category_has_a_name_of_its_own(language: str):
    named = {node: entry["display_name"] for node, entry in read(language, "nodeDefs").items()}
    assert sorted(named) == PAGES
    assert all(named.values())
    assert len({*named.values()}) == len(named)
    categories, english = (read(each, "main")["nodeCategories"] for each in (language, "en"))
    assert categories.keys() == english.keys()
    assert all(categories.values())


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_what_has_an_english_name_has_one_in_every_language(language: str):
    english = read("en", "nodeDefs")
    for node, entry in read(language, "nodeDefs").items():
        assert entry["description"], node
        assert english[node].get("inputs", {}).keys() <= entry["inputs"].keys(), node
        assert all(each["name"] and each["tooltip"] for each in entry["inputs"].values()), node
        ours = " (Flux Poke)"
        assert entry["display_name"].endswith(ours) == english[node]["display_name"].endswith(ours), node


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_name_holds_a_character_that_the_page_takes_for_its_own(language: str):
    """vue-i18n reads these as plural forms, values to fill in, and references to other texts."""
    found = texts(read(language, "nodeDefs")) + texts(read(language, "main"))
    assert not [text for text in found if {*text} & {*"{}@|"}]


def test_tooltips_are_translated():
    """What is said in English on the node is said otherwise here, and one thing in one way."""
    said = {
        language: {
            (node, name): each["tooltip"]
            for node, entry in read(language, "nodeDefs").items()
            for name, each in entry["inputs"].items()
        }
        for language in LANGUAGES
        if language != "en"
    }
    german, japanese, chinese = said["de"], said["ja"], said["zh"]
    assert german.keys() == japanese.keys() == chinese.keys()
    for place, text in german.items():
        assert len({text, japanese[place], chinese[place]}) == 3 or len(text) < 30, place
        assert any(ord(letter) > 0x2E80 for letter in japanese[place]), place
