"""Retrain Layers and Load Replaced FLUX."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image, ImageDraw

from ..analysis.report import figure_pixels
from ..errors import UserError
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.planning import open_dense, open_recording
from ..recording.recording import Recording
from ..retrain.files import default_folder, draw_stats, stats_figure, stats_table
from ..retrain.layers import METHODS, retrain
from ..retrain.options import TrainingStatus
from ..retrain.replaced import Replaced, RetrainedLayers
from . import computing, host, loading
from .inputs import (
    OF_THE_PLAN,
    PlanType,
    checkpoint_input,
    checkpoint_time,
    layer_times,
    missing_layers,
    plan_input,
    recording_input,
    weight_dtype_input,
)
from .pruned import PRUNED, PrunedModel


class RetrainLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRetrainLayers",
            display_name="Retrain Layers",
            category=host.CATEGORY,
            description="Trains what a plan leaves of each layer against what the dense model did, and saves the layers. "
            "Cancel keeps those that are finished; run again, it goes on.",
            is_output_node=True,
            inputs=[
                plan_input(),
                recording_input("What to train on, where it is not the recording that the plan was made from.", optional=True),
                io.String.Input(
                    "layers",
                    default="all",
                    tooltip="Such as 0-18 (single blocks count on from the double ones), or 'double 3, single'.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    tooltip="both: least squares, then gradient steps. distill: all layers at once, on trajectories; the "
                    "whole model has to fit on the device.",
                ),
                io.Combo.Input(
                    "train_on", options=["auto", "blocks", "rows"], tooltip="auto: block states where there are any."
                ),
                io.Int.Input("thickness", default=1, min=1, max=64, tooltip="Consecutive blocks that are trained together."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Gradient steps; 0 = 32 for each layer, 200 for distill.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=5e-4,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="The highest one; it falls to 0.",
                ),
                io.Int.Input(
                    "batch", default=0, min=0, max=4096, tooltip="Recorded steps in one batch; 0 = 8, 32 for distill."
                ),
                io.Combo.Input(
                    "save_dtype",
                    options=["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"],
                    tooltip="What the layers are saved as; 8 bits with a scale.",
                ),
                io.Int.Input("train_seed", default=0, min=0, max=2**31 - 1, tooltip="Of the held-out images and the batches."),
                io.Boolean.Input("mixed_precision", default=False, tooltip="Products in bfloat16: faster on a GPU."),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder in output/flux_poke for the layers; empty = one that is named by the plan.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="folder", tooltip="For Load Replaced FLUX."),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="image", tooltip="Errors before and after, layer by layer."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **inputs: Any) -> str:
        """Another one where layers are gone that the folder's own list names: they are made again.

        What it is trained on reaches it through its links.
        """
        return missing_layers(folder)

    @classmethod
    def execute(
        cls, plan: PruningPlan, layers, method, train_on, thickness, steps, learning_rate, batch, save_dtype, train_seed,
        mixed_precision, folder, recording: Recording | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        name = folder.strip() or default_folder(plan)
        dense, source, out = open_dense(plan), recording or open_recording(plan), host.output_path(name)
        progress = computing.NodeProgress(cls.hidden.unique_id)
        with computing.training():
            stats = retrain(
                method, dense, plan, source, out, layers, train_on, LossCurve(), progress, steps=steps or None,
                learning_rate=learning_rate, batch=batch or None, thickness=thickness, save_dtype=save_dtype, seed=train_seed,
                mixed_precision=mixed_precision, device=str(computing.training_device()),
            )  # fmt: skip
        draw_stats(out)
        text, image = stats_table(stats), host.to_image(figure_pixels(stats_figure(stats)))
        host.PictureProgress().end(host.to_pictures(image)[0])
        host.say(cls.hidden.unique_id, f"{name}\n{text}")
        return io.NodeOutput(name, text, image, ui=ui.PreviewImage(image, cls=cls))


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
        return io.Schema(
            node_id="FluxPokeLoadReplacedFlux",
            display_name="Load Replaced FLUX",
            category=host.CATEGORY,
            description="Loads a FLUX with retrained layers in place of its own, of any width. The original flux-poke's layers "
            "load too. The file is not changed.",
            inputs=[
                checkpoint_input(OF_THE_PLAN, tooltip="The dense FLUX whose layers were retrained, or that of the plan."),
                weight_dtype_input(),
                PlanType.Input(
                    "plan", optional=True, tooltip="The plan of the layers: it knows its checkpoint and its folder."
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder in output/flux_poke, from Retrain Layers; empty = the one that is named by the plan.",
                ),
                io.Int.Input("first_layer", default=0, min=0, max=255, tooltip="First layer to replace."),
                io.Int.Input(
                    "last_layer",
                    default=-1,
                    min=-1,
                    max=255,
                    tooltip="Last layer to replace (single blocks count on); -1 = all.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="masked_count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """A folder out of Retrain Layers is another one through its link."""
        return f"{checkpoint_time(inputs.get('unet_name'))} {layer_times(inputs.get('folder'))}"

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, folder: str, first_layer: int, last_layer: int, plan: PruningPlan | None = None
    ) -> io.NodeOutput:
        if plan is None and (unet_name == OF_THE_PLAN or not folder.strip()):
            raise UserError("Which checkpoint and which layers? Connect the plan that they belong to, or choose both.")
        if plan is not None and unet_name == OF_THE_PLAN:
            dense = open_dense(plan)
        else:
            dense = Dense.open(loading.checkpoint_path(unet_name))
        source = host.output_path(folder if plan is None or folder.strip() else default_folder(plan))
        layers = RetrainedLayers.open(source, dense, first_layer, None if last_layer < 0 else last_layer)
        replaced = Replaced(dense, layers)
        model = loading.load_flux(replaced, weight_dtype, dense.metadata)
        folds = {name: replaced.fold(name) for name in replaced.plan.kept}
        model.set_attachments(PRUNED, PrunedModel(dense.layout, replaced.plan, folds, replaced.work_out()))
        masked_count = replaced.plan.masked_count
        text = f"{len(layers.layers)} layers replaced, neurons cut: {masked_count}"
        host.say(cls.hidden.unique_id, " ".join([text, layers.describe_missing(dense.layout)]).strip())
        return io.NodeOutput(model, masked_count)
