"""Image tokens after every block, the same ones after each: what a tuned lens is fitted on.

    recorder = LensRecorder(layout, store, RowChoice(rows=64))
    with recorder.run() as run:
        with run.watching(model, call):
            model(x, sigma, context, vector)
    LensRows(folder)[Block("double", 3)]             # [rows, hidden]

A shard of kind `lens` holds, by block, its tokens [rows, hidden], and `image` and `sigma` [rows].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import Block, blocks_of
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Layout
from .call import Call
from .hooks import watching_blocks, watching_image_tokens
from .manifest import Limit, record_first
from .rows import RowChoice
from .run import Recorder, Run
from .shards import require_finite
from .store import HiddenStates


def estimated_lens_bytes(layout: Layout, choice: RowChoice, steps: int, images: int) -> int:
    """What `images` images of `steps` steps take on disk at most, for models in 16 bits."""
    return images * choice.count(steps) * choice.rows * (len(blocks_of(layout)) * layout.hidden * 2 + 8 + 4)


class LensRecorder(Recorder):
    """Keeps `choice.rows` random image tokens of each image and drawn step, the same ones after every block, until `limit` says
    stop (`full`)."""

    choice: RowChoice

    def __init__(self, layout: Layout, store: HiddenStates, choice: RowChoice | None = None, limit: Limit | None = None):
        self.layout = layout
        self.store = store
        self.choice = choice or RowChoice()
        self.limit = limit

    def begin(self) -> LensRun:
        """A run of the sampler: `finish` it when it ended well."""
        return LensRun(self)


class LensRun(Run):
    """One sampling run (see `Run`)."""

    def __init__(self, recorder: LensRecorder):
        super().__init__(recorder, "lens")
        self.recorder = recorder
        self._blocks = blocks_of(recorder.layout)
        self._parts: list[dict[str, Tensor]] = []

    @contextmanager
    def watching(self, model: nn.Module, call: Call) -> Iterator[None]:
        """Hooks on `model` for one call of it, if its step is one of `steps`."""
        if not self.wants(call):
            yield
            return
        assert self.drawing is not None
        chosen = self._tokens(call).to(call.x.device)
        seen: list[Tensor] = []

        @torch.no_grad()
        def see(block_index: int, img: Tensor) -> None:
            seen.append(call.part(img)[:, chosen].flatten(0, 1))

        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            hooks.enter_context(watching_image_tokens(model, range(1, len(self._blocks) + 1), see))
            yield
        if not self.is_whole(ran):
            return
        part = {block.name: state for block, state in zip(self._blocks, torch.stack(seen).cpu(), strict=True)}
        part["image"] = (torch.tensor(call.read) + self.drawing.first).repeat_interleave(len(chosen))
        part["sigma"] = call.part(call.sigma).float().cpu().repeat_interleave(len(chosen))
        self._parts.append(part)

    def _tokens(self, call: Call) -> Tensor:
        patch = self.recorder.layout.patch
        available = -(-call.x.shape[-2] // patch) * -(-call.x.shape[-1] // patch)
        seed = hashlib.sha256(f"{self.recorder.choice.seed} {self.key} {call.step} lens".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        return torch.randperm(available, generator=generator)[: self.recorder.choice.rows].sort().values

    def finish(self) -> None:
        """Writes what was recorded as one shard, if all of it is finite, and that these images were recorded."""
        if self.drawing is None or not self._parts:
            return
        recorder, store = self.recorder, self.recorder.store
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        if not self.all_finite(tensors.items()):
            return
        recorder.full = not store.append("lens", tensors, recorder.limit)
        if not recorder.full:
            store.note_recorded(self.drawing, "lens")


class LensRows(Mapping[Block, Tensor]):
    """All lens rows of a folder: each block's tokens [rows, hidden], read when asked for; `images` [rows] tells whose.

    Raises `UserError` where the folder holds none.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        store = HiddenStates.open(folder)
        paths = [store.folder / shard.file for shard in store.manifest.shards if shard.kind == "lens"]
        if not paths:
            raise UserError(f"{folder} holds no lens rows. {record_first('lens')}")
        self.family = store.manifest.family
        self._files = [(path, open_safetensors(path)) for path in paths]
        self._blocks = sorted(Block.named(name) for name in set(self._files[0][1].keys()) - {"image", "sigma"})
        self.images = self._read("image")

    def _read(self, key: str) -> Tensor:
        found = []
        for path, file in self._files:
            found.append(file.get_tensor(key))
            require_finite(found[-1], path, key)
        return torch.cat(found)

    def __getitem__(self, block: Block) -> Tensor:
        return self._read(block.name)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)
