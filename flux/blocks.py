"""The blocks of a FLUX by name and index.

    blocks = blocks_of(layout)                       # double-0 ... double-18, single-0 ... single-37
    chosen = choose_blocks("double, single 30-37", layout)

A block's index among all of them counts the single blocks on from the double ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UserError
from .layout import Layout, Site

BlockKind = Literal["double", "single"]


@dataclass(frozen=True, order=True)
class Block:
    """One block; the order of blocks is the order they run in."""

    kind: BlockKind
    index: int

    @classmethod
    def named(cls, name: str) -> Block:
        """The block called `name`, as "double-3"; raises `ValueError` where that is not the name of a block."""
        kind, _, index = name.partition("-")
        if kind not in get_args(BlockKind):
            raise ValueError(f"not a block: {name}")
        return cls(kind, int(index))  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index}"

    @property
    def title(self) -> str:
        return f"{self.kind} block {self.index}"

    @property
    def path(self) -> str:
        """Module path in the checkpoint."""
        return f"{self.kind}_blocks.{self.index}"


def blocks_of(layout: Layout) -> tuple[Block, ...]:
    """All blocks, as they run; the index of a block is its place in here."""
    doubles = (Block("double", index) for index in range(layout.depth))
    return (*doubles, *(Block("single", index) for index in range(layout.depth_single)))


def sites_at(layout: Layout, block_index: int) -> tuple[Site, ...]:
    """The MLPs of a block, by its index among all blocks."""
    path = blocks_of(layout)[block_index].path
    return tuple(site for site in layout.sites if site.block == path)


def choose_blocks(text: str, layout: Layout) -> tuple[Block, ...]:
    """The blocks that `text` names, as they run: "all", or a list such as "double, single 0, single 30-37"; numbers alone, as
    in "0-18, 40", are indices among all blocks.

    Raises `UserError` where the text is not such a list, or names a block that the model does not have.
    """
    if text.strip().lower() == "all":
        return blocks_of(layout)
    chosen: set[Block] = set()
    for part in map(str.strip, text.lower().split(",")):
        match = re.fullmatch(r"(double|single)?(?:(?(1)[ -])(\d{1,18})(?:\s*-\s*(\d{1,18}))?)?", part)
        if match is None or not part:
            raise UserError(
                f'Blocks "{text}": {part!r} is not understood. Write "all", a list such as "double, single 0, single 30-37", '
                'or numbers such as "0-18" (single blocks count on from the double ones).'
            )
        kind, first, last = match.groups()
        among = [block for block in blocks_of(layout) if kind in (None, block.kind)]
        span = range(int(first or 0), int(last or first or len(among) - 1) + 1)
        if not span or span[-1] >= len(among):
            raise UserError(
                f'Blocks "{text}": {part!r} is out of range; this model has {kind or "double and single"} blocks 0 to '
                f"{len(among) - 1}."
            )
        chosen |= {among[index] for index in span}
    return tuple(sorted(chosen))
