"""The atlas of neurons: adding up what was recorded, and the page that shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .terminal import progress_bar, whole


def show(
    recording: Annotated[Path, typer.Argument(help="Folder of a recording, as `record --what atlas` makes it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: RECORDING/page.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The FLUX that was recorded: also show which neurons write alike, and histograms from rows."),
    ] = None,
) -> None:
    """Write a page for the browser: the places where every neuron was strongest."""
    from ..analysis.atlas_page import INDEX, write_atlas_page
    from ..flux.checkpoint import Checkpoint
    from ..recording.recording import Recording

    found = Recording.open(recording)
    page = out or found.folder / "page"
    with progress_bar() as progress:
        atlas = write_atlas_page(found, page, Checkpoint(checkpoint) if checkpoint else None, progress)
    typer.echo(f"{page / INDEX}: {sum(len(site.value) for site in atlas.sites.values()):,} neurons, {len(atlas.images)} images")


def merge(
    recordings: Annotated[list[Path], typer.Argument(help="Folders of recordings of one model, with an atlas each.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: a new one, or one of those.")],
) -> None:
    """Add up the atlases of recordings of one model; an image that two of them hold counts once."""
    from ..files import replacing
    from ..recording.atlas import merge_atlases
    from ..recording.recording import Recording

    found, to = [Recording.open(recording) for recording in recordings], Recording.at(out)
    for one in found:
        one.require_atlas()
    total = merge_atlases(to.atlas_file, [one.atlas_file for one in found])
    for image in total.images:
        picture = to.atlas_picture(image.key)
        drawn = next((path for one in found if (path := one.atlas_picture(image.key)).is_file()), None)
        if drawn is not None and not picture.exists():
            with replacing(picture) as new:
                shutil.copyfile(drawn, new)
    typer.echo(f"{to.atlas_file}: {len(total.images)} images")


def sheet(
    recording: Annotated[Path, typer.Argument(help="Folder of a recording, as `record --what atlas` makes it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")],
    neurons: Annotated[
        str, typer.Option(help='Which ones, such as "double-img-3:1207, single-2:77" (default: the strongest of all).')
    ] = "",
    count: Annotated[int, whole(help="How many of the strongest.", least=1, most=100)] = 16,
    places: Annotated[int, whole(help="Pictures of each.", least=1, most=16)] = 8,
) -> None:
    """Draw some neurons as one picture: the places where each was strongest."""
    from ..analysis.atlas_sheet import named_neurons, neurons_sheet, strongest_neurons
    from ..files import IMAGES, check_picture, write_picture
    from ..recording.recording import Recording

    check_picture(out, IMAGES)
    found = Recording.open(recording)
    atlas = found.atlas()
    chosen = named_neurons(neurons, atlas) if neurons else strongest_neurons(atlas, count)
    write_picture(out, neurons_sheet(found, atlas, chosen, places))
    typer.echo(f"{out}: {len(chosen)} neurons")
