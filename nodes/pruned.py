"""Loading and saving the smaller FLUX that a plan leaves, and LoRAs for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..errors import UserError
from ..files import check_replaces
from ..flux.layout import Layout
from ..pruning.checkpoint import Pruned, save_pruned
from ..pruning.dense import PRUNED_FORMAT
from ..pruning.lora import convert_lora
from ..pruning.plan import PruningPlan
from ..pruning.refit import METHODS, Fold, RepairReport
from ..pruning.repair import Repairs
from ..pruning.surgery import Cut
from . import host, loading
from .computing import StepProgress, on_gpu
from .inputs import PlanType, checkpoint_input, files_written, recordings, weight_dtype_input
from .sources import CPU, Sources, space_taken

#: What a pruned MODEL's attachment is called.
PRUNED = "flux_poke.pruned"


class LoadPrunedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPrunedFlux",
            display_name="Load Pruned FLUX",
            category=host.CATEGORY,
            description="Loads a FLUX without the neurons that a plan cuts, and repairs the rest. The file is not changed.",
            inputs=[
                checkpoint_input(),
                weight_dtype_input(),
                PlanType.Input("plan", tooltip="From a Plan Pruning node or Load Plan."),
                io.Combo.Input(
                    "repair",
                    options=list(METHODS),
                    default="affine",
                    tooltip="none: cut alone. bias: from internals. affine: from hidden states, best by far; computed once.",
                ),
                *recordings(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_written(inputs, own_recording="internals" in inputs)

    @classmethod
    def execute(cls, unet_name, weight_dtype, plan, repair, hidden_states, file, internals=None) -> io.NodeOutput:
        sources = Sources.of(unet_name, hidden_states, file, internals)
        repairs = sources.repaired(plan, repair, cls.hidden.unique_id)
        model = loading.load_flux(Cut(sources.dense, plan, repairs), weight_dtype, sources.dense.metadata)
        model.set_attachments(PRUNED, PrunedModel(sources.dense.layout, plan, FoldsWhenAsked(repairs), repairs.report))
        host.say(cls.hidden.unique_id, plan.table() + space_taken(repairs))
        return io.NodeOutput(model, plan.masked_count)


@dataclass(frozen=True)
class PrunedModel:
    """What a pruned MODEL carries with it, for LoRAs to follow."""

    layout: Layout
    plan: PruningPlan
    folds: Mapping[str, Fold]
    report: Mapping[str, RepairReport]


class FoldsWhenAsked(Mapping[str, Fold]):
    """Folds by site, each worked out for the first LoRA that needs it: they take much space, and few models meet a LoRA."""

    def __init__(self, repairs: Repairs):
        self.repairs = repairs

    def __getitem__(self, name: str) -> Fold:
        def work(device: torch.device) -> Fold:
            self.repairs.device = device
            return self.repairs.fold(name)

        return on_gpu(work, None) if self.repairs.lacks(name, fold=True) else work(CPU)

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
            description="Writes the pruned and repaired FLUX to models/diffusion_models: a file that needs no other.",
            is_output_node=True,
            inputs=[
                checkpoint_input(),
                PlanType.Input("plan", tooltip="From a Plan Pruning node or Load Plan."),
                io.Combo.Input("repair", options=list(METHODS), default="affine", tooltip="As in Load Pruned FLUX."),
                io.String.Input("save_as", default="flux-pruned.safetensors", tooltip="Name in models/diffusion_models."),
                io.Boolean.Input(
                    "fold",
                    default=False,
                    tooltip="Also store what LoRAs need to follow affine repair: a larger file.",
                ),
                *recordings(),
            ],
            outputs=[io.String.Output(display_name="unet_name")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_written(inputs, own_recording="internals" in inputs)

    @classmethod
    def execute(cls, unet_name, plan, repair, save_as, fold, hidden_states, file, internals=None) -> io.NodeOutput:
        folder = loading.checkpoint_folder().resolve()
        path = host.inside(folder, save_as, ".safetensors")
        if path.resolve() == Path(loading.checkpoint_path(unet_name)).resolve():
            raise UserError(f"'{save_as}' is the dense model itself: choose another name, it is needed for other plans.")
        check_replaces(path, PRUNED_FORMAT)
        sources = Sources.of(unet_name, hidden_states, file, internals)
        repairs = sources.repaired(plan, repair, cls.hidden.unique_id, fold)
        save_pruned(path, Cut(sources.dense, plan, repairs), fold, StepProgress())
        name, size = str(path.relative_to(folder)), path.stat().st_size / 1e9
        host.say(cls.hidden.unique_id, f"{name}: {size:.3g} GB, {plan.masked_count} neurons cut{space_taken(repairs)}")
        return io.NodeOutput(name)


class LoadPrunedCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPrunedCheckpoint",
            display_name="Load Pruned Checkpoint",
            category=host.CATEGORY,
            description="Loads a file that Save Pruned FLUX, `flux-poke prune` or `flux-poke replace` wrote, nothing else.",
            inputs=[
                io.Combo.Input("unet_name", options=loading.checkpoint_names(), tooltip="A pruned file."),
                weight_dtype_input(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_written(inputs, own_recording=True)

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        pruned = Pruned.open(loading.checkpoint_path(unet_name))
        model = loading.load_pruned(pruned, weight_dtype)
        model.set_attachments(PRUNED, PrunedModel(pruned.layout, pruned.plan, pruned.folds, pruned.report))
        host.say(cls.hidden.unique_id, pruned.plan.table())
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
        pruned = model.get_attachment(PRUNED)
        if pruned is None:
            raise UserError("This model was not pruned by Flux Poke: use the ordinary Load LoRA for it.")
        lora = loading.read_tensors(folder_paths.get_full_path_or_raise("loras", lora_name))
        converted = convert_lora(lora, pruned.layout, pruned.plan, pruned.folds, pruned.report, StepProgress())
        host.say(cls.hidden.unique_id, converted.table())
        return io.NodeOutput(loading.load_lora(model, converted.tensors, strength), converted.table())
