"""The shipped workflows: files for people, named by titles, and their forms for the API, named for scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).parents[2] / "workflows"


def api_name(title: str) -> str:
    """ "Flux Poke 05 Fit FLUX (tiny)" is fit_flux_tiny for the API; the large models' names are left out there."""
    found = re.fullmatch(r"Flux Poke \d\d (\w[\w ]*\w) \((tiny|FLUX\.1-dev|FLUX\.2)\)", title)
    assert found, f"{title} is no title such as 'Flux Poke 05 Fit FLUX (tiny)'"
    name = found[1].lower().replace(" ", "_").replace("all_in_one", "flux_poke_all_in_one")
    return f"{name}_tiny" if found[2] == "tiny" else name


#: The file for people by its name for the API, in the order of the templates.
CANVAS = {api_name(path.stem): path for path in sorted(WORKFLOWS.glob("*.json"))}


def untitled(graph: dict[str, Any]) -> dict[str, Any]:
    """What a graph for the API runs, without the titles of its nodes."""
    return {number: (node["class_type"], node["inputs"]) for number, node in graph.items()}
