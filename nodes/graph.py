"""Reading the graph that runs: what is drawn, with which model, and by which sampler.

value_above(graph, "7", TEXTS)                    # the nearest prompt above node 7
nearest_above(graph, "7", "after", {"3", "5"})   # which of these nodes the input `after` of node 7 comes from
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

#: Inputs of text encoders that say what is drawn.
TEXTS = ("text", "t5xxl", "prompt")


def running_node() -> str | None:
    """The node that runs now; None outside of a run."""
    context = get_executing_context()
    return None if context is None else context.node_id


def running_graph() -> Mapping[str, Any]:
    """The graph that runs now, empty where there is no server; a node that is not run again, since nothing above it changed,
    knows an earlier one."""
    if not hasattr(PromptServer, "instance"):
        return {}
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return running[0][2] if running else {}


def inputs_of(graph: Mapping[str, Any], number: str | None) -> Mapping[str, Any]:
    """Inputs of a node as the graph gives them: links, and values also of names that the node does not have."""
    return graph.get(number or "", {}).get("inputs", {})


def prompt_below(graph: Mapping[str, Any], number: str) -> str:
    """What is drawn with the MODEL that a node of the graph gives: the text above the positive input of the nearest node below
    that has one (a sampler or a guider); empty where it comes out of another node."""
    below = [number]
    for number in below:  # grows on the way
        sources = _sources(graph, number)
        for name in ("positive", "conditioning"):
            if name in sources:
                return value_above(graph, sources[name], TEXTS)
        below += [other for other in graph if other not in below and number in _sources(graph, other).values()]
    return ""


def value_above(graph: Mapping[str, Any], number: str, names: Collection[str], default: str = "") -> str:
    """The text of the nearest input at a node or upstream of it that is called one of `names`; negative prompts are left out.

    What is only known while the graph runs (a text that comes out of another node) is not found.
    """
    waiting = [number]
    for number in waiting:  # grows on the way
        inputs = inputs_of(graph, number)
        for name in names:
            if isinstance(inputs.get(name), str):
                return inputs[name]
        sources = [source for name, source in _sources(graph, number).items() if name != "negative"]
        waiting += [source for source in dict.fromkeys(sources) if source not in waiting]
    return default


def _sources(graph: Mapping[str, Any], number: str) -> dict[str, str]:
    """By input of a node, the node that is linked to it."""
    inputs = inputs_of(graph, number)
    return {name: value[0] for name, value in inputs.items() if isinstance(value, list)}


def above(graph: Mapping[str, Any], number: str) -> dict[str, Any]:
    """A node and all above it: their classes and inputs. Where these are the same in two graphs, so is what the node gives."""
    waiting = [number]
    for number in waiting:  # grows on the way
        waiting += [source for source in dict.fromkeys(_sources(graph, number).values()) if source not in waiting]
    return {number: (graph.get(number, {}).get("class_type"), inputs_of(graph, number)) for number in waiting}


def nearest_above(graph: Mapping[str, Any], number: str, name: str, wanted: Collection[str]) -> set[str]:
    """Which of the `wanted` nodes are nearest above the input `name` of a node; several where they are equally near."""
    source = _sources(graph, number).get(name)
    level, seen = {source} if source else set(), set()
    while level and not (found := level & set(wanted)):
        seen |= level
        level = {above for node in level for above in _sources(graph, node).values()} - seen
    return found if level else set()
