"""Plans of what to cut, made from what was recorded, or read. Nothing is cut by them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..files import check_replaces
from ..pruning.by_budget import AMOUNTS, ByBudget
from ..pruning.dense import Dense
from ..pruning.plan import FORMAT, PruningPlan
from ..pruning.planning import ByCount, ByThreshold, Request, make_plan
from ..pruning.precision import PRECISIONS
from ..pruning.scores import SCORES
from ..recording.recording import Recording
from . import host, inputs, lists, loading
from .computing import NodeProgress, on_gpu
from .graph import running_graph

STREAMS = ("img", "txt", "single")


class PlanNode(io.ComfyNode):
    """Made again only when what it was made from is another."""

    @classmethod
    def schema(cls, title: str, description: str, own: list[io.Input]) -> io.Schema:
        known = "What to keep; nothing is cut yet. It knows checkpoint and recording."
        return inputs.schema(
            cls,
            f"Plan Pruning by {title}",
            description,
            [
                inputs.recording(),
                inputs.checkpoint(),
                *own,
                inputs.text("save_as", f"plan_by_{title.lower()}.safetensors", "The plan is also written to output/flux_poke."),
                inputs.after_sampler(),
            ],
            [
                inputs.PlanType.Output(display_name="plan", tooltip=known),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="image"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> str | float:
        if "after" not in given and inputs.recorded_in(running_graph()):
            return float("nan")  # it does not wait for the recording, so it reads that of the run before
        return inputs.checkpoint_time(given.get("unet_name"))

    @classmethod
    def planned(cls, dense: Dense, recording: Recording, what: Request, save_as: str) -> io.NodeOutput:
        """Makes the plan, saves it, and shows its table and picture on the node."""
        path, node_id = host.output_path(save_as, ".safetensors"), cls.hidden.unique_id
        check_replaces(path, FORMAT)
        what.check(dense)
        inputs.require_recorded(recording)
        progress = NodeProgress(node_id)
        if isinstance(what, ByThreshold):
            made = make_plan(dense, recording, what, "cpu", progress)
        else:
            made = on_gpu(lambda device: make_plan(dense, recording, what, device, progress), node_id)
        made.plan.save(path, host.graph_metadata(cls.hidden))
        text, image = "\n".join([*made.notes, made.plan.table()]), host.figure_image(made.figure())
        shown = "\n".join([*made.plan.facts(), *made.notes, *made.plan.rows()])
        return io.NodeOutput(made.plan, text, image, ui=host.shown(cls, shown, image, made.chart()))


def open_checkpoint(unet_name: str) -> Dense:
    return Dense.open(loading.checkpoint_path(unet_name))


class PlanByCount(PlanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        score = "frequency: as the original. fluctuation: goes with bias repair. obs: with affine, needs rows."
        return cls.schema(
            "Count",
            "Cuts the same number of neurons from every MLP of a kind: those that matter least by the score.",
            [
                *(inputs.whole(f"{s}_cut", 1024, 0, 65535, f"Neurons to cut from each {s} MLP.") for s in STREAMS),
                inputs.choice("score", list(SCORES), score, default="fluctuation"),
                *inputs.block_ranges(),
            ],
        )

    @classmethod
    def execute(
        cls, recording, unet_name, img_cut, txt_cut, single_cut, score, save_as, after=None, **ranges: int
    ) -> io.NodeOutput:
        dense = open_checkpoint(unet_name)
        what = ByCount(img_cut, txt_cut, single_cut, score, **inputs.chosen_ranges(dense.layout, **ranges))
        return cls.planned(dense, recording, what, save_as)


class PlanByThreshold(PlanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        on = "counts: how often in all, grows with every recording. rate: share of tokens, 0 to 1."
        return cls.schema(
            "Threshold",
            "Keeps the neurons that fired at least so often, as the original flux-poke did.",
            [
                *(inputs.number(f"{s}_threshold", 1.0, 0.0, 1e15, 0.001, f"{s} neurons below it are cut.") for s in STREAMS),
                inputs.choice("on", ["counts", "rate"], on),
                *inputs.block_ranges(),
            ],
        )

    @classmethod
    def execute(
        cls, recording, unet_name, img_threshold, txt_threshold, single_threshold, on, save_as, after=None, **ranges: int
    ) -> io.NodeOutput:
        dense = open_checkpoint(unet_name)
        chosen = inputs.chosen_ranges(dense.layout, **ranges)
        return cls.planned(dense, recording, ByThreshold(img_threshold, txt_threshold, single_threshold, on, **chosen), save_as)


class PlanByBudget(PlanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        amount = "GB (1 GB = 10^9 bytes, above 0), or a share (above 0, below 1)."
        touch = "What may be cut: MLP neurons, the rank of modulation layers (FLUX.1 alone has such to gain by), or both."
        return cls.schema(
            "Budget",
            "Makes FLUX as small as you say, where that costs the picture least: one budget for MLP neurons and modulation "
            "layers. Shows size and predicted error before anything is cut. Needs rows; affine repair goes with it.",
            [
                inputs.choice("budget", list(AMOUNTS.values()), "What the amount is."),
                inputs.number("amount", 10.0, 0.0, 1000.0, 0.001, amount),
                inputs.choice("touch", ["both", "neurons", "modulation"], touch),
                inputs.choice("precision", list(PRECISIONS), "What the file will be saved in; stored is as it is."),
                *inputs.advanced(inputs.text("protect", "", "Layers to leave whole, such as 'double-18, single-0'.")),
            ],
        )

    @classmethod
    def execute(cls, recording, unet_name, budget, amount, touch, precision, protect, save_as, after=None) -> io.NodeOutput:
        (kind,) = (name for name, words in AMOUNTS.items() if words == budget)
        what = ByBudget(**{kind: amount}, touch=touch, precision=precision, protect=protect)
        return cls.planned(open_checkpoint(unet_name), recording, what, save_as)


class LoadPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        moved = "The dense FLUX, where it is not any more where it was for the plan."
        other = "The recording, where it is not any more where it was for the plan."
        return inputs.schema(
            cls,
            "Load Plan (Flux Poke)",
            "Reads a plan that a Plan Pruning node or flux-poke plan wrote. Where files moved, it is told where checkpoint "
            "and recording are now.",
            [
                inputs.listed("file", lists.named_files(FORMAT), inputs.NO_PLAN, "Name in output/flux_poke."),
                inputs.checkpoint(inputs.OF_THE_PLAN, tooltip=moved),
                inputs.recording(other, optional=True),
            ],
            [inputs.PlanType.Output(display_name="plan", tooltip="What to keep."), io.String.Output(display_name="text")],
        )

    @classmethod
    def validate_inputs(cls, file=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, file=file)

    @classmethod
    def fingerprint_inputs(cls, file: str, unet_name: str | None = None, **_: Any) -> str:
        """Another one when the plan was written again, or when what it was made from was."""
        path = host.output_path(file, ".safetensors")
        if not path.exists():
            return ""
        plan = PruningPlan.load(path)
        moved = inputs.checkpoint_time(unet_name)
        recording = Recording.at(plan.recording)
        recorded = recording.digest(*sorted(recording.kinds)) if plan.recording and recording.kinds else ""
        return f"{inputs.times(path)} {moved or inputs.times(Path(plan.checkpoint))} {recorded}"

    @classmethod
    def execute(cls, file: str, unet_name: str, recording: Recording | None = None) -> io.NodeOutput:
        plan = PruningPlan.load(host.output_path(inputs.chosen(file), ".safetensors"))
        if unet_name != inputs.OF_THE_PLAN:
            plan = replace(plan, checkpoint=os.path.abspath(loading.checkpoint_path(unet_name)))
        if recording is not None:
            plan = replace(plan, recording=os.path.abspath(recording.folder))
        host.say(cls.hidden.unique_id, "\n".join(plan.facts()))
        return io.NodeOutput(plan, plan.table())
