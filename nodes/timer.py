"""Flux Timer: the noise levels of a run, as FLUX.1 and FLUX.2 were made for."""

from __future__ import annotations

from comfy_api.latest import io

from ..analysis.schedules import sigmas_chart, sigmas_figure
from ..flux.sampling import SHIFTS
from ..flux.sampling import FluxTimer as Timer
from . import host, inputs


class FluxTimer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shift = "FLUX.1 (by size): dev and krea. FLUX.2: all of it. static: schnell (1.0), or any number below."
        static = "For static alone: 1 = even steps; larger ones spend more of them on noise."
        denoise = "Below 1: only the last part of the noise, for an image that is there already, in as many steps."
        size = "Pixels; without effect where a latent is connected, or shift is static."
        return inputs.schema(
            cls,
            "Flux Timer",
            "Noise levels for SamplerCustomAdvanced: even steps, or with FLUX.1's or FLUX.2's shift; drawn on the node.",
            [
                inputs.whole("steps", 20, 1, 10_000, "How many steps."),
                inputs.choice("shift", [*SHIFTS], shift),
                inputs.number("static_shift", 1.0, 0.01, 100.0, 0.05, static),
                inputs.number("denoise", 1.0, 0.01, 1.0, 0.01, denoise),
                inputs.whole("width", 1024, 16, 16384, size),
                inputs.whole("height", 1024, 16, 16384, size),
                io.Latent.Input("latent", optional=True, tooltip="What is to be drawn on: its size is taken."),
            ],
            [io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, steps: int, shift: str, static_shift: float, denoise: float, width: int, height: int, latent=None
    ) -> io.NodeOutput:
        tokens = round(width * height / 256) if latent is None else host.image_tokens(latent)
        sigmas = Timer(steps, SHIFTS[shift] or static_shift, denoise).sigmas(tokens)
        levels = sigmas.tolist()
        words = [f"{sigma:.3f}" for sigma in levels]
        shown = words if len(words) <= 12 else [*words[:6], "...", *words[-5:]]
        curve = host.figure_image(sigmas_figure(levels))
        return io.NodeOutput(sigmas, ui=host.shown(cls, " ".join(shown), curve, sigmas_chart(levels)))
