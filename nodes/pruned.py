"""Loading and saving the smaller FLUX that a plan leaves, and LoRAs for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..errors import UserError
from ..files import check_replaces
from ..flux.layout import Layout
from ..pruning.checkpoint import Pruned, save_pruned, save_weights
from ..pruning.dense import PRUNED_FORMAT
from ..pruning.lora import convert_lora
from ..pruning.plan import PruningPlan
from ..pruning.planning import open_dense, open_recording
from ..pruning.refit import METHODS, Fold, RepairReport
from ..pruning.repair import Repairs
from ..pruning.surgery import Cut
from . import host, loading
from .computing import NodeProgress, on_gpu
from .inputs import PlanType, checkpoint_input, checkpoint_time, plan_input, weight_dtype_input
from .models import MergedWeights

#: What a pruned MODEL's attachment is called.
PRUNED = "flux_poke.pruned"


def repair_input(tooltip: str) -> io.Input:
    return io.Combo.Input("repair", options=list(METHODS), default="affine", tooltip=tooltip)


def repaired(plan: PruningPlan, method: str, node_id: str | None, fold: bool = False) -> Repairs:
    """A plan's repairs, worked out on the GPU where they are not there yet, and kept beside the recording for the next time."""
    dense = open_dense(plan)
    repairs = Repairs(dense, plan, method, None if method == "none" else open_recording(plan))
    compute(repairs, node_id, fold)
    return repairs


def compute(repairs: Repairs, node_id: str | None, fold: bool = False) -> None:
    """Works out on the GPU what is not there yet, with progress on the node; Cancel stops it, there and later."""
    progress = NodeProgress(node_id)

    def work(device: torch.device) -> None:
        repairs.device = device
        repairs.compute(progress, fold)

    if any(repairs.lacks(name, fold) for name in repairs):
        on_gpu(work, node_id)


def space_taken(repairs: Repairs) -> str:
    """What is kept of all plans' repairs of a recording, in words."""
    if repairs.folder is None:
        return ""
    size = 0
    for path in repairs.folder.parent.rglob("*.safetensors"):
        with suppress(FileNotFoundError):  # removed by somebody else in between
            size += path.stat().st_size
    return (
        f"\nRepairs take {size / 1e9:.3g} GB in {repairs.folder.parent}: what is deleted there is worked out again when it is "
        "needed"
    )


class LoadPrunedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPrunedFlux",
            display_name="Load Pruned FLUX",
            category=host.CATEGORY,
            description="Loads a FLUX without the neurons that a plan cuts, and repairs the rest. The file is not changed.",
            inputs=[
                plan_input(),
                repair_input(
                    "none: cut alone. bias: from internals. affine: from rows, best by far; computed once and kept with the "
                    "recording."
                ),
                weight_dtype_input(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, plan: PruningPlan, repair: str, weight_dtype: str) -> io.NodeOutput:
        repairs = repaired(plan, repair, cls.hidden.unique_id)
        dense = repairs.dense
        model = loading.load_flux(Cut(dense, plan, repairs), weight_dtype, dense.metadata)
        model.set_attachments(PRUNED, PrunedModel(dense.layout, plan, FoldsWhenAsked(repairs), repairs.reports()))
        host.say(cls.hidden.unique_id, plan.totals() + space_taken(repairs))
        return io.NodeOutput(model, plan.masked_count)


@dataclass(frozen=True)
class PrunedModel:
    """What a pruned MODEL carries with it, for LoRAs to follow and for saving it."""

    layout: Layout
    plan: PruningPlan
    folds: Mapping[str, Fold]
    report: Mapping[str, RepairReport]


def pruned_model(model: ModelPatcher) -> PrunedModel:
    """What a pruned MODEL carries; raises `UserError` where it is not one of ours."""
    found = model.get_attachment(PRUNED)
    if found is None:
        raise UserError(
            "This model was not pruned by Flux Poke: ComfyUI's own nodes load LoRAs for it and save it. Connect the MODEL of "
            "Load Pruned FLUX, Load Pruned Checkpoint or Load Replaced FLUX."
        )
    return found


class FoldsWhenAsked(Mapping[str, Fold]):
    """Folds by site, each worked out for the first LoRA that needs it: they take much space, and few models meet a LoRA."""

    def __init__(self, repairs: Repairs):
        self.repairs = repairs

    def __getitem__(self, name: str) -> Fold:
        def work(device: torch.device) -> Fold:
            self.repairs.device, self.repairs.progress = device, NodeProgress(in_words=False)
            return self.repairs.fold(name)

        return on_gpu(work, None) if self.repairs.lacks(name, fold=True) else work(torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.repairs)

    def __len__(self) -> int:
        return len(self.repairs)


class SavePrunedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeSavePrunedFlux",
            display_name="Save Pruned FLUX",
            category=host.CATEGORY,
            description="Writes the pruned and repaired FLUX to models/diffusion_models: a file that needs no other, for Load "
            "Pruned Checkpoint. From a plan, or from a pruned MODEL as it is, with the LoRAs on it merged.",
            is_output_node=True,
            inputs=[
                io.MultiType.Input(
                    "plan_or_model",
                    [PlanType, io.Model],
                    tooltip="A plan, which is cut and repaired; or the MODEL of Load Pruned FLUX, Load Pruned Checkpoint or "
                    "Load LoRA (pruned FLUX), which is saved as it is: repair and fold are then not asked.",
                ),
                repair_input("As in Load Pruned FLUX."),
                io.String.Input("save_as", default="flux-pruned.safetensors", tooltip="Name in models/diffusion_models."),
                io.Boolean.Input(
                    "fold",
                    default=False,
                    tooltip="Also store what LoRAs need to follow affine repair: a larger file.",
                ),
            ],
            outputs=[io.String.Output(display_name="unet_name")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, plan_or_model: Any, repair: str, save_as: str, fold: bool) -> io.NodeOutput:
        folder, node_id = loading.checkpoint_folder().resolve(), cls.hidden.unique_id
        path = host.inside(folder, save_as, ".safetensors")
        check_replaces(path, PRUNED_FORMAT)
        space = ""
        if isinstance(plan_or_model, PruningPlan):
            plan = plan_or_model
            repairs = repaired(plan, repair, node_id, fold)
            save_pruned(path, Cut(repairs.dense, plan, repairs), fold, NodeProgress(node_id))
            space = space_taken(repairs)
        else:
            pruned = pruned_model(plan_or_model)
            plan = pruned.plan
            save_weights(path, MergedWeights(plan_or_model), plan, pruned.report, NodeProgress(node_id))
        name, size = str(path.relative_to(folder)), path.stat().st_size / 1e9
        host.say(node_id, f"{name}: {size:.3g} GB, {plan.masked_count} neurons cut{space}")
        return io.NodeOutput(name)


class LoadPrunedCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPrunedCheckpoint",
            display_name="Load Pruned Checkpoint",
            category=host.CATEGORY,
            description="Loads a file that Save Pruned FLUX, `flux-poke prune` or `flux-poke replace` wrote, nothing else.",
            inputs=[checkpoint_input(tooltip="A pruned file."), weight_dtype_input()],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return checkpoint_time(inputs.get("unet_name"))

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        pruned = Pruned.open(loading.checkpoint_path(unet_name))
        model = loading.load_pruned(pruned, weight_dtype)
        model.set_attachments(PRUNED, PrunedModel(pruned.layout, pruned.plan, pruned.folds, pruned.report))
        host.say(cls.hidden.unique_id, pruned.plan.totals())
        return io.NodeOutput(model, pruned.plan.masked_count)


class LoadPrunedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPrunedLora",
            display_name="Load LoRA (pruned FLUX)",
            category=host.CATEGORY,
            description="Makes a LoRA of the dense model fit the pruned one, and tells what became of each of its layers.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Pruned FLUX or Load Pruned Checkpoint."),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras"), tooltip="From models/loras."),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01, tooltip="How strongly it acts."),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        pruned = pruned_model(model)
        lora = loading.read_tensors(folder_paths.get_full_path_or_raise("loras", lora_name))
        converted = convert_lora(lora, pruned.layout, pruned.plan, pruned.folds, pruned.report, NodeProgress())
        host.say(cls.hidden.unique_id, converted.table())
        return io.NodeOutput(loading.load_lora(model, converted.tensors, strength), converted.table())
