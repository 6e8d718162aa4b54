"""Previews of blocks, the lens on them, and comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..files import IMAGES
from .terminal import Device, number, picture, progress_bar, table, whole


def animate(
    folder: Annotated[Path, typer.Argument(help="A generation's folder, or one with decoded/step_*/double_block_*.jpg.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default: DIR/blocks.FORMAT.")] = None,
    format_: Annotated[Literal["gif", "mp4", "webp"], typer.Option("--format")] = "gif",
    fps: Annotated[float, number(help="Frames per second.", least=0.01, most=100)] = 2.0,
    block_type: Annotated[Literal["double", "single"] | None, typer.Option(help="Default: both.")] = None,
    max_blocks: Annotated[int | None, whole(help="At most this many blocks of each type.", least=1)] = None,
    font_size: Annotated[int, whole(help="Of the captions; 0 leaves them out.", least=0, most=200)] = 24,
    order: Annotated[
        Literal["step", "block"], typer.Option(help="Step by step, or one block through all steps, then the next.")
    ] = "step",
) -> None:
    """Make a GIF, MP4 or WebP of decoded block previews."""
    from ..analysis.animation import captioned_frames, check_animation, choose_frames, write_animation
    from ..analysis.generation import find_previews

    path = out or folder / f"blocks.{format_}"
    check_animation(path, fps)
    chosen = choose_frames(find_previews(folder), order, block_type, max_blocks)
    with progress_bar() as progress:
        write_animation(path, captioned_frames(chosen, font_size, progress), fps)
    typer.echo(f"{path}: {len(chosen)} frames")


def compare(
    reference: Annotated[Path, typer.Argument(help="An image, a folder of images, or a .latent: the dense model's.")],
    variants: Annotated[list[Path], typer.Argument(help="What to compare with it, of the same size.")],
    picture: Annotated[Path | None, picture("Draw them side by side.", IMAGES)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table (.csv or .json).")] = None,
) -> None:
    """Relative MSE, PSNR and SSIM of images or latents against a reference."""
    from ..analysis import metrics
    from ..files import check_not_read, write_picture

    for written in filter(None, (picture, out)):
        check_not_read(written, [reference, *variants])
    if out:
        metrics.check_comparisons(out)
    goal = metrics.read_images(reference)
    images = [metrics.read_images(variant) for variant in variants]
    rows = [metrics.compare(image, goal, str(variant)) for image, variant in zip(images, variants, strict=True)]
    typer.echo(metrics.comparison_table(rows))
    if out:
        metrics.write_comparisons(out, rows)
    if picture:
        named = [replace(row, name=variant.name) for row, variant in zip(rows, variants, strict=True)]
        write_picture(picture, metrics.side_by_side(named, images, goal, reference.name))


def fit(
    recording: Annotated[Path, typer.Argument(help="Folder of a recording with lens rows, as `record --what lens` makes it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("lens.safetensors"),
    picture: Annotated[Path | None, picture("Also draw how replaceable each block is.")] = None,
    device: Device = "cpu",
) -> None:
    """Fit the affine map from each block's tokens to the last block's."""
    from ..analysis.contributions import lens_figure
    from ..analysis.lens import FORMAT, fit_lens
    from ..files import check_replaces, write_picture
    from ..recording.lens_rows import LensRows
    from ..recording.recording import Recording

    check_replaces(out, FORMAT)
    rows = LensRows(Recording.open(recording).states_folder)
    with progress_bar() as progress:
        lens = fit_lens(rows, device=device, progress=progress)
    lens.save(out)
    found = [[block.title, lens.raw_errors[block], lens.errors[block]] for block in sorted(lens.errors)]
    table(("block", "error_without", "error_with_lens"), found)
    if picture:
        write_picture(picture, lens_figure(lens))
    typer.echo(f"{out}: fitted on {lens.rows:,} tokens of {lens.images:,} images; errors are on images it was not fitted on")
