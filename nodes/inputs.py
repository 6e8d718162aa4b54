"""Inputs that several nodes have in common, the types of their own links, and what makes a node run again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..flux.layout import Layout
from ..recording.store import MANIFEST
from ..retrain.files import layer_files
from . import host, loading

PlanType = io.Custom("PRUNING_PLAN")
InternalsType = io.Custom("INTERNALS")

DEFAULT_FILE = "internals.safetensors"
DEFAULT_FOLDER = "hidden_states"


def checkpoint_input() -> io.Input:
    return io.Combo.Input(
        "unet_name",
        options=loading.checkpoint_names(),
        tooltip="The dense FLUX that was recorded.",
    )


def weight_dtype_input() -> io.Input:
    return io.Combo.Input("weight_dtype", options=list(loading.WEIGHT_DTYPES), tooltip="As in Load Diffusion Model.")


def recordings() -> list[io.Input]:
    return [
        io.String.Input(
            "hidden_states",
            default=DEFAULT_FOLDER,
            tooltip="Folder in output/flux_poke that Record Hidden States filled; for the score obs and affine repair.",
        ),
        io.String.Input("file", default=DEFAULT_FILE, tooltip="Internals in output/flux_poke, where nothing is connected."),
        InternalsType.Input("internals", optional=True, tooltip="From Record Internals; or leave open and name the file."),
    ]


def block_ranges() -> list[io.Input]:
    """First and last layers; -1 as the last one stands for the model's last."""
    return [
        io.Int.Input("first_layer", default=0, min=0, max=255, tooltip="First double block that may be cut."),
        io.Int.Input("last_layer", default=-1, min=-1, max=255, tooltip="Last double block that may be cut; -1 = all."),
        io.Int.Input("first_single", default=0, min=0, max=255, tooltip="First single block that may be cut."),
        io.Int.Input("last_single", default=-1, min=-1, max=255, tooltip="Last single block that may be cut; -1 = all."),
    ]


def after_sampler() -> io.Input:
    return io.AnyType.Input(
        "after", optional=True, tooltip="Connect the sampler's latent here, so that the plan waits for the recording."
    )


def chosen_ranges(layout: Layout, first_layer: int, last_layer: int, first_single: int, last_single: int):
    """The ranges of double and of single blocks that the inputs of `block_ranges` stand for."""
    last_double = layout.depth - 1 if last_layer < 0 else last_layer
    return (first_layer, last_double), (first_single, layout.depth_single - 1 if last_single < 0 else last_single)


def files_written(inputs: Mapping[str, Any], own_recording: bool) -> str:
    """When the files were written that a node reads by name, for `fingerprint_inputs`: a name out of another node is None.

    `unet_name` is a checkpoint, `hidden_states` a folder of recordings, `folder` one of retrained layers, `file` a single file.

    With `own_recording`, recordings are made in the same graph: what changes them reaches the node through its links, and
    their files, written after this is asked, must not count, or every recording would make the next run plan again.
    """
    names = {name: value for name, value in inputs.items() if value is not None}
    paths = [Path(loading.checkpoint_path(names["unet_name"]))] if "unet_name" in names else []
    paths += layer_files(host.output_path(names["folder"])).values() if "folder" in names else []
    if not own_recording:
        paths += [host.output_path(names["hidden_states"]) / MANIFEST] if names.get("hidden_states", "").strip() else []
        paths += [host.output_path(names["file"], ".safetensors")] if "file" in names else []
    return str([(path.name, path.stat().st_mtime_ns if path.exists() else None) for path in paths])
