"""Load Recording and Internals Report: what was recorded, and a picture of it."""

from __future__ import annotations

from comfy_api.latest import io

from ..analysis.charts import internals_map
from ..analysis.report import internals_figure, internals_table, internals_title, padding_note
from ..recording.recording import Recording
from . import host, inputs


class LoadRecording(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Load Recording (Flux Poke)",
            "A recording that is there already, made by a Record node or by flux-poke record.",
            [inputs.listed("name", host.recording_names(), inputs.NO_RECORDING, "A folder in output/flux_poke.")],
            [inputs.recording_output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def validate_inputs(cls, name=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, name=name)

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        recording = Recording.open(host.output_path(name))
        return recording.digest(*sorted(recording.kinds))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        recording = Recording.open(host.output_path(inputs.chosen(name)))
        text = f"{name}: {', '.join(sorted(recording.kinds))}"
        host.say(cls.hidden.unique_id, text)
        return io.NodeOutput(recording, text)


class InternalsReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Internals Report",
            "Draws what was recorded: how often every neuron fires, and which never or always do.",
            [inputs.recording(), inputs.after_sampler("the report")],
            [io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return float("nan")  # the recording changes while the inputs do not

    @classmethod
    def execute(cls, recording: Recording, after=None) -> io.NodeOutput:
        inputs.require_recorded(recording)
        recorded = recording.internals()
        image, text = host.figure_image(internals_figure(recorded)), internals_table(recorded)
        short = "\n".join(filter(None, [internals_title(recorded), padding_note(recorded)]))
        return io.NodeOutput(image, text, ui=host.shown(cls, short, image, internals_map(recorded)))
