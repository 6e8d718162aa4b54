"""Plans of what to cut, and loading and saving the smaller FLUX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..analysis.hidden_states import MANIFEST, HiddenStates
from ..analysis.internals import Internals
from ..analysis.report import figure_pixels
from ..errors import UserError
from ..flux.layout import Layout
from ..pruning.budget import BudgetCurve, by_budget, protected_sites
from ..pruning.checkpoint import Pruned, save_pruned
from ..pruning.dense import Dense
from ..pruning.lora import convert_lora
from ..pruning.plan import PruningPlan, by_count, by_threshold, plan_figure
from ..pruning.refit import METHODS, Fold, RepairReport
from ..pruning.repair import Repairs
from ..pruning.scores import SCORES, Ranking, rank, ranked_before
from ..pruning.surgery import Cut
from . import host, loading
from .computing import StepProgress, on_gpu, throw_if_cancelled
from .record import DEFAULT_FILE, InternalsType

PlanType = io.Custom("PRUNING_PLAN")
DEFAULT_FOLDER = "hidden_states"
DEFAULT_PLAN = "plan_by_budget.safetensors"
PRUNED = "flux_poke.pruned"
#: Folder in output/flux_poke for what repairs took to compute.
REPAIRS = "repairs"
CPU = torch.device("cpu")


def _checkpoint_input() -> io.Input:
    return io.Combo.Input(
        "unet_name",
        options=loading.checkpoint_names(),
        tooltip="The dense FLUX that was recorded.",
    )


def _weight_dtype_input() -> io.Input:
    return io.Combo.Input("weight_dtype", options=list(loading.WEIGHT_DTYPES), tooltip="As in Load Diffusion Model.")


def _recordings() -> list[io.Input]:
    return [
        io.String.Input(
            "hidden_states",
            default=DEFAULT_FOLDER,
            tooltip="Folder in output/flux_poke that Record Hidden States filled; for the score obs and affine repair.",
        ),
        io.String.Input("file", default=DEFAULT_FILE, tooltip="Internals in output/flux_poke, where nothing is connected."),
        InternalsType.Input("internals", optional=True, tooltip="From Record Internals; or leave open and name the file."),
    ]


def _ranges() -> list[io.Input]:
    """First and last layers; -1 as the last one stands for the model's last."""
    return [
        io.Int.Input("first_layer", default=0, min=0, max=255, tooltip="First double block that may be cut."),
        io.Int.Input("last_layer", default=-1, min=-1, max=255, tooltip="Last double block that may be cut; -1 = all."),
        io.Int.Input("first_single", default=0, min=0, max=255, tooltip="First single block that may be cut."),
        io.Int.Input("last_single", default=-1, min=-1, max=255, tooltip="Last single block that may be cut; -1 = all."),
    ]


def _after() -> io.Input:
    return io.AnyType.Input(
        "after", optional=True, tooltip="Connect the sampler's latent here, so that the plan waits for the recording."
    )


def _chosen(layout: Layout, first_layer: int, last_layer: int, first_single: int, last_single: int):
    """The ranges of double and of single blocks that the inputs of `_ranges` stand for."""
    last_double = layout.depth - 1 if last_layer < 0 else last_layer
    return (first_layer, last_double), (first_single, layout.depth_single - 1 if last_single < 0 else last_single)


def _plan_outputs() -> list[io.Output]:
    return [
        PlanType.Output(display_name="plan", tooltip="What to keep; nothing is cut yet."),
        io.String.Output(display_name="text"),
        io.Image.Output(display_name="image"),
    ]


@dataclass(frozen=True)
class Sources:
    """A dense checkpoint and what was recorded of it, opened only where it is asked for."""

    dense: Dense
    file: Path
    folder: Path

    @classmethod
    def of(cls, unet_name: str, hidden_states: str, file: str, internals: Path | None) -> Sources:
        dense = Dense.open(loading.checkpoint_path(unet_name))
        return cls(dense, internals or host.output_path(file, ".safetensors"), host.output_path(hidden_states))

    @property
    def internals(self) -> Internals:
        return Internals.load(self.file)

    @property
    def rows(self) -> HiddenStates:
        return HiddenStates.open(self.folder)

    @property
    def amplification(self) -> dict[str, float]:
        """By site, where the folder is there and of this model: every score's errors are weighed with it, and none needs it."""
        if not (self.folder / MANIFEST).exists():
            return {}
        return self.rows.amplification if self.rows.manifest.fingerprint.matches(self.dense.fingerprint) else {}

    def ranked(self, score: str, node_id: str | None) -> dict[str, Ranking]:
        """Rankings of all MLPs; those by obs are worked out on the GPU, and kept beside the rows for the next time."""
        progress = StepProgress(node_id, "ranked")
        if score != "obs":
            return rank(score, self.dense, self.internals, progress=progress)
        rows, sites = self.rows, self.dense.layout.sites
        scarce = rows.scarcest(sites)
        count, needed = rows.count(scarce.name), scarce.regressors
        host.say(node_id, f"{rows.folder.name}: {count:,} rows of {needed:,} that are needed; {5 * needed:,} do best")

        def work(device: torch.device) -> dict[str, Ranking]:
            return rank(score, self.dense, rows=rows, device=device, progress=progress, check=throw_if_cancelled)

        return work(CPU) if ranked_before(rows, sites) else on_gpu(work, node_id)

    def repaired(self, plan: PruningPlan, method: str, node_id: str | None, fold: bool = False) -> Repairs:
        """The plan's repairs, worked out on the GPU, and kept in output/flux_poke/repairs for the next time."""
        internals = self.internals if method == "bias" else None
        rows = self.rows if method == "affine" else None
        repairs = Repairs(self.dense, plan, method, internals, rows, host.output_path(REPAIRS), check=throw_if_cancelled)

        def work(device: torch.device) -> None:
            repairs.device = device
            repairs.compute(StepProgress(node_id, "repaired"), fold)

        if any(repairs.lacks(name, fold) for name in repairs):
            on_gpu(work, node_id)
        return repairs


def space_taken(repairs: Repairs) -> str:
    """What is kept of all plans' repairs, in words."""
    if repairs.folder is None:
        return ""
    size = sum(path.stat().st_size for path in repairs.folder.parent.rglob("*.safetensors"))
    place = f"{size / 1e9:.3g} GB in output/{host.FOLDER}/{REPAIRS}"
    return f"\nRepairs of all plans take {place}: what is deleted there is worked out again when it is needed"


def _planned(plan: PruningPlan, name: str, node: type[io.ComfyNode], figure=None, note: str = "") -> io.NodeOutput:
    """Saves a plan, and shows its table and picture on the node, after a `note`."""
    path = host.output_path(name, ".safetensors")
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


def _written(inputs: Mapping[str, Any], own_recording: bool) -> str:
    """When the files were written that a node reads by name, for `fingerprint_inputs`: a name out of another node is None.

    With `own_recording`, recordings are made in the same graph: what changes them reaches the node through its links, and
    their files, written after this is asked, must not count, or every recording would make the next run plan again.
    """
    names = {name: value for name, value in inputs.items() if value is not None}
    paths = [Path(loading.checkpoint_path(names["unet_name"]))] if "unet_name" in names else []
    if not own_recording:
        paths += [host.output_path(names["hidden_states"]) / MANIFEST] if "hidden_states" in names else []
        paths += [host.output_path(names["file"], ".safetensors")] if "file" in names else []
    return str([path.stat().st_mtime_ns if path.exists() else None for path in paths])


class PlanNode(io.ComfyNode):
    """Made anew only when what it was made from is another."""

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str | float:
        if "internals" in inputs and "after" not in inputs:
            return float("nan")  # it does not wait for the recording, so it reads that of the run before
        return _written(inputs, own_recording="after" in inputs)


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
                _checkpoint_input(),
                cut("img"),
                cut("txt"),
                cut("single"),
                io.Combo.Input(
                    "score",
                    options=list(SCORES),
                    default="fluctuation",
                    tooltip="frequency: as the original. fluctuation: goes with bias repair. obs: with affine, needs rows.",
                ),
                *_ranges(),
                _save_as("count"),
                *_recordings(),
                _after(),
            ],
            outputs=_plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, unet_name, img_cut, txt_cut, single_cut, score, first_layer, last_layer, first_single, last_single, save_as,
        hidden_states, file, internals=None, after=None,
    ) -> io.NodeOutput:  # fmt: skip
        sources = Sources.of(unet_name, hidden_states, file, internals)
        double, single = _chosen(sources.dense.layout, first_layer, last_layer, first_single, last_single)
        rankings = sources.ranked(score, cls.hidden.unique_id)
        plan = by_count(sources.dense, rankings, score, img_cut, txt_cut, single_cut, double, single)
        return _planned(plan, save_as, cls)


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
                _checkpoint_input(),
                threshold("img"),
                threshold("txt"),
                threshold("single"),
                io.Combo.Input(
                    "on",
                    options=["counts", "rate"],
                    tooltip="counts: how often in all, grows with every recording. rate: share of tokens, 0 to 1.",
                ),
                *_ranges(),
                _save_as("threshold"),
                *_recordings()[1:],
                _after(),
            ],
            outputs=_plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, unet_name, img_threshold, txt_threshold, single_threshold, on, first_layer, last_layer, first_single, last_single,
        save_as, file, internals=None, after=None,
    ) -> io.NodeOutput:  # fmt: skip
        sources = Sources.of(unet_name, DEFAULT_FOLDER, file, internals)
        double, single = _chosen(sources.dense.layout, first_layer, last_layer, first_single, last_single)
        limits = img_threshold, txt_threshold, single_threshold
        return _planned(by_threshold(sources.dense, sources.internals, *limits, on, double, single), save_as, cls)


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
                _checkpoint_input(),
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
                *_recordings(),
                _after(),
            ],
            outputs=_plan_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, unet_name, budget, amount, score, multiple, protect, save_as, hidden_states, file, internals=None, after=None
    ) -> io.NodeOutput:
        sources = Sources.of(unet_name, hidden_states, file, internals)
        protected = protected_sites(sources.dense.layout, protect)
        rankings = sources.ranked(score, cls.hidden.unique_id)
        amplification = sources.amplification
        curve = BudgetCurve.of(sources.dense.layout, rankings, amplification, multiple, protected)
        share, gigabytes = (amount, None) if budget == "share of neurons" else (None, amount)
        plan = by_budget(sources.dense, rankings, curve, score, share, gigabytes)
        measured = f"{len(rankings.keys() & amplification.keys())} of {len(rankings)} MLPs"
        note = f"An error counts alike wherever it is made: what it does to the picture is known of {measured} (probe steps).\n"
        return _planned(plan, save_as, cls, curve.figure(plan), "" if curve.amplified else note)


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
    def fingerprint_inputs(cls, file: str) -> int:
        path = host.output_path(file, ".safetensors")
        return path.stat().st_mtime_ns if path.is_file() else 0

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        plan = PruningPlan.load(host.output_path(file, ".safetensors"))
        host.say(cls.hidden.unique_id, plan.table())
        return io.NodeOutput(plan, plan.table())


class LoadPrunedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeLoadPrunedFlux",
            display_name="Load Pruned FLUX",
            category=host.CATEGORY,
            description="Loads a FLUX without the neurons that a plan cuts, and repairs the rest. The file is not changed.",
            inputs=[
                _checkpoint_input(),
                _weight_dtype_input(),
                PlanType.Input("plan", tooltip="From a Plan Pruning node or Load Plan."),
                io.Combo.Input(
                    "repair",
                    options=list(METHODS),
                    default="affine",
                    tooltip="none: cut alone. bias: from internals. affine: from hidden states, best by far; computed once.",
                ),
                *_recordings(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return _written(inputs, own_recording="internals" in inputs)

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
                _checkpoint_input(),
                PlanType.Input("plan", tooltip="From a Plan Pruning node or Load Plan."),
                io.Combo.Input("repair", options=list(METHODS), default="affine", tooltip="As in Load Pruned FLUX."),
                io.String.Input("save_as", default="flux-pruned.safetensors", tooltip="Name in models/diffusion_models."),
                io.Boolean.Input(
                    "fold",
                    default=False,
                    tooltip="Also store what LoRAs need to follow affine repair: a larger file.",
                ),
                *_recordings(),
            ],
            outputs=[io.String.Output(display_name="unet_name")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return _written(inputs, own_recording="internals" in inputs)

    @classmethod
    def execute(cls, unet_name, plan, repair, save_as, fold, hidden_states, file, internals=None) -> io.NodeOutput:
        folder = loading.checkpoint_folder().resolve()
        path = host.inside(folder, save_as, ".safetensors")
        sources = Sources.of(unet_name, hidden_states, file, internals)
        if path.resolve() == Path(loading.checkpoint_path(unet_name)).resolve():
            raise UserError(f"'{save_as}' is the dense model itself: choose another name, it is needed for other plans.")
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
            description="Loads a file that Save Pruned FLUX or `flux-poke prune` wrote. Needs nothing else.",
            inputs=[
                io.Combo.Input("unet_name", options=loading.checkpoint_names(), tooltip="A pruned file."),
                _weight_dtype_input(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return _written(inputs, own_recording=True)

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
