"""Which images are held out: all that is fitted or trained on recorded images is measured on others.

    fitted, held = held_out(images, share=0.2, seed=7)

Images are kept apart as a whole: tokens and steps of one image are too alike to measure on.
"""

from __future__ import annotations

import random

from torch import Tensor

from ..errors import UserError


def held_out(images: Tensor, share: float = 0.2, seed: int | None = None) -> tuple[set[int], set[int]]:
    """Splits the image numbers in `images` [any] into those to fit on and those held out: `share` of them, at least one.

    They are drawn, since prompts may come in turns, by `seed`, or else by how many there are. Raises `UserError` for fewer than
    two images: tokens of one image are too alike to measure on.
    """
    numbers = images.unique().tolist()
    if len(numbers) < 2:
        raise UserError(
            f"The recording is of {len(numbers)} image{'' if len(numbers) == 1 else 's'}; at least 2 are needed, one of them "
            "to measure the error on. Record more images."
        )
    count = min(max(1, round(share * len(numbers))), len(numbers) - 1)
    held = set(random.Random(len(numbers) if seed is None else seed).sample(numbers, count))
    return set(numbers) - held, held
