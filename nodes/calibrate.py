"""Calibrate: everything that a plan needs to know of a model, recorded by one node that draws the prompts itself."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..prompts import read_prompts
from ..recording.calibration import asked_images, missing_images
from . import host, inputs
from .calibrating import TOKEN, Drawer, calibrate
from .prompts import file_input, prompt_file
from .record import RecordNode


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = "Prompts in place of the file's, one per line. Empty = those of the file."
        number = (
            "How many images: of the first prompts, one each; over and over where there are fewer. More of them later add "
            "only what is new."
        )
        guidance = "As in FluxGuidance, for models that take it (FLUX.1-dev, FLUX.2-dev)."
        disk = "Disk space that samples may take, in GB; with less, fewer are kept."
        return inputs.schema(
            cls,
            "Calibrate (Flux Poke)",
            "Draws prompts and records all that a plan needs on the way, in one run: how often every MLP neuron fires, samples "
            "of what every layer reads, and how much an error in each layer moves the picture. Images that are in the "
            "recording are not drawn again.",
            [
                io.Model.Input("model", tooltip="The dense FLUX: FLUX.1, FLUX.2 or Chroma. It is not changed."),
                io.Clip.Input("clip", tooltip="The model's own text encoder."),
                inputs.text("name", "calibration", "Folder in output/flux_poke, which is added to."),
                file_input(),
                io.String.Input("own_prompts", default="", multiline=True, tooltip=own),
                inputs.whole("number", 60, 2, 100_000, number),
                io.Int.Input("width", default=1024, min=TOKEN, max=16384, step=TOKEN, tooltip="Of the images, in pixels."),
                io.Int.Input("height", default=1024, min=TOKEN, max=16384, step=TOKEN, tooltip="Of the images, in pixels."),
                inputs.whole("steps", 20, 2, 1000, "Euler steps of each image, with the scheduler simple."),
                inputs.number("guidance", 3.5, 0.0, 100.0, 0.1, guidance),
                *inputs.advanced(
                    inputs.whole("first_seed", 0, 0, inputs.MOST_SEED, "Noise of the first image; each image takes the next."),
                    inputs.number("max_gb", 64.0, 0.001, 100_000.0, 0.1, disk),
                ),
            ],
            [inputs.recording_output()],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, own_prompts: str | None = None, **_: Any) -> str:
        """Not what is recorded: what this node records itself is no reason to plan and save everything once more."""
        return "" if file is None or (own_prompts or "").strip() else inputs.times(prompt_file(file))

    @classmethod
    def execute(
        cls, model, clip, name, file, own_prompts, number, width, height, steps, guidance, first_seed, max_gb
    ) -> io.NodeOutput:
        where, node_id = RecordNode.target(model, name, None), cls.hidden.unique_id
        where.recording.check_writable(where.fingerprint, "the MODEL", internals=True)
        prompts = [line.strip() for line in own_prompts.splitlines() if line.strip()] or read_prompts(prompt_file(file))
        draw = Drawer(model, clip, where.layout, width, height, steps, guidance if where.layout.guidance else None)
        asked = asked_images(prompts, number, first_seed, draw.settings)
        missing = missing_images(where.recording, asked)
        text = f"All {number} images are in {host.name_of(where.recording.folder)}: nothing is drawn."
        if missing:
            text = calibrate(draw, where, asked, missing, max_gb, host.graph_metadata(cls.hidden), node_id)
        host.say(node_id, text)
        return io.NodeOutput(where.recording)
