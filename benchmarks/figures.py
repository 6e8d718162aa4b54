"""Figures of a benchmark: printed for people and, where `all.py` asks for them, also kept as data.

figure(f"{kind} block: {took:.1f} ms", block=kind, ms=took)      # a line, and what it says
"""

from __future__ import annotations

import json
import os

#: Names the file that figures are added to, one JSON object a line.
VARIABLE = "FLUX_POKE_FIGURES"


def figure(text: str, **values: float | str) -> None:
    """Prints `text`, and keeps `values`."""
    print(text, flush=True)
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
