"""Pictures of many block predictions at once: sheets with steps across and blocks down, and captions.

sheet = contact_sheet({frame.tap: frame.image for frame in frames}, "three")
differences = difference_sheet(images, final, "three")
captioned(frame.image, frame.tap.title)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..flux.blocks import Block
from .taps import Tap

#: Longest side of a sheet, and the sizes a cell may take to stay below it.
LONGEST, SMALLEST_CELL, LARGEST_CELL = 4096, 40, 112
GAP, MARGIN = 3, 18
#: Dark: sheets are looked at on the dark nodes of ComfyUI, and pictures stand out.
INK, PALE, EMPTY, GROUND = (226, 226, 230), (152, 152, 160), (52, 52, 57), (32, 32, 36)
KIND_COLORS = {"double": (128, 168, 240), "single": (236, 156, 84)}


def contact_sheet(
    images: Mapping[Tap, Image.Image],
    title: str = "",
    sigmas: Mapping[int, float] | None = None,
    final: Image.Image | None = None,
) -> Image.Image:
    """All predictions as one picture: steps (and their noise levels) across, blocks down, the final image on the right."""
    return _grid(_small(images), one_line(title), sigmas, final)


def difference_sheet(
    images: Mapping[Tap, Image.Image], final: Image.Image, title: str = "", sigmas: Mapping[int, float] | None = None
) -> Image.Image:
    """How far each prediction is from the final image: mean difference of the channels, one scale for all."""
    small = _small(images)
    goal = _values(final.resize(next(iter(small.values())).size, Image.Resampling.LANCZOS))
    differences = {tap: np.abs(_values(image) - goal).mean(-1) for tap, image in small.items()}
    most = max(float(np.quantile(difference, 0.99)) for difference in differences.values()) or 1.0
    heat = {tap: heat_map(difference / most) for tap, difference in differences.items()}
    note = f"difference to the final image: black 0, white {most:.2f} of full scale"
    title = one_line(title)
    return _grid(heat, f"{title} · {note}" if title else note, sigmas, final)


def heat_map(values: np.ndarray) -> Image.Image:
    """Numbers [height, width] in 0..1 (more is cut) as colours from black to pale yellow."""
    return Image.fromarray(np.asarray(matplotlib.colormaps["inferno"](values.clip(0, 1), bytes=True))[..., :3])


def captioned(image: Image.Image, caption: str, font_size: int = 24, widest: str = "") -> Image.Image:
    """The image with a caption on a dark strip below it, enlarged by whole factors until the caption fits.

    With `widest`, the longest caption of all, images of one size stay of one size.
    """
    text = font(font_size)
    needed = max(text.getlength(caption), text.getlength(widest)) + font_size
    factor = -(-int(needed) // image.width)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    strip = round(font_size * 1.7)
    out = Image.new("RGB", (image.width, image.height + strip), GROUND)
    out.paste(image.convert("RGB"))
    ImageDraw.Draw(out).text((out.width / 2, image.height + strip / 2), caption, INK, text, anchor="mm")
    return out


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), GROUND)
    top = 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def prompt_grid(rows: Mapping[str, Sequence[Image.Image]], largest: int = 256) -> Image.Image:
    """Pictures of prompts, a row for each with its prompt above it; small pictures are enlarged, and none exceeds `largest`."""
    side = max(max(one.size) for row in rows.values() for one in row)
    scale = max(1, 128 // side) if side <= largest else largest / side
    cells = [
        [one.resize((round(one.width * scale), round(one.height * scale)), Image.Resampling.LANCZOS) for one in row]
        for row in rows.values()
    ]
    text, line = font(14), 24
    width = 2 * MARGIN + max(sum(one.width + GAP for one in row) for row in cells)
    width = max(width, 2 * MARGIN + min(900, round(max(text.getlength(prompt) for prompt in rows))))
    height = 2 * MARGIN + sum(line + GAP + max(one.height for one in row) + GAP * 3 for row in cells)
    whole = Image.new("RGB", (width, height), GROUND)
    draw, top = ImageDraw.Draw(whole), MARGIN
    for prompt, row in zip(rows, cells, strict=True):
        shown = prompt
        while text.getlength(shown) > width - 2 * MARGIN:
            shown = f"{shown.removesuffix('...')[:-1]}..."
        draw.text((MARGIN, top), shown, INK, text)
        left, top = MARGIN, top + line
        for one in row:
            whole.paste(one, (left, top))
            left += one.width + GAP
        top += max(one.height for one in row) + GAP * 4
    return whole


def labelled_grid(cells: Sequence[tuple[str, str, Image.Image]], title: str = "", side: int = 192) -> Image.Image:
    """Pictures in rows, as near to a square as they go, each with a label and a line of numbers below it."""
    label, numbers = font(13), font(10)
    scale = side / max(max(picture.size) for _, _, picture in cells)
    most = (round(max(one.width for *_, one in cells) * scale), round(max(one.height for *_, one in cells) * scale))
    needed = max(max(label.getlength(name), numbers.getlength(said)) for name, said, _ in cells)
    width, height = max(most[0], round(needed)) + 4 * GAP, most[1] + 40
    columns = min(len(cells), max(1, round((len(cells) * height / width) ** 0.5 + 0.3)))
    rows, top = -(-len(cells) // columns), MARGIN + (28 if title else 0)
    across = max(columns * width, round(font(16).getlength(title)))
    whole = Image.new("RGB", (across + 2 * MARGIN, top + rows * height + MARGIN), GROUND)
    draw = ImageDraw.Draw(whole)
    draw.text((MARGIN, MARGIN), title, INK, font(16))
    for number, (name, said, picture) in enumerate(cells):
        x, y = MARGIN + number % columns * width, top + number // columns * height
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        whole.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + most[1] + 3), name, INK, label)
        draw.text((x, y + most[1] + 20), said, PALE, numbers)
    return whole


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same picture on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def one_line(text: str, most: int = 160) -> str:
    """A text as a title: without line breaks, which have no length that can be measured, and of at most so many letters."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 3]}..."


def cell_size(columns: int, rows: int, image: Image.Image) -> tuple[int, int]:
    """Size of a cell that shows `image` in its proportions, as large as keeps the sheet below `LONGEST`."""
    side = max(SMALLEST_CELL, min(LARGEST_CELL, LONGEST // max(columns, rows)))
    scale = side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _axes(images: Mapping[Tap, Image.Image]) -> tuple[list[int], list[Block]]:
    return sorted({tap.step for tap in images}), sorted({tap.block for tap in images})


def _small(images: Mapping[Tap, Image.Image]) -> dict[Tap, Image.Image]:
    steps, blocks = _axes(images)
    cell = cell_size(len(steps), len(blocks), next(iter(images.values())))
    return {tap: image.resize(cell, Image.Resampling.LANCZOS) for tap, image in images.items()}


def _values(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 255


def _grid(
    cells: Mapping[Tap, Image.Image], title: str, sigmas: Mapping[int, float] | None, final: Image.Image | None
) -> Image.Image:
    steps, blocks = _axes(cells)
    width, height = next(iter(cells.values())).size
    label, heading = font(max(11, min(15, height // 4))), font(20)
    line = round(1.35 * label.size)
    left = MARGIN + round(max(label.getlength(block.title) for block in blocks)) + 10
    top = MARGIN + 40 + (2 if sigmas else 1) * line
    shown = None if final is None else final.resize((2 * width, 2 * height), Image.Resampling.LANCZOS)

    columns = {step: left + index * (width + GAP) for index, step in enumerate(steps)}
    apart = 8 if len({block.kind for block in blocks}) == 2 else 0
    rows = {
        block: top + index * (height + GAP) + (apart if block.kind == "single" else 0) for index, block in enumerate(blocks)
    }
    end = columns[steps[-1]] + width
    right = max(end + (GAP * 5 + shown.width if shown else 0), MARGIN + round(heading.getlength(title)))
    bottom = max(rows[blocks[-1]] + height, top + shown.height if shown else 0)

    sheet = Image.new("RGB", (right + MARGIN, bottom + MARGIN), GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, heading)
    above = top - 6 - (line if sigmas else 0)
    draw.text((left - 10, above), "step", INK, label, anchor="rd")
    crowded = label.getlength("\u03c3 0.00") > width
    for step, x in columns.items():
        if crowded and step % 5:
            continue
        draw.text((x + width / 2, above), str(step), INK, label, anchor="md")
        if sigmas:
            draw.text((x + width / 2, top - 6), f"\u03c3 {sigmas[step]:.2f}", PALE, label, anchor="md")
    for block, y in rows.items():
        draw.text((left - 10, y + height / 2), block.title, KIND_COLORS[block.kind], label, anchor="rm")
        for step, x in columns.items():
            if Tap(step, block) in cells:
                sheet.paste(cells[Tap(step, block)], (x, y))
            else:
                draw.rectangle((x, y, x + width - 1, y + height - 1), EMPTY)
    if shown:
        sheet.paste(shown, (end + GAP * 5, top))
        draw.text((end + GAP * 5 + shown.width / 2, top - 6), "final image", INK, label, anchor="md")
    return sheet
