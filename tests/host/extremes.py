"""For each node of the pack a sound graph, as small as can be, and odd values for its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Graph = dict[str, dict[str, Any]]

#: What may come over the API for a number, beside the ends of its own range.
NUMBERS: list[Any] = [
    math.nan, math.inf, -math.inf, "nan", "inf", 1e308, -1e308, 5e-324, 2**31, 2**63, 2**64, -(2**63), 10**400, -1, 0, 1,
    "", "x", None, True, [], {},
]  # fmt: skip
#: What may come for a text: also where it lists steps, layers or sizes, or names a file.
TEXTS: list[Any] = [
    "", " ", "\0", "a\0b", "\ud800", "-1", "nan", "0-20000000", "0-99999999999999999999", "9" * 5000, f"single 0-{'9' * 5000}",
    "every 0", "every 99999999999999999999", "1-0", "0," * 5000, "0x0", "99999x99999", "a" * 300, "a" * 2_000_000, "../x", "/",
    ".", "\n\n", "{}", 0, -1, math.nan, None, {}, True,
]  # fmt: skip
#: The same for a choice out of a list, which may name a file that is yet to be written.
CHOICES: list[Any] = ["", "\0", "\ud800", "../x", "/", "a" * 300, "a" * 2_000_000, 0, math.nan, None, {}]

#: What the graphs below record, and the plan, layers and file that are made of it.
NAME = "extremes"
LORA = "extremes-lora.safetensors"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def ours(kind: str, **inputs: Any) -> dict[str, Any]:
    return node(f"FluxPoke{kind}", **inputs)


def sampled(**nodes: dict[str, Any]) -> Graph:
    """A run of two steps with the model that the node `x` gives."""
    sampler = node(
        "KSampler", model=["x", 0], positive=["text", 0], negative=["zero", 0], latent_image=["empty", 0], seed=1, steps=2,
        cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    return {
        "model": ours("LoadTinyFlux"),
        "text": node("CLIPTextEncode", clip=["model", 1], text="a 3"),
        "zero": node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        **nodes,
        "sampled": sampler,
        "end": node("PreviewAny", source=["sampled", 0]),
    }


def recorder(kind: str, **inputs: Any) -> Graph:
    return sampled(x=ours(kind, model=["model", 0], name=f"{NAME}_{kind}", **inputs))


def shown(**nodes: dict[str, Any]) -> Graph:
    """What the node `x` gives, looked at."""
    return {**nodes, "end": node("PreviewAny", source=["x", 0])}


def planner(kind: str, **inputs: Any) -> Graph:
    return {"recorded": RECORDED, "x": ours(kind, recording=["recorded", 0], save_as=f"{NAME}_{kind}", **inputs)}


PLAN, RECORDED = ours("LoadPlan", file=NAME), ours("LoadRecording", name=NAME)
PRUNED = ours("LoadPrunedCheckpoint", unet_name=f"{NAME}.safetensors")
CALIBRATE = ours("Calibrate", model=["model", 0], clip=["model", 1], name=NAME, number=16, width=64, height=64, steps=4)
PICTURE = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
TAPS = ours("TapBlocks", model=["model", 0], blocks="single 0", at_steps="0")
TRAINED = ours("RetrainLayers", plan=["plan", 0], layers="0", train_on="rows", steps=1, batch=1, folder=f"{NAME}_layers")
SAVED = ours("SavePrunedFlux", plan_or_model=["plan", 0], repair="none", save_as=NAME)
COUNTED = {"img_cut": 64, "txt_cut": 64, "single_cut": 64, "score": "frequency"}

FOUND = {"model": ours("LoadTinyFlux"), "recorded": RECORDED}
FIND = ours(
    "FindNeurons", model=["model", 0], with_it=["recorded", 0], without=["recorded", 0], save_as=f"{NAME}_neurons",
    spare_others=0.0,
)  # fmt: skip
NEURONS = ours("LoadNeurons", file=f"{NAME}_neurons")
WORDS = {"positive": ["text", 0], "negative": ["zero", 0], "latent_image": ["empty", 0]}

#: What the graphs build on: a recording, a plan, layers, a pruned file and previews.
BEFORE: list[Graph] = [
    shown(model=ours("LoadTinyFlux"), x=CALIBRATE),
    {"recorded": RECORDED, "x": ours("PlanByCount", recording=["recorded", 0], save_as=NAME, **COUNTED)},
    {"plan": PLAN, "x": TRAINED, "y": SAVED},
    sampled(x=ours("RecordAtlas", model=["model", 0], name=NAME)),
    {**FOUND, "x": FIND},
]
#: By class, a graph in which `x` is a node of it. What they do not say is as the node has it by itself.
GRAPHS: dict[str, Graph] = {
    "LoadTinyFlux": sampled(x=ours("LoadTinyFlux")),
    "Record": recorder("Record", rows=4, steps=1, probe_steps=0),
    "RecordInternals": recorder("RecordInternals"),
    "RecordBlockStates": recorder("RecordBlockStates", blocks="0"),
    "RecordTrajectories": recorder("RecordTrajectories"),
    "RecordLensRows": recorder("RecordLensRows", rows=4),
    "RecordOptions": sampled(
        x=ours("RecordOptions"),
        recorder=ours("Record", model=["model", 0], name=f"{NAME}_options", rows=4, probe_steps=0, options=["x", 0]),
    ),
    "TapBlocks": sampled(x=TAPS),
    "DecodeBlockPreviews": sampled(
        taps=TAPS,
        x=ours("DecodeBlockPreviews", block_taps=["taps", 1], vae=["model", 2], after=["sampled", 0], largest=64),
    ),
    "AnimateBlockPreviews": shown(x=ours("AnimateBlockPreviews", folder=NAME)),
    "Calibrate": shown(model=ours("LoadTinyFlux"), x=CALIBRATE),
    "LoadRecording": shown(x=RECORDED),
    "InternalsReport": shown(recorded=RECORDED, x=ours("InternalsReport", recording=["recorded", 0])),
    "PlanByCount": planner("PlanByCount", **COUNTED),
    "PlanByThreshold": planner("PlanByThreshold"),
    "PlanByBudget": planner("PlanByBudget", budget="share of the neurons", amount=0.25, touch="neurons"),
    "LoadPlan": shown(x=PLAN),
    "LoadPrunedFlux": shown(plan=PLAN, x=ours("LoadPrunedFlux", plan=["plan", 0], repair="none")),
    "SavePrunedFlux": {"plan": PLAN, "x": SAVED},
    "LoadPrunedCheckpoint": shown(x=PRUNED),
    "LoadPrunedLora": shown(file=PRUNED, x=ours("LoadPrunedLora", model=["file", 0], lora_name=LORA)),
    "RetrainLayers": {"plan": PLAN, "x": TRAINED},
    "LoadReplacedFlux": shown(plan=PLAN, x=ours("LoadReplacedFlux", plan=["plan", 0], folder=f"{NAME}_layers")),
    "ChooseModel": shown(model=ours("LoadTinyFlux"), x=ours("ChooseModel", normal=["model", 0])),
    "Compare": {"picture": PICTURE, "x": ours("Compare", reference=["picture", 0], variant=["picture", 0])},
    "OnOff": shown(x=ours("OnOff", value=["model", 0], on=True), model=ours("LoadTinyFlux")),
    "RecordAtlas": recorder("RecordAtlas", blocks="single 0"),
    "ShowNeurons": shown(recorded=RECORDED, x=ours("ShowNeurons", recording=["recorded", 0], count=2, places=2)),
    "FindNeurons": {**FOUND, "x": FIND},
    "LoadNeurons": shown(x=NEURONS),
    "PokeNeurons": sampled(neurons=NEURONS, x=ours("PokeNeurons", model=["model", 0], neurons=["neurons", 0])),
    "PokeBlocks": sampled(x=ours("PokeBlocks", model=["model", 0])),
    "Sweep": {
        **{name: part for name, part in sampled().items() if name not in ("sampled", "end")},
        "x": ours("Sweep", model=["model", 0], vae=["model", 2], steps=1, blocks="single 0", **WORDS),
    },
    "FluxTimer": shown(x=ours("FluxTimer")),
    "Prompts": shown(x=ours("Prompts", index=0)),
    "Counter": shown(x=ours("Counter", name=NAME)),
    "RandomInt": shown(x=ours("RandomInt")),
    "RandomSize": shown(x=ours("RandomSize")),
    "QueueLimit": shown(x=ours("QueueLimit", value="a", name=NAME)),
}
# the models of two are behind another node
GRAPHS["RecordOptions"]["sampled"] = node(
    "KSampler", **{**GRAPHS["RecordOptions"]["sampled"]["inputs"], "model": ["recorder", 0]}
)
GRAPHS["DecodeBlockPreviews"]["sampled"] = node(
    "KSampler", **{**GRAPHS["DecodeBlockPreviews"]["sampled"]["inputs"], "model": ["taps", 0]}
)


def inputs_of(info: Mapping[str, Any], kind: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What a node takes that is no link: type (a list: choices), and options, by name; `info` is what /object_info says."""
    given = info[kind]["input"]
    found = {**given.get("required", {}), **given.get("optional", {})}
    return {
        name: (described[0], described[1] if len(described) > 1 else {})
        for name, described in found.items()
        if isinstance(described[0], list) or described[0] in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
    }


def filled(graph: Graph, info: Mapping[str, Any]) -> Graph:
    """The graph with what its nodes have by themselves."""
    return {name: {**part, "inputs": {**defaults(info, part["class_type"]), **part["inputs"]}} for name, part in graph.items()}


def defaults(info: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found = {}
    for name, (type_, options) in inputs_of(info, kind).items():
        choices = type_ if isinstance(type_, list) else options.get("options") or [""]
        found[name] = options["default"] if options.get("default") is not None else choices[0]
    return found


def odd_values(type_: Any, options: Mapping[str, Any]) -> list[Any]:
    """What an input of this type is given: of its own range, the ends and what lies just beyond."""
    if type_ == "BOOLEAN":  # ComfyUI makes one of anything
        return []
    if type_ in ("INT", "FLOAT"):
        ends = [options[end] for end in ("min", "max") if end in options]
        return [*NUMBERS, *ends, *(end + step for end in ends for step in (-1, 1))]
    return TEXTS if type_ == "STRING" else CHOICES
