"""Retrain Layers and Load Replaced FLUX."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image, ImageDraw

from ..errors import UserError
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.planning import open_dense, open_recording
from ..recording.recording import Recording
from ..retrain.files import default_folder, draw_stats, layer_files, stats_chart, stats_figure, stats_table
from ..retrain.layers import METHODS, retrain
from ..retrain.options import TrainingStatus
from ..retrain.replaced import Replaced, RetrainedLayers
from . import computing, host, inputs, lists, loading
from .pruned import PRUNED, PrunedModel


class RetrainLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        layers = "Such as 0-18 (single blocks count on from the double ones), or 'double 3, single'."
        method = (
            "both: least squares, then gradient steps. distill: all layers at once, on trajectories; the whole model has to "
            "fit on the device."
        )
        dtypes = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]
        rate: dict[str, Any] = {"default": 5e-4, "min": 1e-8, "max": 1.0, "step": 1e-6, "round": False}
        other = "What to train on, where it is not the recording that the plan was made from."
        sequential = "Train on what the retrained layers before give, one after the other. Needs block states."
        just_evaluate = "Only measure the layers as training would begin; write nothing, and run nothing that needs the folder."
        return inputs.schema(
            cls,
            "Retrain Layers",
            "Trains what a plan leaves of each layer against what the dense model did, and saves the layers. Cancel keeps "
            "those that are finished; run again, it goes on.",
            [
                inputs.plan(),
                inputs.recording(other, optional=True),
                inputs.text("layers", "all", layers),
                inputs.choice("method", METHODS, method),
                inputs.choice("train_on", ["auto", "blocks", "rows"], "auto: block states where there are any."),
                *inputs.advanced(inputs.whole("thickness", 1, 1, 64, "Consecutive blocks that are trained together.")),
                inputs.whole("steps", 0, 0, 1_000_000, "Gradient steps; 0 = 32 for each layer, 200 for distill."),
                *inputs.advanced(
                    io.Float.Input("learning_rate", **rate, tooltip="The highest one; it falls to 0."),
                    inputs.whole("batch", 0, 0, 4096, "Recorded steps in one batch; 0 = 8, 32 for distill."),
                    inputs.choice("save_dtype", dtypes, "What the layers are saved as; 8 bits with a scale."),
                    inputs.whole("train_seed", 0, 0, inputs.MOST_SEED, "Of the held-out images and the batches."),
                    inputs.switch("mixed_precision", False, "Products in bfloat16: faster on a GPU."),
                ),
                inputs.text("folder", "", "Folder in output/flux_poke for the layers; empty = one that is named by the plan."),
                *inputs.advanced(
                    io.Boolean.Input("sequential", default=False, optional=True, tooltip=sequential),
                    io.Boolean.Input("just_evaluate", default=False, optional=True, tooltip=just_evaluate),
                ),
            ],
            [
                inputs.NameType.Output(display_name="folder", tooltip="For Load Replaced FLUX."),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="image", tooltip="Errors before and after, layer by layer."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: Any) -> str:
        """Another one where layers are gone that the folder's own list names: they are made again.

        What it is trained on reaches it through its links.
        """
        return inputs.missing_layers(folder)

    @classmethod
    def execute(
        cls, plan: PruningPlan, layers, method, train_on, thickness, steps, learning_rate, batch, save_dtype, train_seed,
        mixed_precision, folder, recording: Recording | None = None, sequential=False, just_evaluate=False,
    ) -> io.NodeOutput:  # fmt: skip
        name = folder.strip() or default_folder(plan)
        dense, source, out = open_dense(plan), recording or open_recording(plan), host.output_path(name)
        progress = computing.NodeProgress(cls.hidden.unique_id)
        with computing.training():
            stats = retrain(
                method, dense, plan, source, out, layers, train_on, LossCurve(), progress, steps=steps or None,
                learning_rate=learning_rate, batch=batch or None, thickness=thickness, save_dtype=save_dtype, seed=train_seed,
                mixed_precision=mixed_precision, sequential=sequential, just_evaluate=just_evaluate,
                device=str(computing.training_device()), graph=host.graph_metadata(cls.hidden),
            )  # fmt: skip
        if not just_evaluate:
            draw_stats(out)
        text, image = stats_table(stats), host.figure_image(stats_figure(stats))
        host.PictureProgress().end(host.to_pictures(image)[0])
        told, made = (text, ExecutionBlocker(None)) if just_evaluate else (f"{name}\n{text}", name)
        return io.NodeOutput(made, text, image, ui=host.shown(cls, told, image, stats_chart(stats)))


class LossCurve:
    """A training's progress on the node that runs, with the held-out loss of the layer at hand as a picture."""

    def __init__(self) -> None:
        self._progress = host.PictureProgress()
        self._layer, self._curve = "", [(0, 0.0)]

    def __call__(self, status: TrainingStatus) -> None:
        if status.layer != self._layer:
            self._layer, self._curve = status.layer, []
        self._curve.append((status.step, status.held_out_loss))
        done = status.layers_done * status.steps + status.step
        self._progress(done, status.layers * status.steps, curve_picture(status, self._curve))
        computing.throw_if_cancelled()


def curve_picture(status: TrainingStatus, curve: list[tuple[int, float]]) -> Image.Image:
    """Held-out loss by step, logarithmic, from the highest to the lowest so far."""
    width, height, edge = 512, 256, 24
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    logs = [math.log10(max(loss, 1e-30)) for _, loss in curve]
    low, high = min(logs), max(logs)
    scale = (height - 3 * edge) / max(high - low, 1e-9)
    places = [
        (edge + (width - 2 * edge) * step / status.steps, 2 * edge + (high - log) * scale)
        for (step, _), log in zip(curve, logs, strict=True)
    ]
    if len(places) > 1:
        draw.line(places, fill=(31, 119, 180), width=3)
    title = f"{status.layer} ({status.layers_done + 1} of {status.layers}), {status.seconds_left:.0f} s left"
    title += f", held-out loss {status.held_out_loss:.3g}"
    draw.text((edge, edge // 3), title, fill="black", font_size=16)
    for log, y in ((high, 2 * edge), (low, height - edge)):
        draw.text((width - edge, y), f"{10**log:.3g}", fill="gray", anchor="rm", font_size=12)
    return picture


class LoadReplacedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        checkpoint = "The dense FLUX whose layers were retrained, or that of the plan."
        plan = "The plan of the layers: it knows its checkpoint and its folder."
        folder = "Folder in output/flux_poke, from Retrain Layers, or the one that is named by the plan."
        folders = [inputs.OF_THE_PLAN, *lists.layer_folders()]
        last = "Last layer to replace (single blocks count on); -1 = all."
        return inputs.schema(
            cls,
            "Load Replaced FLUX",
            "Loads a FLUX with retrained layers in place of its own, of any width. The original flux-poke's layers load too. "
            "The file is not changed.",
            [
                inputs.checkpoint(inputs.OF_THE_PLAN, tooltip=checkpoint),
                inputs.weight_dtype(),
                inputs.PlanType.Input("plan", optional=True, tooltip=plan),
                inputs.choice("folder", folders, folder),
                *inputs.advanced(
                    inputs.whole("first_layer", 0, 0, 255, "First layer to replace."),
                    inputs.whole("last_layer", -1, -1, 255, last),
                ),
            ],
            [io.Model.Output(), io.String.Output(display_name="masked_count")],
        )

    @classmethod
    def validate_inputs(cls, folder=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, folder=folder)

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None = None, folder: str | None = None, **_: Any) -> str:
        """A folder out of Retrain Layers is another one through its link."""
        folder = inputs.unless_of_the_plan(folder or "")
        layers = inputs.times(*layer_files(host.output_path(folder)).values()) if folder else ""
        return f"{inputs.checkpoint_time(unet_name)} {layers}"

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, folder: str, first_layer: int, last_layer: int, plan: PruningPlan | None = None
    ) -> io.NodeOutput:
        folder = inputs.unless_of_the_plan(folder)
        if plan is None and (unet_name == inputs.OF_THE_PLAN or not folder):
            raise UserError("Which checkpoint and which layers? Connect the plan that they belong to, or choose both.")
        if plan is not None and unet_name == inputs.OF_THE_PLAN:
            dense = open_dense(plan)
        else:
            dense = Dense.open(loading.checkpoint_path(unet_name))
        source = host.output_path(folder if plan is None or folder else default_folder(plan))
        layers = RetrainedLayers.open(source, dense, first_layer, None if last_layer < 0 else last_layer)
        replaced = Replaced(dense, layers)
        model = loading.load_flux(replaced, weight_dtype, dense.metadata)
        folds = {name: replaced.fold(name) for name in replaced.plan.kept}
        report, vectors = replaced.work_out(), replaced.vectors
        model.set_attachments(PRUNED, PrunedModel(dense.layout, replaced.plan, folds, report, vectors, replaced))
        masked_count, ranks = replaced.plan.masked_count, replaced.plan.ranks
        text = f"{len(layers.layers)} layers replaced, neurons cut: {masked_count}"
        text += f", {len(ranks)} modulation layers truncated" if ranks else ""
        host.say(cls.hidden.unique_id, " ".join([text, *layers.notes(dense.layout)]))
        return io.NodeOutput(model, masked_count)
