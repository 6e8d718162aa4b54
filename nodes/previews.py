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
from . import host
from .computing import NodeProgress
from .taps import BlockTapsType, TappedModel


class DecodeBlockPreviews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeDecodeBlockPreviews",
            display_name="Decode Block Previews",
            category=host.CATEGORY,
            description="Decodes what every block predicted to pictures, in output/flux_poke/<generation id>, "
            "and draws them as sheets and in numbers.",
            is_output_node=True,
            inputs=[
                BlockTapsType.Input("block_taps", tooltip="From Tap Blocks."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                io.Latent.Input(
                    "after", tooltip="The sampler's latents: previews are decoded after it, and compared with them."
                ),
                io.Combo.Input(
                    "view",
                    options=["x0", "euler"],
                    default="x0",
                    tooltip="x0: what the block takes the finished image for. euler: where one step by it would lead, "
                    "which is noise early on.",
                ),
                io.Boolean.Input("captions", default=False, tooltip="Write step and block below each preview."),
                io.Boolean.Input(
                    "decode", default=True, tooltip="Off: write the predictions' latents in the place of pictures."
                ),
                io.Boolean.Input(
                    "metadata",
                    default=True,
                    tooltip="Write how the image came about into the pictures, and this graph into the sheets "
                    "(never with --disable-metadata).",
                ),
                io.Int.Input(
                    "largest",
                    default=256,
                    min=64,
                    max=8192,
                    tooltip="Longest side of the pictures in `images`, which are held in memory (at 256, up to 0.8 MB each); "
                    "files are of full size.",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="What to write down as the prompt; by default the nearest text in the graph.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All previews: by step, double blocks, single blocks."),
                io.Image.Output(display_name="sheet", tooltip="All previews at a glance: steps across, blocks down."),
                io.Image.Output(display_name="differences", tooltip="How far each preview is from the final image."),
                io.Image.Output(display_name="chart", tooltip="Change, direction and error along the blocks."),
                io.String.Output(
                    display_name="folder",
                    is_output_list=True,
                    tooltip="Names of the folders in output/flux_poke, one for each image of the batch.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
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
        host.say(cls.hidden.unique_id, f"{len(run.taps)} predictions in flux_poke/{', '.join(names)}")
        shown = "sheet.png" if decode else "contributions.png"
        ui = {
            "images": [host.output_file(folder / shown) for folder in folders],
            "flux_poke": [_for_capture(folder, generation_files(folder)) for folder in folders],
        }

        def opened(name: str) -> list[Image.Image]:
            return [host.open_picture(folder / name) for folder in folders]

        def drawn(name: str):
            return host.to_images(opened(name))

        chart = drawn("contributions.png")
        if not decode:
            nothing = ExecutionBlocker(None)
            return io.NodeOutput(nothing, nothing, nothing, chart, [nothing], ui=ui)
        in_order = [preview for number in range(len(folders)) for preview in previews[number :: len(folders)]]
        bar.end(stacked(opened(shown)))
        return io.NodeOutput(host.to_images(in_order), drawn("sheet.png"), drawn("differences.png"), chart, names, ui=ui)


class AnimateBlockPreviews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeAnimateBlockPreviews",
            display_name="Animate Block Previews",
            category=host.CATEGORY,
            description="Makes a film of decoded block previews: blocks.mp4, .gif or .webp in their folder.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="From Decode Block Previews, or the name of a folder in output/flux_poke that holds "
                    "decoded/step_*/double_block_*.jpg.",
                ),
                io.Combo.Input("format", options=list(FORMATS), default="mp4", tooltip="What kind of file."),
                io.Float.Input("fps", default=2.0, min=0.1, max=60.0, step=0.5, tooltip="Frames per second."),
                io.Combo.Input(
                    "order",
                    options=["step", "block"],
                    default="step",
                    tooltip="step: all blocks of a step, then the next. block: one block through all steps, then the next.",
                ),
                io.Combo.Input("block_type", options=["all", "double", "single"], default="all", tooltip="Which blocks."),
                io.Int.Input(
                    "max_blocks", default=0, min=0, max=1000, tooltip="At most so many blocks of each type; 0 = all of them."
                ),
                io.Int.Input(
                    "font_size",
                    default=24,
                    min=0,
                    max=200,
                    tooltip="Of the captions; 0 leaves them out (as for previews that were decoded with captions).",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Its name in ComfyUI's output folder.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, folder: str, format: str, fps: float, order, block_type, max_blocks: int, font_size: int) -> io.NodeOutput:
        path = host.output_path(folder) / f"blocks.{format}"
        kind = None if block_type == "all" else block_type
        frames = choose_frames(find_previews(path.parent), order, kind, max_blocks or None)
        progress = NodeProgress(cls.hidden.unique_id, in_words=False)
        write_animation(path, captioned_frames(frames, font_size, progress), fps)
        file = host.output_file(path)
        name = f"{file['subfolder']}/{path.name}"
        host.say(cls.hidden.unique_id, f"{len(frames)} frames in {name}")
        written = _for_capture(path.parent, [path.name])
        return io.NodeOutput(name, ui={"images": [file], "animated": (True,), "flux_poke": [written]})


def _for_capture(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """What `flux-poke capture` looks for in a node's `ui`: a generation's files, to be fetched."""
    return {"generation_id": folder.name, "subfolder": f"{host.FOLDER}/{host.name_of(folder)}", "files": list(files)}
