"""Choose Model: one graph for the normal, the watched, the pruned and the replaced model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..errors import UserError
from . import host

CHOICES = ("normal", "analysis", "pruned", "replaced")


class ChooseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeChooseModel",
            display_name="Choose Model",
            category=host.CATEGORY,
            description="Passes on one of the models that are connected. Nothing that only the others need is loaded or run.",
            inputs=[
                io.Combo.Input("use", options=list(CHOICES), tooltip="Which of the models below goes to the sampler."),
                io.Model.Input("normal", optional=True, lazy=True, tooltip="The dense model, from its loader."),
                io.Model.Input("analysis", optional=True, lazy=True, tooltip="From a Record node, or Tap Blocks."),
                io.Model.Input("pruned", optional=True, lazy=True, tooltip="From Load Pruned FLUX."),
                io.Model.Input("replaced", optional=True, lazy=True, tooltip="From Load Replaced FLUX."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def check_lazy_status(cls, use: str, **models: Any) -> list[str]:
        """The one input to run; an input without a link is not among `models`, one that has not run yet is None."""
        return [use] if use in models and models[use] is None else []

    @classmethod
    def execute(cls, use: str, **models: Any) -> io.NodeOutput:
        if models.get(use) is None:
            raise UserError(f"Nothing is connected to '{use}', or its group is switched off: switch it on, or choose another.")
        return io.NodeOutput(models[use])
