"""The files of one generated image and of what its blocks predicted, in a folder named after its id.

generation = Generation(model="flux1-dev", prompt="a fox", width=1024, height=1024, seed=7, guidance=2.5, timesteps=sigmas)
folders = write_generations(output, [generation], taps, decode, finals=[image])

{generation_id}/img_0.jpg, metadata.json, sheet.png, differences.png, contributions.png
{generation_id}/raw/step_{s}/double_block_{i}.safetensors, context.safetensors    (`raw.py`)
{generation_id}/intermediates/decoded/step_{s}/double_block_{i}.jpg, single_block_{i}.jpg

find_previews(folder)                            # [(Tap, path), ...], in numeric order; also from a `decoded` folder alone
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from ..errors import UserError
from ..files import replacing, write_safetensors, write_text
from ..flux.blocks import Block
from ..progress import Progress, silent
from ..recording.manifest import utc_now
from .contributions import block_contributions, contributions_figure
from .decoding import Decode, decode_taps
from .graphs import fit_jpeg, graph_exif
from .raw import write_raw
from .report import darkened, figure_pixels
from .sheets import captioned, cell_size, contact_sheet, difference_sheet
from .taps import BlockTaps, Tap, View

SOFTWARE = "flux-poke"


@dataclass(frozen=True)
class Generation:
    """How one image came about; `timesteps` are its noise levels (1 = noise), `timestamp` is UTC."""

    model: str
    prompt: str
    width: int
    height: int
    seed: int | None
    timesteps: Sequence[float]
    guidance: float | None = None
    generation_id: str = field(default_factory=lambda: secrets.token_hex(4))
    timestamp: str = field(default_factory=utc_now)

    @property
    def num_steps(self) -> int:
        return max(0, len(self.timesteps) - 1)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "timesteps": list(self.timesteps), "num_steps": self.num_steps}, indent=2)


def write_generations(
    out: str | os.PathLike[str],
    generations: Sequence[Generation],
    taps: BlockTaps,
    decode: Decode | None,
    finals: Sequence[Image.Image],
    *,
    batch: int = 4,
    view: View = "x0",
    captions: bool = False,
    in_pictures: Mapping[str, str] | None = None,
    progress: Progress = silent,
    show: Callable[[Image.Image], None] | None = None,
) -> list[Path]:
    """Decodes all predictions and writes one folder for each image of the batch; the folders.

    Args:
        generations, finals: how each image came about, and the image.
        decode: the autoencoder; None writes latents in the place of previews and sheets.
        captions: whether previews carry their step and block.
        in_pictures: what goes into sheets and the final image beside the generation (ComfyUI's `workflow` and `prompt`), so
            that a picture that is dragged in restores the graph; None = nothing at all goes into pictures.
        progress: told of every preview that is written; raise from it to stop, what was written so far stays.
        show: given every preview, just before `progress` is told of it.

    Raises `UserError` where nothing was tapped, or the run drew another number of images than there are finals.
    """
    if taps.images != len(finals):
        raise UserError(
            f"The tapped run drew {taps.images} images, and {len(finals)} came as its result: expected the latents of that run."
        )
    folders = [Path(out) / generation.generation_id for generation in generations]
    exif = [None if in_pictures is None else generation for generation in generations]
    for folder, generation, final, known in zip(folders, generations, finals, exif, strict=True):
        write_text(folder / "metadata.json", generation.to_json() + "\n")
        save_jpeg(folder / "img_0.jpg", final, known, in_pictures)

    write_raw(folders, taps)
    text = [None if in_pictures is None else {**in_pictures, SOFTWARE: one.to_json()} for one in generations]
    for number, folder in enumerate(folders):
        chart = contributions_figure(block_contributions(taps, number))
        save_png(folder / "contributions.png", Image.fromarray(figure_pixels(darkened(chart))), text[number])
    if decode is None:
        _write_latents(folders, taps, view)
        return folders

    steps, blocks = len(taps.steps), len({tap.block for tap in taps})
    small: list[dict[Tap, Image.Image]] = [{} for _ in generations]
    widest = max((tap.title for tap in taps), key=len)
    for done, frame in enumerate(decode_taps(taps, decode, batch, view), start=1):
        image = captioned(frame.image, frame.tap.title, widest=widest) if captions else frame.image
        save_jpeg(folders[frame.number] / preview_path(frame.tap), image, exif[frame.number])
        cell = cell_size(steps, blocks, frame.image)
        small[frame.number][frame.tap] = frame.image.resize(cell, Image.Resampling.LANCZOS)
        if show is not None:
            show(image)
        progress(f"decoding {frame.tap.title}", done, len(taps) * len(generations))

    sigmas = {step: taps.sigma(step) for step in taps.steps}
    for folder, one, images, final, chunks in zip(folders, generations, small, finals, text, strict=True):
        save_png(folder / "sheet.png", contact_sheet(images, one.prompt, sigmas, final), chunks)
        save_png(folder / "differences.png", difference_sheet(images, final, one.prompt, sigmas), chunks)
    return folders


def _write_latents(folders: Sequence[Path], taps: BlockTaps, view: View) -> None:
    """One file a step: `double_block_{i}`, `single_block_{i}` [channels, height, width], in the autoencoder's space."""
    for step in taps.steps:
        latents = {tap.block: taps.to_autoencoder(taps.latent(tap, view)) for tap in taps if tap.step == step}
        for number, folder in enumerate(folders):
            tensors = {f"{block.kind}_block_{block.index}": batch[number] for block, batch in latents.items()}
            path = folder / "intermediates" / "latents" / f"step_{step}.safetensors"
            write_safetensors(path, tensors, {"view": view, "sigma": str(taps.sigma(step))})


def preview_path(tap: Tap) -> Path:
    return Path("intermediates") / "decoded" / f"step_{tap.step}" / f"{tap.block.kind}_block_{tap.block.index}.jpg"


def find_previews(folder: str | os.PathLike[str]) -> list[tuple[Tap, Path]]:
    """All predictions in `folder` (a generation's, its `intermediates`, its `decoded`), by step, then block, in numeric order.

    Raises `UserError` where there are none.
    """
    folder = Path(folder)
    for root in (folder / "intermediates" / "decoded", folder / "decoded", folder):
        found = []
        for path in root.glob("step_*/*_block_*.*"):
            name = f"{path.parent.name}/{path.name}"
            if match := re.fullmatch(r"step_(\d+)/(double|single)_block_(\d+)\.(?:jpe?g|png|webp)", name):
                found.append((Tap(int(match[1]), Block.named(f"{match[2]}-{match[3]}")), path))
        if found:
            return sorted(found)
    raise UserError(
        f"{folder} holds no block previews: expected files such as decoded/step_0/double_block_0.jpg in it, as Decode Block "
        "Previews writes them."
    )


def generation_files(folder: str | os.PathLike[str]) -> list[str]:
    """Everything in a generation's folder, as names relative to it with forward slashes: what `flux-poke capture` fetches."""
    folder = Path(folder)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def save_jpeg(path: Path, image: Image.Image, generation: Generation | None, graph: Mapping[str, str] | None = None) -> None:
    """A JPEG with the generation in its EXIF (prompt as description, all of it as JSON in the user comment), if given, and the
    graph (`graphs.py`), if there is room for it."""
    options = {}
    if generation is not None:
        exif = options["exif"] = graph_exif(graph)
        exif[Base.Software] = SOFTWARE
        exif[Base.Model] = generation.model
        exif[Base.ImageDescription] = generation.prompt
        exif.get_ifd(IFD.Exif)[Base.UserComment] = b"ASCII\0\0\0" + generation.to_json().encode("ascii")
        fit_jpeg(exif)
    with replacing(path) as new:
        image.convert("RGB").save(new, "JPEG", quality=95, **options)


def save_png(path: Path, image: Image.Image, text: Mapping[str, str] | None) -> None:
    """A PNG with text chunks, if given."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with replacing(path) as new:
        image.save(new, "PNG", pnginfo=info)
