"""Record Options: what Record does not ask for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from comfy_api.latest import io

from . import host
from .inputs import counted_tokens, noise_levels, sample_seed

RecordOptionsType = io.Custom("RECORD_OPTIONS")


@dataclass(frozen=True)
class RecordOptions:
    """Which MLPs and noise levels rows are kept of, what happens at max_gb, and which tokens are counted."""

    streams: tuple[str, ...] = ("img", "txt", "single")
    sigmas: tuple[float, float] = (0.0, 1.0)
    when_full: Literal["thin", "stop"] = "thin"
    ignore_padding: bool = True
    positive_only: bool = False
    sample_seed: int = 0


class RecordOptionsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordOptions",
            display_name="Record Options",
            category=host.CATEGORY,
            description="What else may be chosen for Record: which MLPs and noise levels, and which tokens count.",
            inputs=[
                io.Combo.Input(
                    "streams",
                    options=["all", "img", "txt", "single"],
                    tooltip="Of which MLPs rows are kept: image, text, single blocks.",
                ),
                *noise_levels(),
                io.Combo.Input(
                    "when_full",
                    options=["thin", "stop"],
                    tooltip="At max_gb: halve every image's share while enough rows for a plan are left, or take no more.",
                ),
                *counted_tokens(),
                sample_seed(),
            ],
            outputs=[RecordOptionsType.Output(display_name="options", tooltip="For Record.")],
        )

    @classmethod
    def execute(cls, streams, sigma_from, sigma_to, when_full, ignore_padding, positive_only, sample_seed) -> io.NodeOutput:
        chosen = ("img", "txt", "single") if streams == "all" else (streams,)
        return io.NodeOutput(
            RecordOptions(chosen, (sigma_from, sigma_to), when_full, ignore_padding, positive_only, sample_seed)
        )
