"""Decode Block Previews and Animate Block Previews."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..analysis.animation import FORMATS, captioned_frames, choose_frames, write_animation
from ..analysis.generation import find_previews, generation_files, write_generations
from ..analysis.sheets import stacked
from . import host, inputs, lists
from .computing import NodeProgress
from .taps import BlockTapsType, TappedModel


class DecodeBlockPreviews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        view = (
            "x0: what the block takes the finished image for. euler: where one step by it would lead, which is noise early on."
        )
        metadata = (
            "Write how the image came about into the pictures, and this graph into the sheets (never with --disable-metadata)."
        )
        largest = (
            "Longest side of the pictures in images, which are held in memory (at 256, up to 0.8 MB each); files are of full "
            "size."
        )
        prompt = "What to write down as the prompt; by default the nearest text in the graph."
        names = "Names of the folders in output/flux_poke, one for each image of the batch."
        return inputs.schema(
            cls,
            "Decode Block Previews",
            "Decodes what every block predicted to pictures, in output/flux_poke/<generation id>, and draws them as sheets and "
            "in numbers.",
            [
                BlockTapsType.Input("block_taps", tooltip="From Tap Blocks."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                io.Latent.Input(
                    "after", tooltip="The sampler's latents: previews are decoded after it, and compared with them."
                ),
                inputs.choice("view", ["x0", "euler"], view, default="x0"),
                inputs.switch("captions", False, "Write step and block below each preview."),
                *inputs.advanced(
                    inputs.switch("decode", True, "Off: write the predictions' latents in the place of pictures."),
                    inputs.switch("metadata", True, metadata),
                    inputs.whole("largest", 256, 64, 8192, largest),
                ),
                io.String.Input("prompt", optional=True, force_input=True, tooltip=prompt),
            ],
            [
                io.Image.Output(display_name="images", tooltip="All previews: by step, double blocks, single blocks."),
                io.Image.Output(display_name="sheet", tooltip="All previews at a glance: steps across, blocks down."),
                io.Image.Output(display_name="differences", tooltip="How far each preview is from the final image."),
                io.Image.Output(display_name="chart", tooltip="Change, direction and error along the blocks."),
                inputs.NameType.Output(display_name="folder", is_output_list=True, tooltip=names),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, block_taps: TappedModel, vae, after, view, captions, decode, metadata, largest: int, prompt: str | None = None
    ) -> io.NodeOutput:
        run, decoder = block_taps.run_of(cls.hidden, "after"), host.decoder(vae)
        finals = host.to_pictures(decoder(after["samples"]).movedim(1, -1))
        bar = host.PictureProgress()
        previews: list[Image.Image] = []

        def show(picture: Image.Image) -> None:
            bar(len(previews) + 1, len(run.taps) * len(finals), picture)
            smaller = picture.copy()
            smaller.thumbnail((largest, largest), Image.Resampling.LANCZOS)
            previews.append(smaller)

        folders = write_generations(
            host.output_folder(),
            [run.generation(cls.hidden, prompt, final) for final in finals],
            run.taps,
            decoder if decode else None,
            finals,
            view=view,
            captions=captions,
            in_pictures=host.graph_metadata(cls.hidden) if metadata and host.metadata_enabled() else None,
            show=show,
        )
        names = [folder.name for folder in folders]
        said = host.said(cls, f"{len(run.taps)} predictions in flux_poke/{', '.join(names)}")
        shown = "sheet.png" if decode else "contributions.png"
        ui = {
            **said,
            "images": [host.output_file(folder / shown) for folder in folders],
            "flux_poke": [_for_capture(folder, generation_files(folder)) for folder in folders],
        }

        def opened(name: str) -> list[Image.Image]:
            return [host.open_picture(folder / name) for folder in folders]

        chart = host.to_images(opened("contributions.png"))
        if not decode:
            nothing = ExecutionBlocker(None)
            return io.NodeOutput(nothing, nothing, nothing, chart, [nothing], ui=ui)
        in_order = [preview for number in range(len(folders)) for preview in previews[number :: len(folders)]]
        sheets = opened(shown)
        bar.end(stacked(sheets))
        differences = host.to_images(opened("differences.png"))
        return io.NodeOutput(host.to_images(in_order), host.to_images(sheets), differences, chart, names, ui=ui)


class AnimateBlockPreviews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = (
            "From Decode Block Previews, or a folder in output/flux_poke that holds decoded/step_*/double_block_*.jpg; newest "
            "first."
        )
        order = "step: all blocks of a step, then the next. block: one block through all steps, then the next."
        font_size = "Of the captions; 0 leaves them out (as for previews that were decoded with captions)."
        return inputs.schema(
            cls,
            "Animate Block Previews",
            "Makes a film of decoded block previews: blocks.mp4, .gif or .webp in their folder.",
            [
                inputs.listed("folder", lists.preview_folders(), inputs.NO_PREVIEWS, folder),
                inputs.choice("format", FORMATS, "What kind of file.", default="mp4"),
                inputs.number("fps", 2.0, 0.1, 60.0, 0.5, "Frames per second."),
                inputs.choice("order", ["step", "block"], order, default="step"),
                inputs.choice("block_type", ["all", "double", "single"], "Which blocks.", default="all"),
                *inputs.advanced(
                    inputs.whole("max_blocks", 0, 0, 1000, "At most so many blocks of each type; 0 = all of them."),
                    inputs.whole("font_size", 24, 0, 200, font_size),
                ),
            ],
            [io.String.Output(display_name="file", tooltip="Its name in ComfyUI's output folder.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder=None, input_types=None) -> bool | str:
        return inputs.valid_names(cls, input_types, folder=folder)

    @classmethod
    def execute(cls, folder: str, format: str, fps: float, order, block_type, max_blocks: int, font_size: int) -> io.NodeOutput:
        path = host.output_path(inputs.chosen(folder)) / f"blocks.{format}"
        kind = None if block_type == "all" else block_type
        frames = choose_frames(find_previews(path.parent), order, kind, max_blocks or None)
        write_animation(path, captioned_frames(frames, font_size, NodeProgress()), fps, host.graph_metadata(cls.hidden))
        file = host.output_file(path)
        name = f"{file['subfolder']}/{path.name}"
        said = host.said(cls, f"{len(frames)} frames in {name}")
        written = _for_capture(path.parent, [path.name])
        return io.NodeOutput(name, ui={**said, "images": [file], "animated": (True,), "flux_poke": [written]})


def _for_capture(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """What `flux-poke capture` looks for in a node's `ui`: a generation's files, to be fetched."""
    return {"generation_id": folder.name, "subfolder": f"{host.FOLDER}/{host.name_of(folder)}", "files": list(files)}
