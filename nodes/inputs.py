"""Inputs that several nodes have in common, the types of their own links, and what makes a node run again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..errors import UserError
from ..flux.layout import Layout
from ..recording.recording import Recording
from ..retrain.files import STATS, layer_files
from . import host, loading

PlanType = io.Custom("PRUNING_PLAN")
RecordingType = io.Custom("RECORDING")

#: What a loader offers beside checkpoints, where a plan says which one.
OF_THE_PLAN = "as in the plan"


def model_input() -> io.Input:
    return io.Model.Input("model", tooltip="The FLUX to watch: FLUX.1, FLUX.2 or Chroma. It is not changed.")


def watched_output() -> io.Output:
    return io.Model.Output(display_name="model", tooltip="The same model, watched: connect it to the sampler.")


def checkpoint_input(*others: str, tooltip: str = "The dense FLUX that was recorded.") -> io.Input:
    return io.Combo.Input("unet_name", options=[*others, *loading.checkpoint_names()], tooltip=tooltip)


def weight_dtype_input() -> io.Input:
    return io.Combo.Input("weight_dtype", options=list(loading.WEIGHT_DTYPES), tooltip="As in Load Diffusion Model.")


def plan_input() -> io.Input:
    return PlanType.Input("plan", tooltip="From a Plan Pruning node or Load Plan.")


def recording_input(tooltip: str = "From a Record node or Load Recording.", optional: bool = False) -> io.Input:
    return RecordingType.Input("recording", optional=optional, tooltip=tooltip)


def recording_output(tooltip: str = "What is recorded: for plans, retraining and reports.") -> io.Output:
    return RecordingType.Output(display_name="recording", tooltip=tooltip)


def noise_levels() -> list[io.Input]:
    def level(name: str, default: float, which: str) -> io.Input:
        tooltip = f"Only steps of at {which} this noise level (sigma)."
        return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)

    return [level("sigma_from", 0.0, "least"), level("sigma_to", 1.0, "most")]


def sample_seed() -> io.Input:
    return io.Int.Input("sample_seed", default=0, min=0, max=2**31 - 1, tooltip="Of the steps and tokens that are drawn.")


def counted_tokens() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "ignore_padding",
            default=True,
            tooltip="Leave out padded text and the tokens of reference pictures, where ComfyUI marks them (FLUX.2).",
        ),
        io.Boolean.Input(
            "positive_only",
            default=False,
            tooltip="With CFG above 1: count what the positive prompt does, not the negative one.",
        ),
    ]


def block_ranges() -> list[io.Input]:
    """First and last layers; -1 as the last one stands for the model's last."""
    return [
        io.Int.Input("first_layer", default=0, min=0, max=255, tooltip="First double block that may be cut."),
        io.Int.Input("last_layer", default=-1, min=-1, max=255, tooltip="Last double block that may be cut; -1 = all."),
        io.Int.Input("first_single", default=0, min=0, max=255, tooltip="First single block that may be cut."),
        io.Int.Input("last_single", default=-1, min=-1, max=255, tooltip="Last single block that may be cut; -1 = all."),
    ]


def chosen_ranges(layout: Layout, first_layer: int, last_layer: int, first_single: int, last_single: int) -> dict[str, Any]:
    """The ranges of double and of single blocks that the inputs of `block_ranges` stand for, as requests have them."""
    last_double = layout.depth - 1 if last_layer < 0 else last_layer
    last = layout.depth_single - 1 if last_single < 0 else last_single
    return {"double": (first_layer, last_double), "single_blocks": (first_single, last)}


def after_sampler(what: str = "the plan") -> io.Input:
    return io.AnyType.Input(
        "after",
        optional=True,
        tooltip=f"The sampler's latent, where the recording is made in this graph: {what} waits for it.",
    )


def require_recorded(recording: Recording) -> None:
    """Raises `UserError` where nothing is recorded yet."""
    if not recording.kinds:
        raise UserError(
            f"Nothing is recorded in '{host.name_of(recording.folder)}' yet: run a graph with a Record node first, and where "
            "it is this graph, connect the sampler's latent to 'after'."
        )


def checkpoint_time(unet_name: str | None) -> str:
    """When a checkpoint was written, for `fingerprint_inputs`."""
    return "" if unet_name is None or unet_name == OF_THE_PLAN else times(Path(loading.checkpoint_path(unet_name)))


def layer_times(folder: str | None) -> str:
    """When the layers in a folder were written, for `fingerprint_inputs`; empty where another node names it."""
    return "" if not folder else times(*layer_files(host.output_path(folder)).values())


def missing_layers(name: str | None) -> str:
    """For `fingerprint_inputs`: the layers whose files are gone from a folder of retrained ones, though its list names them.

    Where the plan names the folder, those of all such folders; empty where another node names it.
    """
    if name is None:
        return ""
    folders = [host.output_path(name)] if name.strip() else sorted(host.output_path("retrained_layers").glob("*/"))
    return str([(folder.name, missing) for folder in folders if (missing := _missing(folder))])


def _missing(folder: Path) -> list[int]:
    stats = folder / STATS
    named = re.findall(r"^layer(\d+):", stats.read_text(encoding="utf-8"), re.MULTILINE) if stats.is_file() else []
    return sorted({int(number) for number in named} - layer_files(folder).keys())


def times(*paths: Path) -> str:
    return str([(path.name, path.stat().st_mtime_ns if path.exists() else None) for path in paths])


def recorded_in(graph: Mapping[str, Any]) -> bool:
    """Whether a graph records: what it records reaches other nodes through links alone where they wait for the sampler."""
    return any(str(node.get("class_type", "")).startswith("FluxPokeRecord") for node in graph.values())
