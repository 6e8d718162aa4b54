"""Find Neurons, Load Neurons, Poke Neurons and Poke Blocks: the neurons of a concept, and what a FLUX draws with them, or with
whole blocks, turned down or up."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io, ui
from torch import Tensor

from ..files import check_replaces
from ..flux.layout import Layout, select_sites
from ..poking.find import SPARE, Search, find
from ..poking.neurons import FORMAT, Neurons
from ..poking.picture import neurons_figure
from ..poking.poke import BlockPoke, Moment, Poke, Where, poking, require_widths
from ..recording.recording import Recording
from . import host, inputs, lists
from .models import MergedWeights, flux_layout, model_fingerprint
from .pruned import PRUNED, PrunedModel

NeuronsType = io.Custom("NEURONS")

#: What pokes are filed under in a MODEL.
KEY = "flux_poke.poke"
#: What a neuron is turned about, by what the node calls it.
ABOUT: dict[str, float | None] = {"mean of the others": None, "zero": 0.0}


@dataclass(frozen=True)
class Poked:
    """The wrapper of a clone: `pokes` one after the other, in every call of the model, also in passes of guidance."""

    layout: Layout
    pokes: tuple[Poke | BlockPoke, ...]

    def model_call(self, executor, *args, **kwargs):
        given = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        x, sigma, context = (given[name] for name in ("x", "t", "c_crossattn"))
        parts = (given.get("transformer_options") or {}).get("cond_or_uncond") or [0]
        negative = [part != 0 for part in parts for _ in range(len(x) // len(parts))]
        moment = Moment.at(self.layout, x, sigma, context, negative)
        with poking(executor.class_obj.diffusion_model, self.layout, self.pokes, moment):
            return executor(*args, **kwargs)


def poked_clone(model: ModelPatcher, poke: Poke | BlockPoke) -> ModelPatcher:
    """A clone of MODEL that is poked whenever it is called, after what it is poked by already; `model` itself is left alone.

    Raises `UserError` where neurons are of another model.
    """
    layout = flux_layout(model)
    if isinstance(poke, Poke):
        poke = replace(poke, kept=_kept(model, poke.neurons, layout))
    earlier = [one.__self__ for one in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)]
    pokes = (*(before for one in earlier for before in one.pokes), poke)
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, Poked(layout, pokes).model_call)
    return clone


def _kept(model: ModelPatcher, neurons: Neurons, layout: Layout) -> Mapping[str, Tensor]:
    """Which of the dense model's neurons a pruned MODEL has left, by site; empty where it is the neurons' own model."""
    pruned: PrunedModel | None = model.get_attachment(PRUNED)
    if pruned is not None and (kept := neurons.kept_by(pruned.plan)) is not None:
        return kept
    neurons.require(model_fingerprint(model), "the one that is connected")
    require_widths(neurons, layout)
    return {}


class FindNeurons(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        share = "At most this share of all neurons, in percent."
        spare = "How much more a change of other pictures counts than one of the concept; 0 = not at all. More finds fewer."
        common = "Neurons that are not to be among them, as of another concept."
        second = "Other pictures without the concept: tells how many neurons chance would give."
        return inputs.schema(
            cls,
            "Find Neurons",
            "Finds the neurons of a concept: those that differ most between pictures with it and pictures without, and least "
            "among the others.",
            [
                _model("The FLUX that was recorded. It is not changed."),
                inputs.RecordingType.Input("with_it", tooltip="Internals of pictures with the concept, as from Calibrate."),
                inputs.RecordingType.Input("without", tooltip="Internals of as many pictures, or more, without it."),
                inputs.text("save_as", "neurons", "Name in output/flux_poke, as .safetensors."),
                inputs.number("percent", 2.0, 0.0001, 100.0, 0.1, share),
                inputs.choice("streams", ["all", "img", "txt", "single"], "In which MLPs: image, text, single blocks."),
                *inputs.advanced(inputs.number("spare_others", SPARE, 0.0, 1000.0, 0.5, spare)),
                inputs.RecordingType.Input("without_2", optional=True, tooltip=second),
                NeuronsType.Input("leave_out", optional=True, tooltip=common),
                inputs.after_sampler("the search"),
            ],
            [
                NeuronsType.Output(display_name="neurons", tooltip="For Poke Neurons."),
                inputs.NameType.Output(display_name="file", tooltip="For Load Neurons."),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="image"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        with_it: Recording,
        without: Recording,
        save_as,
        percent,
        streams,
        spare_others,
        without_2=None,
        leave_out: Neurons | None = None,
        after=None,
    ) -> io.NodeOutput:
        path = host.output_path(save_as, ".safetensors")
        check_replaces(path, FORMAT)
        recordings = [one for one in (with_it, without, without_2) if one is not None]
        for one in recordings:
            inputs.require_recorded(one)
        layout = flux_layout(model)
        recorded = [one.internals() for one in recordings]
        for internals in recorded:
            internals.require_sums("finding neurons")
            internals.require(model_fingerprint(model), {site.name: site.width for site in layout.sites}, "the model")
        sites = None if streams == "all" else select_sites(layout, streams=(streams,))
        what = Search(share=percent / 100, sites=sites, spare=spare_others)
        compared = f"{with_it.name} against {' and '.join(one.name for one in recordings[1:])}"
        found = find(MergedWeights(model), layout, recorded[:1], recorded[1:], what, compared)
        found = found if leave_out is None else found.subtract(leave_out)
        found.save(path, host.graph_metadata(cls.hidden))
        image = host.figure_image(neurons_figure(found))
        seen = {**ui.PreviewImage(image, cls=cls).as_dict(), **host.said(cls, found.totals())}
        return io.NodeOutput(found, host.name_of(path), found.table(), image, ui=seen)


class LoadNeurons(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Load Neurons",
            "Neurons that were found already, by Find Neurons or by flux-poke neurons find.",
            [inputs.listed("file", lists.named_files(FORMAT), inputs.NO_NEURONS, "A file in output/flux_poke.")],
            [
                NeuronsType.Output(display_name="neurons"),
                io.String.Output(display_name="text"),
                io.Float.Output(
                    display_name="factor",
                    tooltip="That erases the concept, where that was worked out; else -1, or 0 of neurons that were learned.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, file=file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return inputs.times(host.output_path(file, ".safetensors"))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        found = Neurons.load(host.output_path(inputs.chosen(file), ".safetensors"))
        host.say(cls.hidden.unique_id, found.totals())
        return io.NodeOutput(found, found.table(), found.own_factor)


class PokeNeurons(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        factor = "0 puts the mean of the others, -1 mirrors (often erases), 1 changes nothing, 2 boosts."
        about = "mean of the others: as the formula. zero: neurons are scaled; with factor 0 they are cut."
        return inputs.schema(
            cls,
            "Poke Neurons",
            "Turns chosen neurons down or up while the model draws: each becomes mean + factor (value - mean). "
            "TorchCompileModel has no effect on a model that is poked.",
            [
                _model(),
                NeuronsType.Input("neurons", tooltip="From Find Neurons or Load Neurons."),
                inputs.number("factor", -1.0, -100.0, 100.0, 0.1, factor),
                inputs.choice("about", [*ABOUT], about),
                *where_inputs(),
            ],
            [poked_output()],
        )

    @classmethod
    def execute(cls, model, neurons: Neurons, factor, about, sigma_from, sigma_to, positive_only, mask=None) -> io.NodeOutput:
        where = chosen_where(sigma_from, sigma_to, positive_only, mask)
        return io.NodeOutput(poked_clone(model, Poke(neurons, factor, ABOUT[about], where)))


class PokeBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        blocks = '"all", or a list such as "double 0, single 30-37".'
        part = "What is scaled: what the attention adds to the tokens, what the MLP adds, or both."
        stream = "Of which tokens: of the image, of the text, or of both."
        return inputs.schema(
            cls,
            "Poke Blocks",
            "Scales what blocks add to the picture while the model draws; 0 skips them. TorchCompileModel has no effect on a "
            "model that is poked.",
            [
                _model(),
                inputs.text("blocks", "single 0", blocks),
                inputs.number("factor", 0.0, -100.0, 100.0, 0.1, "0 skips, 1 changes nothing, 2 doubles."),
                inputs.choice("part", ["both", "attention", "mlp"], part),
                inputs.choice("stream", ["both", "img", "txt"], stream),
                *where_inputs(),
            ],
            [poked_output()],
        )

    @classmethod
    def execute(cls, model, blocks: str, factor, part, stream, sigma_from, sigma_to, positive_only, mask=None) -> io.NodeOutput:
        where = chosen_where(sigma_from, sigma_to, positive_only, mask)
        return io.NodeOutput(poked_clone(model, BlockPoke.of(flux_layout(model), blocks, part, stream, factor, where)))


def _model(tooltip: str = "The FLUX to poke: FLUX.1, FLUX.2 or Chroma. It is not changed.") -> io.Input:
    return io.Model.Input("model", tooltip=tooltip)


def poked_output() -> io.Output:
    return io.Model.Output(display_name="model", tooltip="The same model, poked: connect it to the sampler.")


def where_inputs() -> list[io.Input]:
    positive = "With CFG above 1: poke what the positive prompt does, not the negative one."
    mask = "Poke image tokens where the mask is white, and no others; the text is left alone then."
    return [
        *inputs.noise_levels(),
        *inputs.advanced(inputs.switch("positive_only", False, positive)),
        io.Mask.Input("mask", optional=True, tooltip=mask),
    ]


def chosen_where(sigma_from: float, sigma_to: float, positive_only: bool, mask: Tensor | None) -> Where:
    """Of masks of a batch, the first one is used."""
    picture = None if mask is None else mask.reshape(-1, *mask.shape[-2:])[0]
    return Where((sigma_from, sigma_to), picture, positive_only)
