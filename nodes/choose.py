"""Choose Model: one graph for the normal, the watched, the pruned and the replaced model. On/Off: what in it runs at all."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..errors import UserError
from . import inputs

#: The models, and where each comes from.
CHOICES = {
    "normal": "The dense model, from its loader.",
    "analysis": "From a Record node, or Tap Blocks.",
    "pruned": "From Load Pruned FLUX.",
    "replaced": "From Load Replaced FLUX.",
}


class ChooseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Choose Model (Flux Poke)",
            "Passes on one of the models that are connected. Nothing that only the others need is loaded or run.",
            [
                inputs.choice("use", list(CHOICES), "Which of the models below goes to the sampler."),
                *(io.Model.Input(name, optional=True, lazy=True, tooltip=source) for name, source in CHOICES.items()),
            ],
            [io.Model.Output()],
            hidden=[],
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


class OnOff(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("value")
        value = "What the part of the graph below needs: a recording, a plan, anything."
        on = "Off: nothing below runs, nor what above is needed for it alone."
        return inputs.schema(
            cls,
            "On/Off (Flux Poke)",
            "A switch for a part of a graph: what only has to run once, such as planning or retraining.",
            [io.MatchType.Input("value", template, lazy=True, tooltip=value), inputs.switch("on", True, on)],
            [io.MatchType.Output(template=template, display_name="output", tooltip="For the nodes that wait for the switch.")],
            hidden=[],
        )

    @classmethod
    def check_lazy_status(cls, on: bool, value: Any = None) -> list[str]:
        return ["value"] if on and value is None else []

    @classmethod
    def execute(cls, on: bool, value: Any = None) -> io.NodeOutput:
        return io.NodeOutput(value if on else ExecutionBlocker(None))
