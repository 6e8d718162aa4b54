"""Runs of a workflow in API form: a graph from a file, with inputs set by name, and one copy for each prompt.

    graph = read_graph(Path("mine.json"))
    runs = make_runs(graph, ["KSampler.steps=8", "6.text=a photo of {prompt}"], ["a fox", "an owl"])
    runs[1].graph, runs[1].key, runs[1].prompt

NODE is a node's id or its title. Every run takes the next seed: inputs called `seed` or `noise_seed` count up from the file's
value, with the number of the prompt, unless they were set.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WrongArguments
from ..parsing import from_json, read_text
from .workflow import Graph

#: What a prompt stands for in a value, inputs that take a text, and those that take a seed.
PROMPT, TEXTS, SEEDS = "{prompt}", ("text", "t5xxl", "clip_l", "prompt"), ("seed", "noise_seed")
#: The largest seed that samplers take.
SEED_LIMIT = 2**64

Place = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Run:
    """One run: `number` is its prompt's place in the file, `key` tells it from the others of the queue by what it draws."""

    number: int
    key: str
    graph: Graph
    prompt: str = ""

    @property
    def name(self) -> str:
        """For a line on the terminal."""
        text = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:57]}..."
        return f"{self.number} ({text})" if text else f"{self.number}"


def read_graph(path: Path) -> Graph:
    """The graph in a file as *Export (API)* writes it. Raises `WrongArguments` where it is something else."""
    try:
        found = from_json(read_text(path))
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise WrongArguments(f"{path} {why}: expected a workflow in API form (Workflow menu, Export (API)).") from error
    except ValueError as error:
        raise WrongArguments(f"{path} is not JSON ({error}): expected a workflow in API form (Export (API)).") from error
    if isinstance(found, dict) and isinstance(found.get("nodes"), list):
        raise WrongArguments(
            f"{path} is a workflow as the canvas keeps it, which a server does not run: open it in ComfyUI and save it with "
            "Workflow menu, Export (API)."
        )
    if isinstance(found, dict) and isinstance(found.get("prompt"), dict):  # as it is sent to /prompt
        found = found["prompt"]
    nodes = found.values() if isinstance(found, dict) and found else [None]
    for node in nodes:
        if (
            not isinstance(node, dict)
            or not isinstance(node.get("class_type"), str)
            or not isinstance(node.get("inputs"), dict)
        ):
            raise WrongArguments(
                f"{path} is not a workflow in API form: expected nodes by id, each with class_type and inputs. Save it with "
                "Workflow menu, Export (API)."
            )
    return found


def make_runs(
    graph: Graph, settings: Sequence[str] = (), prompts: Sequence[str] | None = None, start: int = 0, count: int | None = None
) -> list[Run]:
    """One run for each of `count` prompts from number `start` on (None: all that follow), or as many runs without prompts.

    Raises `WrongArguments` where a setting names no input, the graph has no one place for a prompt, or runs would be equal.
    """
    graph = copy.deepcopy(graph)
    values = [parse_setting(graph, setting) for setting in settings]
    for (node, name), value in values:
        graph[node]["inputs"][name] = value
    told = {place for place, value in values if isinstance(value, str) and PROMPT in value}
    if prompts is None:
        if told:
            raise WrongArguments(f"{PROMPT} in --set stands for a line of a file: give --prompts.")
        numbered = [(number, "") for number in range(start, start + (1 if count is None else count))]
    else:
        if start >= len(prompts):
            raise WrongArguments(f"There are {len(prompts)} prompts, counted from 0: --start {start} is behind the last one.")
        numbered = [*enumerate(prompts)][start : None if count is None else start + count]
    places = told or (set() if prompts is None else prompt_places(graph))
    seeds = {place for place in seed_places(graph) if place not in dict(values)}
    runs, seen = [], Counter[str]()
    for number, prompt in numbered:
        own = copy.deepcopy(graph)
        for node, name in places:
            inputs = own[node]["inputs"]
            inputs[name] = inputs[name].replace(PROMPT, prompt) if (node, name) in told else prompt
        for node, name in seeds:
            own[node]["inputs"][name] = (own[node]["inputs"][name] + number) % SEED_LIMIT
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
        seen[digest] += 1
        runs.append(Run(number, f"{digest}-{seen[digest]}" if seen[digest] > 1 else digest, own, prompt))
    if prompts is None and len(seen) < len(runs):
        raise WrongArguments(f"{len(runs)} runs would all draw the same: the workflow has no seed that counts up.")
    return runs


def parse_setting(graph: Graph, setting: str) -> tuple[Place, Any]:
    """The place and the value of NODE.INPUT=VALUE, of the type that the input has now; a link may be replaced.

    Raises `WrongArguments` where there is no one input of that name, or the value is not of that type.
    """
    target, equals, text = setting.partition("=")
    node, _, name = target.rpartition(".")
    if not equals or not node or not name:
        raise WrongArguments(f"--set {setting}: expected NODE.INPUT=VALUE, such as KSampler.steps=8.")
    splits = [(target[:at], target[at + 1 :]) for at, letter in enumerate(target) if letter == "."]
    places = [
        (number, name) for node, name in splits for number in nodes_called(graph, node) if name in graph[number]["inputs"]
    ]
    if not places:
        found = [number for node, _ in splits for number in nodes_called(graph, node)]
        if found:
            there = ", ".join(graph[found[0]]["inputs"]) or "none"
            raise WrongArguments(f"--set {setting}: {node} has no such input. Its inputs: {there}.")
        titles = ", ".join(f"{number} ({title_of(graph, number)})" for number in graph)
        raise WrongArguments(f"--set {setting}: no node has the id or the title {node}. Nodes: {titles}.")
    if len(places) > 1:
        ids = ", ".join(number for number, _ in places)
        raise WrongArguments(f"--set {setting}: {len(places)} nodes are called {node}; say which by its id: {ids}.")
    place = places[0]
    return place, _value(setting, text, graph[place[0]]["inputs"][place[1]])


def _value(setting: str, text: str, now: Any) -> Any:
    if isinstance(now, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(now, list):  # a link: nobody knows here what the input takes
        return value if isinstance(value, (int, float)) else text
    if isinstance(now, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(now):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(now), f"what {now!r} is")
        raise WrongArguments(f"--set {setting}: expected {kind}, as {now!r} is in the workflow; found {text!r}.")
    return value


def title_of(graph: Graph, node: str) -> str:
    return graph[node].get("_meta", {}).get("title") or graph[node]["class_type"]


def nodes_called(graph: Graph, name: str) -> list[str]:
    """The node with this id, else all with this title, else all of this class."""
    if name in graph:
        return [name]
    titled = [node for node in graph if title_of(graph, node) == name]
    return titled or [node for node in graph if graph[node]["class_type"] == name]


def seed_places(graph: Graph) -> list[Place]:
    """Inputs that take a seed, where it is a number and no link."""
    places = [(node, name) for node in graph for name in SEEDS]
    return [(node, name) for node, name in places if type(graph[node]["inputs"].get(name)) is int]


def prompt_places(graph: Graph) -> set[Place]:
    """The inputs that say what is drawn: texts of the node nearest above the positive inputs of samplers and guiders.

    Raises `WrongArguments` where there is none, or where samplers draw different prompts.
    """
    found = [_texts_above(graph, source) for source in _conditionings(graph)]
    different = {frozenset(places) for places in found if places}
    if len(different) == 1:
        return set(next(iter(different)))
    what = "Nothing in the workflow takes a prompt" if not different else "Samplers in the workflow draw different prompts"
    raise WrongArguments(f'{what}: say where it goes with --set "NODE.INPUT={PROMPT}".')


def _conditionings(graph: Graph) -> set[str]:
    """Nodes whose conditioning samplers and guiders are given as the positive one."""
    taken = {
        kind: {node["inputs"][kind][0] for node in graph.values() if _link(node, kind)} for kind in ("conditioning", "negative")
    }
    ends = set()
    for number, node in graph.items():
        if number not in taken["conditioning"] | taken["negative"]:
            ends |= {node["inputs"][name][0] for name in ("positive", "conditioning") if _link(node, name)}
    return ends


def _link(node: dict[str, Any], name: str) -> bool:
    value = node["inputs"].get(name)
    return isinstance(value, list) and len(value) == 2


def _texts_above(graph: Graph, number: str) -> set[Place]:
    waiting = [number]
    for number in waiting:  # grows on the way
        inputs = graph[number]["inputs"] if number in graph else {}
        if texts := {(number, name) for name in TEXTS if name in inputs}:
            return texts
        links = [name for name in inputs if name != "negative" and _link(graph[number], name)]
        waiting += [inputs[name][0] for name in links if inputs[name][0] not in waiting]
    return set()
