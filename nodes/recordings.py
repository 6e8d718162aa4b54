"""Load Recording and Internals Report: what was recorded, and a picture of it."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..analysis.report import figure_pixels, internals_figure, internals_table, internals_title
from ..recording.recording import Recording
from . import host
from .inputs import after_sampler, recording_input, recording_output, require_recorded


class LoadRecording(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadRecording",
            display_name="Load Recording",
            category=host.CATEGORY,
            description="A recording that is there already, made by a Record node or by `flux-poke record`.",
            inputs=[io.Combo.Input("name", options=host.recording_names(), tooltip="A folder in output/flux_poke.")],
            outputs=[recording_output(), io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        recording = Recording.open(host.output_path(name))
        return recording.digest(*sorted(recording.kinds))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        recording = Recording.open(host.output_path(name))
        text = f"{name}: {', '.join(sorted(recording.kinds))}"
        host.say(cls.hidden.unique_id, text)
        return io.NodeOutput(recording, text)


class InternalsReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeInternalsReport",
            display_name="Internals Report",
            category=host.CATEGORY,
            description="Draws what was recorded: how often every neuron fires, and which never or always do.",
            is_output_node=True,
            inputs=[recording_input(), after_sampler("the report")],
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return float("nan")  # the recording changes while the inputs do not

    @classmethod
    def execute(cls, recording: Recording, after=None) -> io.NodeOutput:
        require_recorded(recording)
        recorded = recording.internals()
        image, text = host.to_image(figure_pixels(internals_figure(recorded))), internals_table(recorded)
        host.say(cls.hidden.unique_id, internals_title(recorded))
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))
