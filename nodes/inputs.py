"""What nodes are declared with: inputs, the types of their own links, and what makes a node run again.

schema(Counter, "Counter", "One more each run.", [whole("max", 0, 0, 99, "The last.")], [io.Int.Output()])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from comfy_execution.validation import validate_node_input

from ..errors import UserError
from ..flux.layout import Layout
from ..recording.recording import Recording
from ..retrain.files import STATS, layer_files
from . import host, lists, loading
from .search import FOUND

PlanType = io.Custom("PRUNING_PLAN")
RecordingType = io.Custom("RECORDING")
#: Of the name of a file or folder: where it goes in, names are chosen from a list.
NameType = io.Custom("COMBO,STRING")

#: What a loader offers beside checkpoints, where a plan says which one.
OF_THE_PLAN = "as in the plan"
#: What a node is told of the run.
HIDDEN = (io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo)
MOST_SEED = 2**31 - 1
#: What this ComfyUI's schemas can say of a node: older ones know no `search_aliases`.
SCHEMA_FIELDS = {field.name for field in fields(io.Schema)}
#: What lists say where there is nothing to choose yet, in as many letters as a node has room for, and what writes it.
NO_RECORDING, NO_PLAN = "none yet: run Record", "none yet: run a Plan"
NO_PREVIEWS, NO_PRUNED, NO_NEURONS = "none yet: run Decode", "none yet: run Save", "none yet: run Find"
WRITTEN_BY = {
    NO_RECORDING: "a Record node",
    NO_PLAN: "a Plan Pruning node",
    NO_PREVIEWS: "Decode Block Previews",
    NO_PRUNED: "Save Pruned FLUX",
    NO_NEURONS: "Find Neurons",
}


def schema(
    node: type[io.ComfyNode],
    display_name: str,
    description: str,
    inputs: Sequence[io.Input],
    outputs: Sequence[io.Output],
    is_output_node: bool = False,
    hidden: Sequence[io.Hidden] = HIDDEN,
) -> io.Schema:
    """What a node is; its id, which never changes once released, is "FluxPoke" and the name of its class."""
    name = node.__name__.removesuffix("Clone")  # ComfyUI calls copies of the class
    category, words = FOUND[name]
    return io.Schema(
        node_id=f"FluxPoke{name}",
        display_name=display_name,
        category=category,
        description=description,
        inputs=[*inputs],
        outputs=[*outputs],
        hidden=[*hidden],
        is_output_node=is_output_node,
        **({"search_aliases": [*words]} if "search_aliases" in SCHEMA_FIELDS else {}),
    )


def whole(name: str, default: int, least: int, most: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=most, tooltip=tooltip)


def number(name: str, default: float, least: float, most: float, step: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=least, max=most, step=step, round=1e-6, tooltip=tooltip)


def text(name: str, default: str, tooltip: str) -> io.Input:
    return io.String.Input(name, default=default, tooltip=tooltip)


def switch(name: str, default: bool, tooltip: str) -> io.Input:
    return io.Boolean.Input(name, default=default, tooltip=tooltip)


def choice(name: str, options: Sequence[str], tooltip: str, default: str | None = None) -> io.Input:
    return io.Combo.Input(name, options=[*options], default=default, tooltip=tooltip)


def advanced(*entries: io.Input) -> list[io.Input]:
    """Inputs that the page shows where all of a node's are asked for. Older inputs have no word for it: it is passed on."""
    for entry in entries:
        entry.extra_dict["advanced"] = True
    return [*entries]


def listed(name: str, names: Sequence[str], nothing: str, tooltip: str) -> io.Input:
    """A file or folder that is chosen from those that are there. `valid_names` lets others through: a graph may name what it
    has yet to write."""
    return choice(name, names or [nothing], tooltip)


def valid_names(node: type[io.ComfyNode], received: Mapping[str, str] | None, **names: Any) -> bool | str:
    """What `validate_inputs` says of `names`, and of what is linked, by its types.

    It declares the names, so that ComfyUI does not look them up in their lists, and `input_types`, so that texts may be linked
    to them; ComfyUI then leaves all links of the node to it.
    """
    types = {entry.id: entry.get_io_type() for entry in node.define_schema().inputs}
    for name, kind in (received or {}).items():
        if not validate_node_input(kind, f"{types[name]},STRING" if name in names else types[name]):
            return f"{name} is linked to {kind}: expected {types[name]}"
    for name, value in names.items():
        if value is not None and not isinstance(value, str):  # nothing is known yet of what is linked
            return f"{name} is {value!r}: expected a name"
    return True


def chosen(name: str) -> str:
    """`name`; raises `UserError` where it is what a list says that is empty."""
    if name in WRITTEN_BY:
        raise UserError(
            f"Nothing is chosen, as nothing was there yet: run {WRITTEN_BY[name]}, press R to read the lists anew, and choose."
        )
    return name


def unless_of_the_plan(name: str) -> str:
    """`name`; empty where it is for the plan to say."""
    return "" if name == OF_THE_PLAN else name.strip()


def model() -> io.Input:
    return io.Model.Input("model", tooltip="The FLUX to watch: FLUX.1, FLUX.2 or Chroma. It is not changed.")


def watched_output() -> io.Output:
    return io.Model.Output(display_name="model", tooltip="The same model, watched: connect it to the sampler.")


def checkpoint(*others: str, tooltip: str = "The dense FLUX that was recorded.") -> io.Input:
    return choice("unet_name", [*others, *lists.dense_names()], tooltip)


def weight_dtype() -> io.Input:
    return advanced(choice("weight_dtype", loading.WEIGHT_DTYPES, "As in Load Diffusion Model."))[0]


def plan() -> io.Input:
    return PlanType.Input("plan", tooltip="From a Plan Pruning node or Load Plan.")


def recording(tooltip: str = "From Calibrate, a Record node or Load Recording.", optional: bool = False) -> io.Input:
    return RecordingType.Input("recording", optional=optional, tooltip=tooltip)


def recording_output() -> io.Output:
    return RecordingType.Output(display_name="recording", tooltip="What is recorded: for plans, retraining and reports.")


def noise_levels() -> list[io.Input]:
    return advanced(
        number("sigma_from", 0.0, 0.0, 1.0, 0.01, "Only steps of at least this noise level (sigma)."),
        number("sigma_to", 1.0, 0.0, 1.0, 0.01, "Only steps of at most this noise level (sigma)."),
    )


def random_seed(tooltip: str) -> io.Input:
    """One that the page draws anew after every run, unless it is told not to."""
    return io.Int.Input("seed", default=0, min=0, max=2**53 - 1, optional=True, control_after_generate=True, tooltip=tooltip)


def sample_seed() -> io.Input:
    return advanced(whole("sample_seed", 0, 0, MOST_SEED, "Of the steps and tokens that are drawn."))[0]


def counted_tokens() -> list[io.Input]:
    padding = "Leave out tokens of reference pictures, and padding of the text where ComfyUI tells of it (FLUX.2)."
    positive = "With CFG above 1: count what the positive prompt does, not the negative one."
    return advanced(switch("ignore_padding", True, padding), switch("positive_only", False, positive))


def block_ranges() -> list[io.Input]:
    """First and last layers; -1 as the last one stands for the model's last."""
    return advanced(
        whole("first_layer", 0, 0, 255, "First double block that may be cut."),
        whole("last_layer", -1, -1, 255, "Last double block that may be cut; -1 = all."),
        whole("first_single", 0, 0, 255, "First single block that may be cut."),
        whole("last_single", -1, -1, 255, "Last single block that may be cut; -1 = all."),
    )


def chosen_ranges(layout: Layout, first_layer: int, last_layer: int, first_single: int, last_single: int) -> dict[str, Any]:
    """The ranges of double and of single blocks that the inputs of `block_ranges` stand for, as requests have them."""
    last_double = layout.depth - 1 if last_layer < 0 else last_layer
    last = layout.depth_single - 1 if last_single < 0 else last_single
    return {"double": (first_layer, last_double), "single_blocks": (first_single, last)}


def after_sampler(what: str = "the plan") -> io.Input:
    tooltip = f"The sampler's latent, where the recording is made in this graph: {what} waits for it."
    return io.AnyType.Input("after", optional=True, tooltip=tooltip)


def require_recorded(recording: Recording) -> None:
    """Raises `UserError` where nothing is recorded yet."""
    if not recording.kinds:
        raise UserError(
            f"Nothing is recorded in '{host.name_of(recording.folder)}' yet: run a graph with a Record node first (Record, or "
            "Record Internals for plans by count), and where it is this graph, connect the sampler's latent to 'after'."
        )


def checkpoint_time(unet_name: str | None) -> str:
    """When a checkpoint was written, for `fingerprint_inputs`; empty where another node or a plan names it."""
    return "" if unet_name in (None, OF_THE_PLAN) else times(Path(loading.checkpoint_path(unet_name)))


def missing_layers(name: str | None) -> str:
    """For `fingerprint_inputs`: the layers whose files are gone from a folder of retrained ones, though its list names them.

    Where the plan names the folder, those of all such folders; empty where another node names it.
    """
    if name is None:
        return ""
    missing = []
    for folder in [host.output_path(name)] if name.strip() else sorted(host.output_path("retrained_layers").glob("*/")):
        stats = folder / STATS
        named = re.findall(r"^layer(\d+):", stats.read_text(encoding="utf-8"), re.MULTILINE) if stats.is_file() else []
        missing.append((folder.name, sorted({int(number) for number in named} - layer_files(folder).keys())))
    return str([one for one in missing if one[1]])


def times(*paths: Path) -> str:
    """When files were written, for `fingerprint_inputs`."""
    return str([(path.name, path.stat().st_mtime_ns if path.exists() else None) for path in paths])


def recorded_in(graph: Mapping[str, Any]) -> bool:
    """Whether a graph records: what it records reaches other nodes through links alone where they wait for the sampler."""
    return any(str(node.get("class_type", "")).startswith("FluxPokeRecord") for node in graph.values())
