"""Plans of what to cut, made from what was recorded, or read. Nothing is cut by them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..analysis.report import figure_pixels
from ..files import check_replaces
from ..pruning.dense import Dense
from ..pruning.plan import FORMAT, PruningPlan
from ..pruning.planning import ByBudget, ByCount, ByThreshold, Request, make_plan
from ..pruning.scores import SCORES
from ..recording.recording import Recording
from . import host, loading
from .computing import NodeProgress, on_gpu
from .graph import running_graph
from .inputs import (
    OF_THE_PLAN,
    PlanType,
    after_sampler,
    block_ranges,
    checkpoint_input,
    checkpoint_time,
    chosen_ranges,
    recorded_in,
    recording_input,
    require_recorded,
    times,
)

#: What Load Plan reads where nothing else is asked for: the best kind of plan.
DEFAULT_PLAN = "plan_by_budget.safetensors"


class PlanNode(io.ComfyNode):
    """Made again only when what it was made from is another."""

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str | float:
        if "after" not in inputs and recorded_in(running_graph()):
            return float("nan")  # it does not wait for the recording, so it reads that of the run before
        return checkpoint_time(inputs.get("unet_name"))

    @classmethod
    def planned(cls, dense: Dense, recording: Recording, what: Request, save_as: str) -> io.NodeOutput:
        """Makes the plan, saves it, and shows its table and picture on the node."""
        path, node_id = host.output_path(save_as, ".safetensors"), cls.hidden.unique_id
        check_replaces(path, FORMAT)
        what.check(dense.layout)
        require_recorded(recording)
        progress = NodeProgress(node_id)
        if isinstance(what, ByThreshold):
            made = make_plan(dense, recording, what, "cpu", progress)
        else:
            made = on_gpu(lambda device: make_plan(dense, recording, what, device, progress), node_id)
        made.plan.save(path)
        text, image = "\n".join([*made.notes, made.plan.table()]), host.to_image(figure_pixels(made.figure()))
        host.say(node_id, text)
        return io.NodeOutput(made.plan, text, image, ui=ui.PreviewImage(image, cls=cls))


def open_checkpoint(unet_name: str) -> Dense:
    return Dense.open(loading.checkpoint_path(unet_name))


def plan_outputs() -> list[io.Output]:
    return [
        PlanType.Output(display_name="plan", tooltip="What to keep; nothing is cut yet. It knows checkpoint and recording."),
        io.String.Output(display_name="text"),
        io.Image.Output(display_name="image"),
    ]


def save_as_input(kind: str) -> io.Input:
    default = f"plan_by_{kind}.safetensors"
    return io.String.Input("save_as", default=default, tooltip="The plan is also written to output/flux_poke.")


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
                recording_input(),
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
                save_as_input("count"),
                after_sampler(),
            ],
            outputs=plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, recording, unet_name, img_cut, txt_cut, single_cut, score, first_layer, last_layer, first_single, last_single,
        save_as, after=None,
    ) -> io.NodeOutput:  # fmt: skip
        dense = open_checkpoint(unet_name)
        ranges = chosen_ranges(dense.layout, first_layer, last_layer, first_single, last_single)
        return cls.planned(dense, recording, ByCount(img_cut, txt_cut, single_cut, score, **ranges), save_as)


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
                recording_input(),
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
                save_as_input("threshold"),
                after_sampler(),
            ],
            outputs=plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, recording, unet_name, img_threshold, txt_threshold, single_threshold, on, first_layer, last_layer, first_single,
        last_single, save_as, after=None,
    ) -> io.NodeOutput:  # fmt: skip
        dense = open_checkpoint(unet_name)
        ranges = chosen_ranges(dense.layout, first_layer, last_layer, first_single, last_single)
        return cls.planned(dense, recording, ByThreshold(img_threshold, txt_threshold, single_threshold, on, **ranges), save_as)


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
                recording_input(),
                checkpoint_input(),
                io.Combo.Input("budget", options=["share of neurons", "gigabytes"], tooltip="What the amount is."),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Share of all MLP neurons to cut (above 0, below 1), or GB to save at 16 bits a weight (above 0).",
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
                save_as_input("budget"),
                after_sampler(),
            ],
            outputs=plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, recording, unet_name, budget, amount, score, multiple, protect, save_as, after=None) -> io.NodeOutput:
        amounts = {"share": amount} if budget == "share of neurons" else {"gigabytes": amount}
        what = ByBudget(**amounts, score=score, multiple=multiple, protect=protect)
        return cls.planned(open_checkpoint(unet_name), recording, what, save_as)


class LoadPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPlan",
            display_name="Load Plan",
            category=host.CATEGORY,
            description="Reads a plan that a Plan Pruning node or `flux-poke plan` wrote. Where files moved, it is told where "
            "checkpoint and recording are now.",
            inputs=[
                io.String.Input("file", default=DEFAULT_PLAN, tooltip="Name in output/flux_poke."),
                checkpoint_input(OF_THE_PLAN, tooltip="The dense FLUX, where it is not any more where it was for the plan."),
                recording_input("The recording, where it is not any more where it was for the plan.", optional=True),
            ],
            outputs=[PlanType.Output(display_name="plan", tooltip="What to keep."), io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Another one when the plan was written again, or when what it was made from was."""
        path = host.output_path(inputs["file"], ".safetensors")
        if not path.exists():
            return ""
        plan = PruningPlan.load(path)
        moved = checkpoint_time(inputs.get("unet_name"))
        recording = Recording.at(plan.recording)
        recorded = recording.digest(*sorted(recording.kinds)) if plan.recording and recording.kinds else ""
        return f"{times(path)} {moved or times(Path(plan.checkpoint))} {recorded}"

    @classmethod
    def execute(cls, file: str, unet_name: str, recording: Recording | None = None) -> io.NodeOutput:
        plan = PruningPlan.load(host.output_path(file, ".safetensors"))
        if unet_name != OF_THE_PLAN:
            plan = replace(plan, checkpoint=os.path.abspath(loading.checkpoint_path(unet_name)))
        if recording is not None:
            plan = replace(plan, recording=os.path.abspath(recording.folder))
        host.say(cls.hidden.unique_id, plan.totals())
        return io.NodeOutput(plan, plan.table())
