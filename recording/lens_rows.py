"""Image tokens after every block, the same ones after each: what a tuned lens is fitted on.

    recorder = LensRecorder(layout, store, RowChoice(rows=64))
    with recorder.run() as run:
        with run.watching(model, call):
            model(x, sigma, context, vector)
    LensRows(folder)[Block("double", 3)]             # [rows, hidden]

A shard of kind `lens` holds, by block, its tokens [rows, hidden], and `image` and `sigma` [rows].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..flux.blocks import Block, blocks_of
from ..flux.layout import Layout
from .call import Call
from .hooks import watching_tokens
from .manifest import Limit
from .rows import RowChoice
from .run import Recorder, Run
from .store import HiddenStates


def estimated_lens_bytes(layout: Layout, choice: RowChoice, steps: int, images: int) -> int:
    """What `images` images of `steps` steps take on disk at most, for models in 16 bits."""
    return images * choice.count(steps) * choice.rows * (len(blocks_of(layout)) * layout.hidden * 2 + 8 + 4)


class LensRecorder(Recorder):
    """Keeps `choice.rows` random image tokens of each image and drawn step, the same ones after every block."""

    kind = "lens"
    choice: RowChoice

    def __init__(self, layout: Layout, store: HiddenStates, choice: RowChoice, limit: Limit | None = None):
        super().__init__(store, choice, limit)
        self.layout = layout

    def begin(self) -> LensRun:
        return LensRun(self)


class LensRun(Run):
    recorder: LensRecorder

    def __init__(self, recorder: LensRecorder):
        super().__init__(recorder)
        self._parts: list[dict[str, Tensor]] = []

    def hook(self, hooks: ExitStack, model: nn.Module, call: Call) -> Callable[[], None]:
        patch = self.recorder.layout.patch
        available = -(-call.x.shape[-2] // patch) * -(-call.x.shape[-1] // patch)
        order = torch.randperm(available, generator=self.generator(call, "lens"))
        chosen = order[: self.recorder.choice.rows].sort().values.to(call.x.device)
        blocks = blocks_of(self.recorder.layout)
        seen: list[Tensor] = []

        @torch.no_grad()
        def see(block_index: int, img: Tensor, txt: Tensor) -> None:
            seen.append(call.part(img)[:, chosen].flatten(0, 1))

        hooks.enter_context(watching_tokens(model, range(1, len(blocks) + 1), see))

        def take() -> None:
            part = {block.name: state for block, state in zip(blocks, torch.stack(seen).cpu(), strict=True)}
            part["image"] = self.numbers(call).repeat_interleave(len(chosen))
            part["sigma"] = call.part(call.sigma).float().cpu().repeat_interleave(len(chosen))
            self._parts.append(part)

        return take

    def finish(self) -> None:
        """Writes what was recorded as one shard."""
        if self._parts:
            self.write({name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]})
            self._parts = []


class LensRows(Mapping[Block, Tensor]):
    """All lens rows of a folder: each block's tokens [rows, hidden], read when asked for; `images` [rows] tells whose.

    Raises `UserError` where the folder holds none.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        store = HiddenStates.open(folder)
        self.family = store.manifest.family
        self._files = store.files("lens")
        self._blocks = sorted(Block.named(name) for name in self._files[0].names - {"image", "sigma"})
        self.images = self._read("image")

    def _read(self, key: str) -> Tensor:
        return torch.cat([file.read(key) for file in self._files])

    def __getitem__(self, block: Block) -> Tensor:
        return self._read(block.name)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)
