"""What a sweep draws from the same noise: one poke after the other, and what they are called.

for label, poke in sweep(layout, factors_of("-1, 0, 2"), neurons=neurons): ...
for label, poke in sweep(layout, (0.0,), blocks="all", part="mlp"): ...
"""

from __future__ import annotations

import math
import re

from ..errors import UserError
from ..flux.blocks import choose_blocks
from ..flux.layout import Layout
from .neurons import Neurons
from .poke import BlockPoke, Part, Poke

#: Most pictures of one sweep.
MOST = 400


def factors_of(text: str) -> tuple[float, ...]:
    """Factors in the order in which they are named, with commas; raises `UserError` where that is none."""
    words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
    try:
        found = tuple(dict.fromkeys(float(word) for word in words))
    except ValueError as error:
        raise UserError(f"{text!r} names no factors: expected numbers with commas, such as -1, 0, 1, 2.") from error
    if not found or not all(math.isfinite(factor) and abs(factor) <= 100 for factor in found):
        raise UserError(f"{text!r} names no factors: expected one or more numbers from -100 to 100.")
    return found


def sweep(
    layout: Layout, factors: tuple[float, ...], neurons: Neurons | None = None, blocks: str = "all", part: Part = "both"
) -> list[tuple[str, Poke | BlockPoke]]:
    """Neurons at each factor; without neurons, each of `blocks` by itself at each factor.

    Raises `UserError` where the model has no such blocks, or more than `MOST` pictures are asked for.
    """
    found: list[tuple[str, Poke | BlockPoke]] = []
    if neurons is not None:
        found = [(f"factor {factor:g}", Poke(neurons, factor)) for factor in factors]
    else:
        what = "" if part == "both" else f" {part}"
        for block in sorted(choose_blocks(blocks, layout)):
            for factor in factors:
                does = "without" if factor == 0 else f"{factor:g} x"
                found.append((f"{does} {block.name}{what}", BlockPoke((block,), part, "both", factor)))
    if len(found) > MOST:
        raise UserError(f"{len(found):,} pictures are asked for; expected at most {MOST}. Name fewer blocks or factors.")
    return found
