"""How far images or latents are from a reference: numbers, a table, files and a picture.

    reference = read_images("dense.png")             # [batch, 3, height, width] in 0..1; also folders and .latent files
    rows = [compare(read_images(path), reference, path) for path in variants]
    print(comparison_table(rows))
    write_comparisons("comparison.csv", rows)        # or .json
    side_by_side(rows, images, reference).save("comparison.png")

PSNR and SSIM are kornia's, which ComfyUI installs: the same numbers on both sides, and nothing new on the host.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import UserError
from ..files import check_text, size_text, write_text
from ..flux.autoencoder import to_picture
from ..flux.checkpoint import open_safetensors, require_finite
from .decoding import read_picture
from .sheets import GAP, GROUND, INK, MARGIN, PALE, font, heat_map, one_line

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LATENT_ENDINGS = (".latent", ".safetensors")

#: Of what drew: bytes of the model, and seconds a step; None where they are not known.
Known = tuple[float | None, float | None]

#: Side of SSIM's Gaussian window (Wang et al. 2004); smaller where the image is.
SSIM_WINDOW = 11
#: Rows of a side-by-side picture, the longest side of one image in it, and about the width of all of it.
MOST_ROWS, LONGEST, WIDEST = 8, 512, 2304
#: Letters of a name above it.
LONGEST_TITLE = 60


@dataclass(frozen=True)
class Comparison:
    """How far one variant is from the reference.

    Attributes:
        relative_mse: sum of squared differences / sum of squares of the reference.
        psnr: peak signal-to-noise ratio in dB; infinite where both are equal.
        ssim: mean structural similarity, 1 = equal.
    """

    name: str
    relative_mse: float
    psnr: float
    ssim: float

    @property
    def measures(self) -> tuple[str, str]:
        return f"relative MSE {self.relative_mse:.3g}", f"PSNR {self.psnr:.2f} dB · SSIM {self.ssim:.4f}"

    @property
    def text(self) -> str:
        return " · ".join(self.measures)

    def result(self, reference: Known, variant: Known) -> str:
        """What was gained and what it cost, in one line: "22.1 -> 17.8 GB in memory, PSNR 38.2 dB, 1.9 -> 1.6 s a step".

        What is not known of the variant is left out, and so is the half that is not known of the reference.
        """
        (size, seconds), (new_size, new_seconds) = reference, variant
        parts = [f"PSNR {self.psnr:.1f} dB"]
        if new_size is not None:
            after = size_text(new_size)
            before = "" if size is None else size_text(size).removesuffix(after[-3:]) + " -> "
            parts.insert(0, f"{before}{after} in memory")
        if new_seconds is not None:
            before = "" if seconds is None else f"{seconds:.2g} -> "
            parts.append(f"{before}{new_seconds:.2g} s a step")
        return ", ".join(parts)


#: Of a written table.
COLUMNS = [field.name for field in fields(Comparison)]


def compare(variant: Tensor, reference: Tensor, name: str = "") -> Comparison:
    """The measures of `variant` against `reference`, both [batch, channels, height, width], over the whole batch.

    PSNR and SSIM refer to a range of 1; where there are other than 3 channels (latents), to the reference's own. Raises
    `UserError` where the two have different shapes, or hold numbers that are not finite.
    """
    if variant.shape != reference.shape:
        raise UserError(
            f"{name or 'The variant'} is {_size(variant)}, the reference {_size(reference)}: only equal sizes can be compared."
        )
    from kornia.metrics import ssim

    a, b = variant.detach().cpu().double(), reference.detach().cpu().double()
    for what, pixels in ((name or "The variant", a), ("The reference", b)):
        if not pixels.isfinite().all():
            raise UserError(f"{what} holds numbers that are not finite, with which nothing can be compared: draw it again.")
    peak = 1.0 if b.shape[1] == 3 else float(b.max() - b.min()) or 1.0
    squares = (a - b).square()
    window = min(SSIM_WINDOW, *b.shape[-2:])
    error, power = squares.sum().item(), b.square().sum().item()
    # of equal images it is 1, which kornia's rounding misses
    similarity = ssim(a, b, window - 1 + window % 2, max_val=peak, padding="valid").mean().item() if error else 1.0
    psnr = 10 * math.log10(peak**2 / squares.mean().item()) if error else math.inf
    return Comparison(name, error / power if power else math.inf if error else 0.0, psnr, similarity)


def comparison_table(rows: Sequence[Comparison]) -> str:
    """One line per variant, fixed-width text."""
    width = max(8, *(len(row.name) for row in rows)) if rows else 8
    lines = [f"{'variant':<{width}}{'rel. MSE':>12}{'PSNR dB':>10}{'SSIM':>9}"]
    lines += [f"{row.name:<{width}}{row.relative_mse:>12.3g}{row.psnr:>10.2f}{row.ssim:>9.4f}" for row in rows]
    return "\n".join(lines)


def check_comparisons(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` where `path` is neither .csv nor .json, or a file is there that is not a table of comparisons."""
    path = Path(path)
    if path.suffix == ".json":
        check_text(path, "a table of comparisons", lambda text: all([*row] == COLUMNS for row in json.loads(text)))
    elif path.suffix == ".csv":
        check_text(path, "a table of comparisons", lambda text: text.split("\n")[0].rstrip() == ",".join(COLUMNS))
    else:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}: comparisons are written as .csv or .json.")


def write_comparisons(path: str | os.PathLike[str], rows: Sequence[Comparison]) -> None:
    """Writes a .csv or .json (an infinite PSNR is empty there, and null here); raises `UserError` as `check_comparisons`."""
    check_comparisons(path)
    table = [{key: None if value == math.inf else value for key, value in asdict(row).items()} for row in rows]
    if Path(path).suffix == ".json":
        return write_text(path, json.dumps(table, indent=2) + "\n")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "name": _no_formula(str(row["name"]))} for row in table)
    write_text(path, text.getvalue())


def _no_formula(name: str) -> str:
    """The name of a variant as spreadsheets show it: what begins with one of these signs is worked out by them."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def side_by_side(
    rows: Sequence[Comparison], variants: Sequence[Tensor], reference: Tensor, heading: str = "reference"
) -> Image.Image:
    """Reference, then each variant and where it differs, one row per image of the batch [batch, 3, height, width].

    `rows` are the variants' measures. Differences have one scale, named above them. Latents are shown by their first three
    channels. At most `MOST_ROWS` images.
    """
    differences = [(variant - reference)[:MOST_ROWS].float().abs().mean(1).cpu().numpy() for variant in variants]
    most = max(float(np.quantile(difference, 0.995)) for difference in differences) or 1.0
    columns: list[tuple[tuple[str, ...], list[Image.Image]]] = [((heading,), pictures(reference))]
    for row, variant, difference in zip(rows, variants, differences, strict=True):
        name = one_line(row.name, LONGEST_TITLE) or "variant"
        columns.append(((name, *row.measures), pictures(variant)))
        columns.append((("difference", f"white = {most:.3g}"), [heat_map(image / most) for image in difference]))

    height, width = reference.shape[-2:]
    longest = min(LONGEST, WIDEST // len(columns))
    scale = min(longest / max(height, width), max(1, round(256 / max(height, width))))
    cell = round(width * scale), round(height * scale)
    text, line = font(15), 22
    top = MARGIN + 3 * line
    widths = [max(cell[0], *(round(text.getlength(title)) for title in titles)) + 4 * GAP for titles, _ in columns]
    picture = Image.new("RGB", (sum(widths) + 2 * MARGIN, top + len(differences[0]) * (cell[1] + GAP) + MARGIN), GROUND)
    draw = ImageDraw.Draw(picture)
    x = MARGIN
    for (titles, images), column in zip(columns, widths, strict=True):
        for number, title in enumerate(titles):
            draw.text((x, MARGIN + number * line), title, PALE if number else INK, text)
        for number, image in enumerate(images):
            picture.paste(image.resize(cell, Image.Resampling.LANCZOS), (x, top + number * (cell[1] + GAP)))
        x += column
    return picture


def read_images(path: str | os.PathLike[str]) -> Tensor:
    """An image, a folder of images (in numeric order) or a ComfyUI latent, float32 [batch, channels, height, width].

    Raises `UserError` where there is none, or the images of a folder differ in size.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS), key=_numeric)
        if not files:
            raise UserError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)}).")
        images = [_read_image(file) for file in files]
        for file, image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(f"{file} is {_size(image)}, {files[0]} {_size(images[0])}: expected one size in a folder.")
        return torch.cat(images)
    if path.suffix.lower() in LATENT_ENDINGS:
        with open_safetensors(path) as file:
            if "latent_tensor" not in file.keys():
                raise UserError(
                    f"{path} is not a latent: expected a tensor called latent_tensor, as ComfyUI's Save Latent writes."
                )
            latent = require_finite(file.get_tensor("latent_tensor").float(), str(path))
        if latent.ndim != 4:
            raise UserError(
                f"{path} holds a latent of the shape {tuple(latent.shape)}; expected four dimensions, the batch first."
            )
        return latent
    return _read_image(path)


def _read_image(path: Path) -> Tensor:
    return torch.tensor(np.asarray(read_picture(path))).permute(2, 0, 1)[None].float() / 255


def pictures(images: Tensor) -> list[Image.Image]:
    """At most `MOST_ROWS` images [batch, channels, height, width]: those in 0..1 as they are, latents by three channels
    stretched to 0..1."""
    if images.shape[1] != 3:
        images = (images[:, :3] if images.shape[1] > 3 else images[:, :1].expand(-1, 3, -1, -1)) / 6 + 0.5
    return [to_picture(image) for image in images[:MOST_ROWS]]


def _size(images: Tensor) -> str:
    batch, channels, height, width = images.shape
    return f"{batch} of {width}x{height} with {channels} channels"


def _numeric(path: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
