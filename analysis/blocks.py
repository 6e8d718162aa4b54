"""The blocks of a FLUX by name and place, and the image tokens that pass between them.

    blocks = blocks_of(layout)                       # double-0 … double-18, single-0 … single-37
    chosen = choose_blocks("double, single 30-37", layout)
    with watching_image_tokens(model, {0, 5}, see):  # see(place, img): what enters block number `place`, or the final layer
        model(...)

What leaves a block is what enters the next one: whatever a host adds in between (a ControlNet, say) is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Layout, Site
from .hooks import hooks_heard

Kind = Literal["double", "single"]

#: Part of a batch: a slice, or a tensor that masks or counts its rows.
Rows = slice | Tensor


@dataclass(frozen=True, order=True)
class Block:
    """One block; the order of blocks is the order they run in."""

    kind: Kind
    index: int

    @classmethod
    def named(cls, name: str) -> Block:
        """The block called `name`, as "double-3"; raises `ValueError` where this is no name of a block."""
        kind, _, index = name.partition("-")
        if kind == "double":
            return cls("double", int(index))
        if kind == "single":
            return cls("single", int(index))
        raise ValueError(f"no block: {name}")

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
    """All blocks, as they run; the place of a block is its number in here."""
    doubles = (Block("double", index) for index in range(layout.depth))
    return (*doubles, *(Block("single", index) for index in range(layout.depth_single)))


def sites_at(layout: Layout, place: int) -> tuple[Site, ...]:
    """The MLPs of the block at a place."""
    path = blocks_of(layout)[place].path
    return tuple(site for site in layout.sites if site.block == path)


def choose_blocks(text: str, layout: Layout) -> tuple[Block, ...]:
    """The blocks that `text` names: "all", or a list such as "double, single 0, single 30-37".

    Raises `UserError` where the text is no such list or names a block that the model does not have.
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


@contextmanager
def watching_image_tokens(model: nn.Module, places: Collection[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `see(place, img)` with the image tokens [batch, tokens, hidden] that enter the blocks at `places`.

    The place after the last block is the final layer. References of an edit follow the image's own tokens. `img` is the
    model's own memory, which the next block may overwrite: use it at once or clone it, and do not write to it. Works on
    any model with FLUX's module names; hooks are gone when the `with` ends.
    """
    doubles: list[Any] = list(model.get_submodule("double_blocks").children())
    singles: list[Any] = list(model.get_submodule("single_blocks").children())
    final = len(doubles) + len(singles)
    words = 0

    def entering(place: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal words
            if place < len(doubles):
                img, words = kwargs["img"], kwargs["txt"].shape[1]
            else:
                img = args[0] if place == final else args[0][:, words:]
            if place in places:
                see(place, img)

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(hooks_heard())
        for place, module in enumerate((*doubles, *singles, model.get_submodule("final_layer"))):
            # The last double block tells how many text tokens come first in a single block.
            if place in places or place == len(doubles) - 1:
                hooks.callback(module.register_forward_pre_hook(entering(place), with_kwargs=True).remove)
        yield
