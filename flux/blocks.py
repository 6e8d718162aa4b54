"""The blocks of a FLUX by name and index.

    blocks = blocks_of(layout)                       # double-0 ... double-18, single-0 ... single-37
    chosen = choose_blocks("double, single 30-37", layout)

A block's index among all of them counts the single blocks on from the double ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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
        if kind == "double":
            return cls("double", int(index))
        if kind == "single":
            return cls("single", int(index))
        raise ValueError(f"not a block: {name}")

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
    """The blocks that `text` names: "all", or a list such as "double, single 0, single 30-37".

    Raises `UserError` where the text is not such a list, or names a block that the model does not have.
    """
    if text.strip().lower() == "all":
        return blocks_of(layout)
    depths: dict[str, int] = {"double": layout.depth, "single": layout.depth_single}
    chosen = set()
    for part in text.lower().split(","):
        match = re.fullmatch(r"\s*(double|single)(?:[ -](\d+)(?:\s*-\s*(\d+))?)?\s*", part)
        if match is None:
            raise UserError(
                f'Blocks "{text}": {part.strip()!r} is not understood. Write "all", or a list such as '
                '"double, single 0, single 30-37".'
            )
        kind = match[1]
        first = int(match[2] or 0)
        last = int(match[3] or match[2] or depths[kind] - 1)
        if not first <= last < depths[kind]:
            raise UserError(
                f'Blocks "{text}": {part.strip()!r} is out of range; this model has {kind} blocks 0 to {depths[kind] - 1}.'
            )
        chosen |= {Block(kind, index) for index in range(first, last + 1)}  # type: ignore[arg-type]
    return tuple(sorted(chosen))
