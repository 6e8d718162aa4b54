"""Show Neurons: the places where neurons of an atlas were strongest."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..analysis.atlas_sheet import MOST, named_neurons, neurons_sheet, strongest_neurons
from ..poking.neurons import Neurons
from ..recording.atlas import PLACES
from ..recording.recording import Recording
from . import host, inputs
from .poking import NeuronsType


class ShowNeurons(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = "Which ones, such as 'double-img-3:1207, single-2:77'; empty: the strongest."
        given = "From Find Neurons or Load Neurons: those of the largest effect, where no names are written."
        return inputs.schema(
            cls,
            "Show Neurons",
            "Draws neurons of an atlas: a row for each, with the parts of the pictures around the tokens where it was "
            "strongest.",
            [
                inputs.recording("With an atlas: from Record Atlas or Load Recording."),
                inputs.text("names", "", names),
                inputs.whole("count", 12, 1, MOST, "How many, where they are not named."),
                inputs.whole("places", 8, 1, PLACES, "Pictures of each neuron."),
                NeuronsType.Input("neurons", optional=True, tooltip=given),
                inputs.after_sampler("the sheet"),
            ],
            [io.Image.Output(display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, recording: Recording | None, **others) -> str:
        return "" if recording is None else inputs.times(recording.atlas_file)

    @classmethod
    def execute(
        cls, recording: Recording, names: str, count: int, places: int, neurons: Neurons | None = None, after=None
    ) -> io.NodeOutput:
        atlas = recording.atlas()
        if neurons is not None:
            neurons.require(atlas.fingerprint, "the recording's")
        if names.strip():
            chosen = named_neurons(names, atlas)
        elif neurons is not None:
            found = [(name, index) for name, index, _ in neurons.strongest(neurons.count) if name in atlas.sites]
            chosen = found[:count]
        else:
            chosen = strongest_neurons(atlas, count)
        image = host.to_images([neurons_sheet(recording, atlas, chosen, places)])
        said = host.said(cls, f"{len(chosen)} of {sum(len(site.value) for site in atlas.sites.values()):,} neurons")
        return io.NodeOutput(image, ui={**ui.PreviewImage(image, cls=cls).as_dict(), **said})
