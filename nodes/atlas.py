"""Show Neurons: the places where neurons of an atlas were strongest."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io, ui

from ..analysis.atlas_sheet import MOST, named_neurons, neurons_sheet, strongest_neurons
from ..analysis.written import Writer, written_pictures
from ..poking.neurons import Neurons
from ..recording.atlas import PLACES, Atlas
from ..recording.manifest import require_model
from ..recording.recording import Recording
from . import host, inputs
from .models import MergedWeights, flux_layout, model_fingerprint
from .poking import NeuronsType


class ShowNeurons(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = "Which ones, such as 'double-img-3:1207, single-2:77'; empty: the strongest."
        given = "From Find Neurons or Load Neurons: those of the largest effect, where no names are written."
        model = "The FLUX that was recorded: with its vae, also shows what each neuron writes by itself."
        vae = "The model's autoencoder, to show what neurons write."
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
                io.Model.Input("model", optional=True, tooltip=model),
                io.Vae.Input("vae", optional=True, tooltip=vae),
            ],
            [io.Image.Output(display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, recording: Recording | None, **others) -> str:
        return "" if recording is None else inputs.times(recording.atlas_file)

    @classmethod
    def execute(
        cls, recording: Recording, names: str, count: int, places: int, neurons: Neurons | None = None, after=None, model=None,
        vae=None,
    ) -> io.NodeOutput:  # fmt: skip
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
        written = None if model is None or vae is None else _written(recording, atlas, chosen, model, vae)
        image = host.to_images([neurons_sheet(recording, atlas, chosen, places, written)])
        said = host.said(cls, f"{len(chosen)} of {sum(len(site.value) for site in atlas.sites.values()):,} neurons")
        return io.NodeOutput(image, ui={**ui.PreviewImage(image, cls=cls).as_dict(), **said})


def _written(recording: Recording, atlas: Atlas, neurons: Sequence[tuple[str, int]], model, vae):
    """What each of `neurons` writes, as pictures; None where that cannot be told of the MODEL."""
    require_model(atlas.fingerprint, model_fingerprint(model), host.name_of(recording.folder), "this model")
    writer = Writer.of(MergedWeights(model), flux_layout(model))
    to_autoencoder, decode = model.get_model_object("latent_format").process_out, host.decoder(vae)
    return writer and written_pictures(writer, lambda latents: decode(to_autoencoder(latents)), atlas, neurons)
