"""How long samplers take for a step, for nodes that tell of it when all is drawn.

watch_steps()                     # in fingerprint_inputs, which ComfyUI calls before it runs any node
steps = step_seconds(graph)       # {"9": 0.081, "10": 0.067}: by sampler

Times count from the end of the first step: loading is not in them. Samplers that do not run again, since nothing above them
changed, are known from the results that ComfyUI keeps of earlier runs: a node that tells of them adds `as_output(steps)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from comfy_execution.progress import NodeProgressState, ProgressHandler, add_progress_handler, get_progress_state
from server import PromptServer

from .graph import above, inputs_of

NAME = "flux_poke.steps"
#: In a node's `ui`; how many runs are looked through for it.
KEPT, EARLIER = "flux_poke_step_seconds", 50


class _Stopwatch(ProgressHandler):
    """When each node of a run was at its first step and at its last one so far: (step, seconds)."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.first: dict[str, tuple[float, float]] = {}
        self.last: dict[str, tuple[float, float]] = {}

    def update_handler(
        self,
        node_id: str,
        value: float,
        max_value: float,
        state: NodeProgressState,
        prompt_id: str,
        image: Any = None,
    ) -> None:
        now = value, perf_counter()
        if node_id not in self.first or value <= self.last[node_id][0]:  # again from the beginning, for the next of a list
            self.first[node_id] = now
        self.last[node_id] = now

    def seconds(self) -> dict[str, float]:
        """A step's, by node; at least two are needed."""
        between = {node: (*self.first[node], *self.last[node]) for node in self.last}
        return {node: (end - start) / (last - first) for node, (first, start, last, end) in between.items() if last > first}


def watch_steps() -> None:
    """Looks on at the run that begins."""
    if NAME not in get_progress_state().handlers:
        add_progress_handler(_Stopwatch())


def step_seconds(graph: Mapping[str, Any]) -> dict[str, float]:
    """Seconds a step of each sampler of the graph that runs, as far as they are known."""
    watch = get_progress_state().handlers.get(NAME)
    now = watch.seconds() if isinstance(watch, _Stopwatch) else {}
    return {
        node: seconds for node, seconds in {**_earlier(graph), **now}.items() if {"model", "guider"} & {*inputs_of(graph, node)}
    }


def as_output(seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a node adds to its `ui`, for later runs."""
    return {KEPT: [dict(seconds)]}


def _earlier(graph: Mapping[str, Any]) -> dict[str, float]:
    """Those of earlier runs, of samplers above which nothing is another now."""
    history = PromptServer.instance.prompt_queue.get_history(
        max_items=EARLIER, map_function=lambda run: (run["prompt"][2], [*run.get("outputs", {}).values()])
    )
    found: dict[str, float] = {}
    for before, outputs in history.values():
        for output in outputs:
            for node, seconds in [pair for known in output.get(KEPT, ()) for pair in known.items()]:
                if above(before, node) == above(graph, node):
                    found[node] = seconds
    return found
