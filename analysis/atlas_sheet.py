"""Neurons of an atlas as one picture: a row for each, with the places where it was strongest.

sheet = neurons_sheet(recording, recording.atlas(), [("double-img-3", 1207), ("single-2", 77)])
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..errors import UserError
from ..parsing import read_image
from ..recording.atlas import MAP, Atlas, AtlasImage, Places
from ..recording.recording import Recording
from .sheets import EMPTY, GAP, GROUND, INK, MARGIN, PALE, font

#: Neurons of one sheet at most, and the side of a cell.
MOST, CELL = 100, 112
#: Tokens along a picture from which on a third of it is shown, around the place.
WIDE = 12
MARK, HEAT = (236, 156, 84), (255, 96, 0)


def named_neurons(text: str, atlas: Atlas) -> list[tuple[str, int]]:
    """Neurons that `text` names, with commas: "double-img-3:1207, single-2:77".

    Raises `UserError` where that is no such list, or the atlas has no such neuron.
    """
    found = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([a-z-]+\d{1,4}):(\d{1,9})", name)
        site = atlas.sites.get(match[1]) if match else None
        if match is None or site is None or int(match[2]) >= len(site.value):
            first = next(iter(atlas.sites))
            raise UserError(f"{name!r} is no neuron of this atlas: expected names such as {first}:0, with commas in between.")
        found.append((match[1], int(match[2])))
    if not 0 < len(found) <= MOST:
        raise UserError(f"{len(found)} neurons are named: expected 1 to {MOST}, such as single-2:77.")
    return found


def strongest_neurons(atlas: Atlas, count: int) -> list[tuple[str, int]]:
    """The `count` neurons that were strongest of all, in units of the mean strength of their MLP's neurons."""
    known: list[tuple[float, str, int]] = []
    for name, site in atlas.sites.items():
        strength = site.value[:, 0].abs()
        best = (strength / strength.mean().clamp(min=1e-30)).topk(min(count, len(strength)))
        known += [(found, name, neuron) for found, neuron in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return [(name, neuron) for _, name, neuron in sorted(known, reverse=True)[:count]]


def neurons_sheet(
    recording: Recording,
    atlas: Atlas,
    neurons: Sequence[tuple[str, int]],
    places: int = 8,
    written: Sequence[Image.Image | None] | None = None,
) -> Image.Image:
    """A row for each neuron of the recording's `atlas` with its first `places`: the picture around the token, how strong it was
    over it where maps were recorded, and the token's own square or word. Without pictures, the prompts. What each writes comes
    first, where that is `written`."""
    text, small = font(13), font(10)
    named = MARGIN + round(max(text.getlength(f"{name}:{neuron}") for name, neuron in neurons)) + 12
    left = named + (CELL + 4 * GAP if written else 0)
    whole = Image.new("RGB", (left + places * (CELL + GAP) + MARGIN, 2 * MARGIN + len(neurons) * (CELL + GAP)), GROUND)
    draw = ImageDraw.Draw(whole)
    for row, (name, neuron) in enumerate(neurons):
        site, top = atlas.sites[name], MARGIN + row * (CELL + GAP)
        draw.text((MARGIN, top + CELL / 2 - 16), f"{name}:{neuron}", INK, text)
        draw.text((MARGIN, top + CELL / 2 + 2), f"up to {site.value[neuron, 0].item():.3g}", PALE, small)
        if written and (writes := written[row]) is not None:
            whole.paste(writes.resize((CELL, CELL), Image.Resampling.BICUBIC), (named, top))
            _label(draw, (named, top), "writes")
        for place in range(min(places, site.value.shape[1])):
            number = int(site.image[neuron, place])
            if number >= 0:
                cell = _cell(recording, name, site, atlas.images[number], neuron, place)
                whole.paste(cell, (left + place * (CELL + GAP), top))
    return whole


def _cell(recording: Recording, name: str, site: Places, image: AtlasImage, neuron: int, place: int) -> Image.Image:
    token, shortest = int(site.token[neuron, place]), min(image.rows, image.columns)
    of_text = name.startswith("double-txt") or (name.startswith("single") and token < image.words)
    row, column = divmod(token - (image.words if name.startswith("single") else 0), image.columns)
    whole_side = max(image.rows, image.columns)
    side = whole_side if of_text or shortest <= WIDE else shortest / 3
    centre = (image.columns / 2, image.rows / 2) if of_text else (column + 0.5, row + 0.5)
    x, y = (
        (length - side) / 2 if length <= side else min(max(middle - side / 2, 0), length - side)
        for middle, length in zip(centre, (image.columns, image.rows), strict=True)
    )
    cell, pixel = Image.new("RGB", (CELL, CELL), EMPTY), CELL / side
    where = round(-x * pixel), round(-y * pixel)
    size = max(1, round(image.columns * pixel)), max(1, round(image.rows * pixel))
    path = recording.atlas_picture(image.key)
    if path.is_file():
        cell.paste(read_image(path).resize(size, Image.Resampling.BICUBIC), where)
    if site.map is not None and not name.startswith("double-txt"):
        strength = Image.frombytes("L", (MAP, MAP), (site.map[neuron, place].float() * 0.7).byte().numpy().tobytes())
        cell.paste(Image.new("RGB", size, HEAT), where, strength.resize(size, Image.Resampling.NEAREST))
    draw, text = ImageDraw.Draw(cell), font(10)
    if of_text:
        word = "".join(image.texts[token : token + 1]) or ("(padding)" if image.texts else f"word {token}")
        _label(draw, (0, 0), word)
    else:
        corner = where[0] + column * pixel, where[1] + row * pixel
        draw.rectangle((*corner, corner[0] + pixel - 1, corner[1] + pixel - 1), outline=MARK, width=2)
    if not path.is_file() and image.prompt:
        draw.text((4, 4), "\n".join(image.prompt[start : start + 18] for start in range(0, 72, 18)), PALE, text)
    return cell


def _label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """On a dark strip at the bottom of the cell at `corner`."""
    left, top = corner
    draw.rectangle((left, top + CELL - 16, left + CELL - 1, top + CELL - 1), (0, 0, 0))
    draw.text((left + CELL / 2, top + CELL - 8), text, INK, font(10), anchor="mm")
