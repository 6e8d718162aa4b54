"""What a recording on a cluster is divided into: the prompts that are drawn at once, each with its seed and its number.

pieces = drawn_pieces(prompts, seed=0, batch=16, settings="...")   # by the reference runtime
pieces = queued_pieces(runs, batch=16)                             # runs of a workflow on ComfyUI, one prompt each
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
    """Images number `first` and on, drawn at once, from `seed` and on; or runs of `graphs`, one after the other.

    `key` is the same in every attempt, and of no other piece; `number` is its place among all of them.
    """

    key: str
    number: int
    first: int
    prompts: tuple[str, ...]
    seed: int = 0
    graphs: tuple[Graph, ...] = field(default=(), compare=False, repr=False)

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


def queued_pieces(runs: Sequence[Run], batch: int) -> list[Piece]:
    """`batch` runs each, which are recorded into one folder. It is told what those before it leave to it: its steps and tokens
    are drawn by another seed, and amplifications are measured by the first one."""
    pieces = []
    for number, first in enumerate(range(0, len(runs), batch)):
        some = runs[first : first + batch]
        key = hashlib.sha256(json.dumps([run.key for run in some]).encode()).hexdigest()[:16]
        graphs = tuple(_numbered(run.graph, number) for run in some)
        pieces.append(Piece(key, number, first, tuple(run.prompt for run in some), graphs=graphs))
    return pieces


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
