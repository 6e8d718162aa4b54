"""What a recording on a cluster is divided into: the prompts that are drawn at once, each with its seed and its number.

pieces = drawn_pieces(prompts, seed=0, batch=16, settings="...")   # by the reference runtime
pieces = queued_pieces(runs)                                       # runs of a workflow on ComfyUI, one prompt each
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..headless.runs import Run
from ..headless.workflow import Graph

#: What Record Options says where there is none.
_OPTIONS = {
    "streams": "all", "sigma_from": 0.0, "sigma_to": 1.0, "when_full": "thin", "ignore_padding": True, "positive_only": False,
    "sample_seed": 0, "append": True,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Images number `first` and on, drawn at once, from `seed` and on; or one run of a `graph`.

    `key` is the same in every attempt, and of no other piece; `number` is its place among all of them.
    """

    key: str
    number: int
    first: int
    prompts: tuple[str, ...]
    seed: int = 0
    graph: Graph = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        last = self.first + len(self.prompts) - 1
        return f"images {self.first} to {last}" if last > self.first else f"image {self.first}"


def drawn_pieces(prompts: Sequence[str], seed: int, batch: int, settings: str) -> list[Piece]:
    """`batch` prompts each, as `recording/drawing.py` draws them; image n from `seed` + n. `settings` tell how."""
    pieces = []
    for number, first in enumerate(range(0, len(prompts), batch)):
        some = tuple(prompts[first : first + batch])
        key = hashlib.sha256(json.dumps([some, seed + first, settings]).encode()).hexdigest()[:16]
        pieces.append(Piece(key, number, first, some, seed + first))
    return pieces


def queued_pieces(runs: Sequence[Run]) -> list[Piece]:
    """One run each. Every one is recorded into a folder of its own, so it is told what those before it leave to it: its steps
    and tokens are drawn by another seed, and amplifications are measured by the first one."""
    return [
        Piece(run.key, place, run.number, (run.prompt,), graph=_numbered(run.graph, place)) for place, run in enumerate(runs)
    ]


def _numbered(graph: Graph, place: int) -> Graph:
    found = copy.deepcopy(graph)
    for number, node in [*found.items()]:
        inputs = node["inputs"]
        if node["class_type"] == "FluxPokeRecord" and "options" not in inputs:
            found[f"options of {number}"] = {"class_type": "FluxPokeRecordOptions", "inputs": dict(_OPTIONS)}
            inputs["options"] = [f"options of {number}", 0]
        if place and type(inputs.get("probe_steps")) is int:
            inputs["probe_steps"] = 0
    for node in found.values():
        if type(node["inputs"].get("sample_seed")) is int:
            node["inputs"]["sample_seed"] += place
    return found
