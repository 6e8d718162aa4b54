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
from torch import Tensor

from ..errors import UserError
from ..files import check_replaces, size_text
from ..flux.layout import Layout
from ..pruning.certificate import certificate, facts
from ..pruning.checkpoint import LOADED_BY, Pruned, save_pruned, save_weights
from ..pruning.dense import PRUNED_FORMAT
from ..pruning.lora import convert_lora
from ..pruning.low_rank import Vectors
from ..pruning.plan import PruningPlan
from ..pruning.planning import open_dense, open_recording
from ..pruning.precision import PRECISIONS, dense_bytes
from ..pruning.refit import METHODS, Fold, RepairReport
from ..pruning.repair import Repairs
from ..pruning.surgery import Cut
from . import host, inputs, lists, loading
from .computing import NodeProgress, on_gpu
from .models import MergedWeights

#: What a file is saved in where the plan says so.
AS_PLANNED = "as planned"
#: What a pruned MODEL's attachment is called.
PRUNED = "flux_poke.pruned"


def repaired(plan: PruningPlan, method: str, node_id: str | None, fold: bool = False) -> Repairs:
    """A plan's repairs, worked out on the GPU where they are not there yet, and kept beside the recording for the next time."""
    dense = open_dense(plan)
    repairs = Repairs(dense, plan, method, None if method == "none" and not plan.ranks else open_recording(plan))
    progress = NodeProgress(node_id)

    def work(device: torch.device) -> None:
        repairs.device = device
        repairs.compute(progress, fold)

    if not repairs.complete(fold):
        on_gpu(work, node_id)
    return repairs


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
        repair = (
            "none: cut alone. bias: from internals. affine: from rows, best by far; computed once and kept with the recording."
        )
        return inputs.schema(
            cls,
            "Load Pruned FLUX",
            "Loads a FLUX without the neurons that a plan cuts, and repairs the rest. The file is not changed.",
            [inputs.plan(), inputs.choice("repair", METHODS, repair, default="affine"), inputs.weight_dtype()],
            [io.Model.Output(), io.String.Output(display_name="masked_count")],
        )

    @classmethod
    def execute(cls, plan: PruningPlan, repair: str, weight_dtype: str) -> io.NodeOutput:
        repairs = repaired(plan, repair, cls.hidden.unique_id)
        dense = repairs.dense
        cut = Cut(dense, plan, repairs)
        model = loading.load_flux(cut, weight_dtype, dense.metadata)
        report = repairs.reports()
        model.set_attachments(PRUNED, PrunedModel(dense.layout, plan, FoldsWhenAsked(repairs), report, cut.vectors, cut))
        said = facts(plan, report, certificate(cut, report, "stored"))
        host.say(cls.hidden.unique_id, "\n".join(said) + space_taken(repairs))
        return io.NodeOutput(model, plan.masked_count)


@dataclass(frozen=True)
class PrunedModel:
    """What a pruned MODEL carries with it, for LoRAs to follow and for saving it."""

    layout: Layout
    plan: PruningPlan
    folds: Mapping[str, Fold]
    report: Mapping[str, RepairReport]
    vectors: Vectors | None
    tensors: Mapping[str, Tensor]


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
            self.repairs.device, self.repairs.progress = device, NodeProgress()
            return self.repairs.fold(name)

        return on_gpu(work, None) if self.repairs.lacks(name, fold=True) else work(torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.repairs)

    def __len__(self) -> int:
        return len(self.repairs)


class SavePrunedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        source = (
            "A plan, which is cut and repaired; or the MODEL of Load Pruned FLUX, Load Pruned Checkpoint or Load LoRA (pruned "
            "FLUX), which is saved as it is: repair, fold and precision are then not asked."
        )
        precision = (
            "What weights are saved in. As planned: what a plan by budget counted its size in, else as in the dense file. fp8: "
            "half the size of bf16, which ComfyUI runs in 8 bits."
        )
        return inputs.schema(
            cls,
            "Save Pruned FLUX",
            "Writes the pruned and repaired FLUX to models/diffusion_models: a file that needs no other, for Load Pruned "
            "Checkpoint. From a plan, or from a pruned MODEL as it is, with the LoRAs on it merged.",
            [
                io.MultiType.Input("plan_or_model", [inputs.PlanType, io.Model], tooltip=source),
                inputs.choice("repair", METHODS, "As in Load Pruned FLUX.", default="affine"),
                inputs.text("save_as", "flux-pruned.safetensors", "Name in models/diffusion_models."),
                *inputs.advanced(
                    inputs.switch("fold", False, "Also store what LoRAs need to follow affine repair: a larger file.")
                ),
                inputs.choice("precision", [AS_PLANNED, *PRECISIONS], precision),
            ],
            [inputs.NameType.Output(display_name="unet_name", tooltip="For Load Pruned Checkpoint.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, plan_or_model: Any, repair: str, save_as: str, fold: bool, precision: str = AS_PLANNED) -> io.NodeOutput:
        folder, node_id = loading.checkpoint_folder().resolve(), cls.hidden.unique_id
        path = host.inside(folder, save_as, ".safetensors")
        check_replaces(path, PRUNED_FORMAT)
        graph, before, space = host.graph_metadata(cls.hidden), "", ""
        if isinstance(plan_or_model, PruningPlan):
            plan = plan_or_model
            repairs, progress = repaired(plan, repair, node_id, fold), NodeProgress(node_id)
            saved_as = plan.precision if precision == AS_PLANNED else precision

            def save(device: torch.device) -> None:
                repairs.device = device
                save_pruned(path, Cut(repairs.dense, plan, repairs), fold, progress, saved_as, graph)

            if saved_as == "fp8":  # rounds with compensation
                on_gpu(save, node_id)
            else:
                save(torch.device("cpu"))
            before, space = f"{size_text(dense_bytes(repairs.dense, 'stored'))} -> ", space_taken(repairs)
        else:
            pruned = pruned_model(plan_or_model)
            plan = pruned.plan
            save_weights(path, MergedWeights(plan_or_model), plan, pruned.report, NodeProgress(node_id), graph)
        name, saved = path.relative_to(folder).as_posix(), Pruned.open(path)
        known = facts(saved.plan, saved.report, saved.certificate)
        host.say(node_id, "\n".join([f"{name}: {before}{size_text(path.stat().st_size)}", *known, LOADED_BY]) + space)
        return io.NodeOutput(name)


class LoadPrunedCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Load Pruned Checkpoint",
            "Loads a file that Save Pruned FLUX, flux-poke prune or flux-poke replace wrote, nothing else.",
            [
                inputs.listed("unet_name", lists.pruned_names(), inputs.NO_PRUNED, "A pruned file in models/diffusion_models."),
                inputs.weight_dtype(),
            ],
            [io.Model.Output(), io.String.Output(display_name="masked_count")],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, unet_name=unet_name)

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None = None, **_: Any) -> str:
        return inputs.checkpoint_time(unet_name)

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        pruned = Pruned.open(loading.checkpoint_path(inputs.chosen(unet_name)))
        model = loading.load_pruned(pruned, weight_dtype)
        attached = PrunedModel(pruned.layout, pruned.plan, pruned.folds, pruned.report, pruned.vectors, pruned.tensors)
        model.set_attachments(PRUNED, attached)
        host.say(cls.hidden.unique_id, "\n".join(facts(pruned.plan, pruned.report, pruned.certificate)))
        return io.NodeOutput(model, pruned.plan.masked_count)


class LoadPrunedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Load LoRA (pruned FLUX)",
            "Makes a LoRA of the dense model fit the pruned one, and tells what became of each of its layers.",
            [
                io.Model.Input("model", tooltip="From Load Pruned FLUX or Load Pruned Checkpoint."),
                inputs.choice("lora_name", folder_paths.get_filename_list("loras"), "From models/loras."),
                inputs.number("strength", 1.0, -100.0, 100.0, 0.01, "How strongly it acts."),
            ],
            [io.Model.Output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        pruned = pruned_model(model)
        lora = loading.read_tensors(folder_paths.get_full_path_or_raise("loras", lora_name))
        model_facts = (pruned.layout, pruned.plan, pruned.folds, pruned.report, pruned.vectors, pruned.tensors)
        converted = convert_lora(lora, *model_facts, NodeProgress())
        host.say(cls.hidden.unique_id, converted.table())
        return io.NodeOutput(loading.load_lora(model, converted.tensors, strength), converted.table())
