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
        typer.Option(
            help="The FLUX that was recorded: also show which neurons write alike, histograms from rows, and, of a model of "
            "the tiny kind, what each neuron writes."
        ),
    ] = None,
    lens: Annotated[
        Path | None, typer.Option(help="Show what neurons write through a tuned lens (`lens fit`); with --checkpoint.")
    ] = None,
) -> None:
    """Write a page for the browser: the places where every neuron was strongest."""
    from ..analysis.atlas_page import INDEX, write_atlas_page
    from ..analysis.lens import Lens
    from ..errors import UserError
    from ..flux.checkpoint import Checkpoint
    from ..recording.recording import Recording
    from ..tiny.model import autoencoder_of

    opened = Checkpoint(checkpoint) if checkpoint else None
    autoencoder = autoencoder_of(opened) if opened else None
    if lens and autoencoder is None:
        raise UserError("--lens is for what neurons write: give --checkpoint too, a FLUX of the tiny kind.")
    tuned = Lens.load(lens) if lens else None
    found = Recording.open(recording)
    page = out or found.folder / "page"
    decode = autoencoder.decode if autoencoder is not None else None
    with progress_bar() as progress:
        atlas = write_atlas_page(found, page, opened, progress, decode, tuned)
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
    checkpoint: Annotated[
        Path | None, typer.Option(help="The FLUX that was recorded, of the tiny kind: also show what each neuron writes.")
    ] = None,
) -> None:
    """Draw some neurons as one picture: the places where each was strongest."""
    from ..analysis.atlas_sheet import named_neurons, neurons_sheet, strongest_neurons
    from ..analysis.written import Writer, written_pictures
    from ..errors import UserError
    from ..files import IMAGES, check_picture, write_picture
    from ..flux.checkpoint import Checkpoint
    from ..flux.fingerprint import Fingerprint
    from ..recording.manifest import require_model
    from ..recording.recording import Recording
    from ..tiny.model import autoencoder_of

    check_picture(out, IMAGES)
    found = Recording.open(recording)
    atlas = found.atlas()
    chosen = named_neurons(neurons, atlas) if neurons else strongest_neurons(atlas, count)
    written = None
    if checkpoint:
        opened = Checkpoint(checkpoint)
        require_model(atlas.fingerprint, Fingerprint.of_checkpoint(opened), found.folder, str(checkpoint))
        autoencoder, writer = autoencoder_of(opened), Writer.of(opened, opened.layout)
        if autoencoder is None or writer is None:
            raise UserError(
                f"{checkpoint} is not of the tiny kind: what its neurons write is shown by Show Neurons in ComfyUI."
            )
        written = written_pictures(writer, autoencoder.decode, atlas, chosen)
    write_picture(out, neurons_sheet(found, atlas, chosen, places, written))
    typer.echo(f"{out}: {len(chosen)} neurons")
