"""A size out of a list, at random: pick_size("1024x1024, 1216x832", megapixels=1.1, seed=7)."""

from __future__ import annotations

import random
import re

from .errors import UserError


def pick_size(sizes: str, megapixels: float, seed: int) -> tuple[int, int]:
    """Width and height of one of the `sizes` of at most so many millions of pixels: the same for the same seed.

    Raises `UserError` where an entry is not a size that a FLUX draws (multiples of 16), or all are larger.
    """
    found = []
    for entry in filter(None, map(str.strip, re.split(r"[,;\n]", sizes))):
        match = re.fullmatch(r"(\d{1,5})\s*[x\u00d7*]\s*(\d{1,5})", entry, re.ASCII | re.IGNORECASE)
        size = (int(match[1]), int(match[2])) if match else (0, 0)
        if not all(side and side % 16 == 0 for side in size):
            raise UserError(f"Random Size: {entry[:60]!r} is not a size: expected multiples of 16 such as 1024x1024.")
        found.append(size)
    small = [(width, height) for width, height in found if width * height <= megapixels * 1e6]
    if not small:
        raise UserError(f"Random Size: none of the {len(found)} sizes has at most {megapixels:g} million pixels: add some.")
    return random.Random(seed).choice(small)
