"""Tap Blocks: what the image would be if the model ended after each block, for every sampler that draws with the model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from comfy_api.latest import io
from PIL import Image
from torch import nn

from ..analysis.generation import Generation
from ..analysis.lens import FORMAT, Lens
from ..analysis.taps import BlockTaps, StepChoice, TapRecorder
from ..errors import UserError
from ..flux.blocks import choose_blocks
from ..flux.layout import FAMILY_NAMES, Layout
from ..recording.hooks import left_out
from . import graph, host, inputs, lists
from .models import flux_layout
from .watching import SampledCall, SamplingWatcher, Watch, sampling_clone

BlockTapsType = io.Custom("BLOCK_TAPS")

#: Inputs of loaders that say what is drawn with.
MODEL_NAMES = ("unet_name", "ckpt_name", "model_name")
#: What Tap Blocks offers beside lenses.
NO_LENS = "none"


@dataclass(frozen=True)
class TappedRun:
    """Predictions of one sampling run, and how they came about."""

    taps: BlockTaps
    layout: Layout
    timesteps: tuple[float, ...]
    guidance: float | None
    seed: int | None

    def generation(self, hidden: Any, prompt: str | None, final: Image.Image) -> Generation:
        """How `final` came about; model and prompt are read from the graph, unless a prompt is given."""
        above = partial(graph.value_above, hidden.prompt or {}, hidden.unique_id)
        return Generation(
            model=above(MODEL_NAMES, FAMILY_NAMES[self.layout.family]),
            prompt=above(graph.TEXTS) if prompt is None else prompt,
            width=final.width,
            height=final.height,
            seed=self.seed,
            timesteps=self.timesteps,
            guidance=self.guidance if self.layout.guidance else None,
            **host.asked_generation(hidden),
        )


@dataclass
class TappedModel:
    """What goes from Tap Blocks to Decode Block Previews: the latest run of each sampler that draws with it, by its node."""

    runs: dict[str | None, TappedRun] = field(default_factory=dict)

    def run_of(self, hidden: Any, name: str) -> TappedRun:
        """The run that the latents at the input `name` of a node come from; raises `UserError` where that cannot be told."""
        samplers = [node for node in self.runs if node is not None]
        if not self.runs:
            raise UserError(f"There are no block predictions: connect `{name}` to the latents of a sampler that draws with it.")
        found: set[str | None] = {*graph.nearest_above(hidden.prompt or {}, hidden.unique_id, name, samplers)}
        if not found and len(self.runs) == 1:
            found = set(self.runs)
        if len(found) != 1:
            raise UserError(
                f"{len(self.runs)} samplers drew with the tapped model (nodes {', '.join(sorted(samplers))}), and the latents "
                f"at `{name}` come from {'none' if not found else 'several'} of them: connect it to the latents of one of them."
            )
        return self.runs[found.pop()]


class TapBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        at_steps = '"all", "every 5", or a list such as "0, 4, 10-12"; the first step is 0.'
        lens = "A tuned lens in output/flux_poke, from flux-poke lens fit; none = tokens as they are."
        memory_gb = "Predictions beyond this wait on disk. At 1024x1024, one block at one step takes 0.0005 GB."
        raw = (
            "Also keep the tokens themselves and write them beside the previews, for flux-poke decode: at 1024x1024, 0.03 GB "
            "for one block at one step."
        )
        return inputs.schema(
            cls,
            "Tap Blocks",
            "Keeps what the image would be if the model ended after each block, at each step. What is drawn is the same with "
            "and without.",
            [
                inputs.model(),
                inputs.text("blocks", "all", '"all", or a list such as "double, single 0, single 30-37".'),
                inputs.text("at_steps", "all", at_steps),
                inputs.choice("lens", [NO_LENS, *lists.named_files(FORMAT)], lens),
                *inputs.advanced(
                    inputs.number("memory_gb", 1.0, 0.0, 1000.0, 0.5, memory_gb),
                    io.Boolean.Input("raw", default=False, optional=True, tooltip=raw),
                ),
            ],
            [
                inputs.watched_output(),
                BlockTapsType.Output(display_name="block_taps", tooltip="For Decode Block Previews."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lens=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, lens=lens)

    @classmethod
    def execute(cls, model, blocks: str, at_steps: str, lens: str, memory_gb: float, raw: bool = False) -> io.NodeOutput:
        layout = flux_layout(model)
        tuned = Lens.load(host.output_path(lens, ".safetensors")) if lens.strip() not in ("", NO_LENS) else None
        if tuned is not None:
            tuned.check_fits(layout)
        recorder = TapRecorder(layout, choose_blocks(blocks, layout), StepChoice.parse(at_steps), tuned)
        denoise = model.get_model_object("model_sampling").calculate_denoised
        to_autoencoder = model.get_model_object("latent_format").process_out
        tapped = TappedModel()

        def start() -> list[SamplingWatcher]:
            taps = BlockTaps(denoise, to_autoencoder, int(memory_gb * 1e9), host.temporary_folder(), raw)
            return [TappingRun(recorder, taps, layout, tapped)]

        return io.NodeOutput(sampling_clone(model, Watch(cls.hidden.unique_id, start)), tapped)


class TappingRun(SamplingWatcher):
    """One sampling run being tapped; it takes the place of its sampler's earlier one."""

    def __init__(self, recorder: TapRecorder, taps: BlockTaps, layout: Layout, tapped: TappedModel):
        self.recorder, self.taps, self.layout, self.tapped = recorder, taps, layout, tapped
        self.sampler = graph.running_node()
        self.first: SampledCall | None = None
        tapped.runs.pop(self.sampler, None)

    def watching(self, model: nn.Module, call: SampledCall):
        if not call.rows:
            return nullcontext()
        if self.first is None:
            self.first = replace(call, again=None)
        return self.recorder.watching(model, call, self.taps)

    def finish(self) -> str:
        if self.first is None:
            return "The sampler made no step: there are no block predictions."
        guidance = None if self.first.guidance is None else self.first.guidance.flatten()[0].item()
        seed = self.first.seed if isinstance(self.first.seed, int) else None
        self.tapped.runs[self.sampler] = TappedRun(self.taps, self.layout, self.first.sigmas, guidance, seed)
        steps = len(self.first.sigmas) - 1
        text = f"{len(self.taps)} block predictions at {len(self.taps.steps)} of {steps} steps"
        return f"{text}. {left_out(self.taps.skipping)}" if self.taps.skipping else text

    def abandon(self) -> str:
        return "The run did not finish: no block predictions are kept."
