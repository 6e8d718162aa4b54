"""Plans of what to cut, made from what was recorded, or read. Nothing is cut by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..analysis.report import figure_pixels
from ..errors import UserError
from ..files import check_replaces
from ..pruning.budget import BudgetCurve, by_budget, check_budget, protected_sites
from ..pruning.plan import FORMAT, PruningPlan, by_count, by_threshold, plan_figure
from ..pruning.scores import SCORES
from . import host
from .inputs import (
    DEFAULT_FOLDER,
    PlanType,
    after_sampler,
    block_ranges,
    checkpoint_input,
    chosen_ranges,
    files_written,
    recordings,
)
from .sources import Sources

#: What Load Plan reads where nothing else is asked for: the best kind of plan.
DEFAULT_PLAN = "plan_by_budget.safetensors"


def _plan_outputs() -> list[io.Output]:
    return [
        PlanType.Output(display_name="plan", tooltip="What to keep; nothing is cut yet."),
        io.String.Output(display_name="text"),
        io.Image.Output(display_name="image"),
    ]


def _plan_path(name: str) -> Path:
    """Where a plan is to be saved; raises `UserError`, before any work is done, where it cannot be."""
    path = host.output_path(name, ".safetensors")
    check_replaces(path, FORMAT)
    return path


def _planned(plan: PruningPlan, path: Path, node: type[io.ComfyNode], figure=None, note: str = "") -> io.NodeOutput:
    """Saves a plan, and shows its table and picture on the node, after a `note`."""
    if not any(plan.cut.values()):
        raise UserError(f"Nothing is cut ({plan.made}): raise a cut or a threshold, or widen the range of layers.")
    plan.save(path)
    text = note + plan.table()
    image = host.to_image(figure_pixels(figure if figure is not None else plan_figure(plan)))
    host.say(node.hidden.unique_id, text)
    return io.NodeOutput(plan, text, image, ui=ui.PreviewImage(image, cls=node))


def _save_as(kind: str) -> io.Input:
    default = f"plan_by_{kind}.safetensors"
    return io.String.Input("save_as", default=default, tooltip="The plan is also written to output/flux_poke.")


class PlanNode(io.ComfyNode):
    """Made anew only when what it was made from is another."""

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str | float:
        if "internals" in inputs and "after" not in inputs:
            return float("nan")  # it does not wait for the recording, so it reads that of the run before
        return files_written(inputs, own_recording="after" in inputs)


class PlanByCount(PlanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def cut(stream: str) -> io.Input:
            return io.Int.Input(f"{stream}_cut", default=0, min=0, max=65535, tooltip=f"Neurons to cut from each {stream} MLP.")

        return io.Schema(
            node_id="FluxPokePlanByCount",
            display_name="Plan Pruning by Count",
            category=host.CATEGORY,
            description="Cuts the same number of neurons from every MLP of a kind: those that matter least by the score.",
            is_output_node=True,
            inputs=[
                checkpoint_input(),
                cut("img"),
                cut("txt"),
                cut("single"),
                io.Combo.Input(
                    "score",
                    options=list(SCORES),
                    default="fluctuation",
                    tooltip="frequency: as the original. fluctuation: goes with bias repair. obs: with affine, needs rows.",
                ),
                *block_ranges(),
                _save_as("count"),
                *recordings(),
                after_sampler(),
            ],
            outputs=_plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, unet_name, img_cut, txt_cut, single_cut, score, first_layer, last_layer, first_single, last_single, save_as,
        hidden_states, file, internals=None, after=None,
    ) -> io.NodeOutput:  # fmt: skip
        path, sources = _plan_path(save_as), Sources.of(unet_name, hidden_states, file, internals)
        double, single = chosen_ranges(sources.dense.layout, first_layer, last_layer, first_single, last_single)
        rankings = sources.ranked(score, cls.hidden.unique_id)
        plan = by_count(sources.dense, rankings, score, img_cut, txt_cut, single_cut, double, single)
        return _planned(plan, path, cls)


class PlanByThreshold(PlanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def threshold(stream: str) -> io.Input:
            return io.Float.Input(
                f"{stream}_threshold", default=0.0, min=0.0, max=1e15, step=0.001, tooltip=f"{stream} neurons below it are cut."
            )

        return io.Schema(
            node_id="FluxPokePlanByThreshold",
            display_name="Plan Pruning by Threshold",
            category=host.CATEGORY,
            description="Keeps the neurons that fired at least so often, as the original flux-poke did.",
            is_output_node=True,
            inputs=[
                checkpoint_input(),
                threshold("img"),
                threshold("txt"),
                threshold("single"),
                io.Combo.Input(
                    "on",
                    options=["counts", "rate"],
                    tooltip="counts: how often in all, grows with every recording. rate: share of tokens, 0 to 1.",
                ),
                *block_ranges(),
                _save_as("threshold"),
                *recordings()[1:],
                after_sampler(),
            ],
            outputs=_plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, unet_name, img_threshold, txt_threshold, single_threshold, on, first_layer, last_layer, first_single, last_single,
        save_as, file, internals=None, after=None,
    ) -> io.NodeOutput:  # fmt: skip
        path, sources = _plan_path(save_as), Sources.of(unet_name, DEFAULT_FOLDER, file, internals)
        double, single = chosen_ranges(sources.dense.layout, first_layer, last_layer, first_single, last_single)
        limits = img_threshold, txt_threshold, single_threshold
        return _planned(by_threshold(sources.dense, sources.internals, *limits, on, double, single), path, cls)


class PlanByBudget(PlanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokePlanByBudget",
            display_name="Plan Pruning by Budget",
            category=host.CATEGORY,
            description="Spreads one budget over all MLPs so that the picture suffers least, and shows memory saved against "
            "predicted error before anything is cut.",
            is_output_node=True,
            inputs=[
                checkpoint_input(),
                io.Combo.Input("budget", options=["share of neurons", "gigabytes"], tooltip="What the amount is."),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Share of all MLP neurons to cut (0 to 1), or GB to save at 16 bits a weight.",
                ),
                io.Combo.Input(
                    "score",
                    options=["obs", "fluctuation", "magnitude"],
                    tooltip="obs is the best, with affine repair; needs rows.",
                ),
                io.Int.Input(
                    "multiple", default=64, min=1, max=4096, tooltip="Widths are multiples of this, which suits the hardware."
                ),
                io.String.Input("protect", default="", tooltip="Layers to leave whole, such as 'double-18, single-0'."),
                _save_as("budget"),
                *recordings(),
                after_sampler(),
            ],
            outputs=_plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, unet_name, budget, amount, score, multiple, protect, save_as, hidden_states, file, internals=None, after=None
    ) -> io.NodeOutput:
        path, sources = _plan_path(save_as), Sources.of(unet_name, hidden_states, file, internals)
        protected = protected_sites(sources.dense.layout, protect)
        share, gigabytes = (amount, None) if budget == "share of neurons" else (None, amount)
        check_budget(sources.dense.layout, share, gigabytes, multiple, protected)
        rankings = sources.ranked(score, cls.hidden.unique_id)
        amplification = sources.amplification
        curve = BudgetCurve.of(sources.dense.layout, rankings, amplification, multiple, protected)
        plan = by_budget(sources.dense, rankings, curve, score, share, gigabytes)
        measured = f"{len(rankings.keys() & amplification.keys())} of {len(rankings)} MLPs"
        note = f"An error counts alike wherever it is made: what it does to the picture is known of {measured} (probe steps).\n"
        return _planned(plan, path, cls, curve.figure(plan), "" if curve.amplified else note)


class LoadPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPlan",
            display_name="Load Plan",
            category=host.CATEGORY,
            description="Reads a plan that a Plan Pruning node or `flux-poke plan` wrote.",
            inputs=[io.String.Input("file", default=DEFAULT_PLAN, tooltip="Name in output/flux_poke.")],
            outputs=[PlanType.Output(display_name="plan", tooltip="What to keep."), io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_written(inputs, own_recording=False)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        plan = PruningPlan.load(host.output_path(file, ".safetensors"))
        host.say(cls.hidden.unique_id, plan.table())
        return io.NodeOutput(plan, plan.table())
