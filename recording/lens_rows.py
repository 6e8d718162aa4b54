"""Image tokens after every block, the same ones after each: what a tuned lens is fitted on.

    recorder = LensRecorder(layout, tokens=64)
    with recorder.watching(model, x, sigma, images):
        model(x, sigma, context, vector)
    recorder.save(store)                             # one more shard in hidden_states/; any number of runs may add theirs

A shard of kind `lens` holds, by block, its tokens [rows, hidden], and `image` and `sigma` [rows].
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import Block, blocks_of
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Layout
from .call import BatchRows
from .hooks import watching_image_tokens
from .store import HiddenStates, Limit


class LensRecorder:
    """Keeps `tokens` random image tokens of each image and call, the same ones after every block."""

    def __init__(self, layout: Layout, tokens: int = 64, seed: int = 0):
        self.layout = layout
        self.tokens = tokens
        self._random = torch.Generator().manual_seed(seed)
        self._states: dict[Block, list[Tensor]] = {block: [] for block in blocks_of(layout)}
        self._images: list[Tensor] = []
        self._sigmas: list[Tensor] = []

    @contextmanager
    def watching(
        self, model: nn.Module, x: Tensor, sigma: Tensor, images: Tensor, rows: BatchRows = slice(None)
    ) -> Iterator[None]:
        """Hooks on `model` for one call of it.

        Args:
            x: latents [batch, channels, height, width].
            sigma: their noise level [batch].
            images: a number for each image in `rows`, int64, that no other image has: the fit keeps images apart.
            rows: the part of the batch to look at (under classifier-free guidance, the positive prompt's).
        """
        blocks = list(self._states)
        patch = self.layout.patch
        available = -(-x.shape[-2] // patch) * -(-x.shape[-1] // patch)
        chosen = torch.randperm(available, generator=self._random)[: self.tokens].sort().values.to(x.device)
        seen: list[Tensor] = []

        @torch.no_grad()
        def see(place: int, img: Tensor) -> None:
            seen.append(img[rows][:, chosen].flatten(0, 1))

        with watching_image_tokens(model, range(1, len(blocks) + 1), see):
            yield
        for block, state in zip(blocks, torch.stack(seen).cpu(), strict=True):
            self._states[block].append(state)
        self._images.append(images.cpu().repeat_interleave(len(chosen)))
        self._sigmas.append(sigma[rows].float().cpu().repeat_interleave(len(chosen)))

    def save(self, store: HiddenStates, limit: Limit | None = None) -> bool:
        """Adds what was recorded since the last `save` as one more shard; False where `limit` leaves no room for it."""
        if not self._images:
            return True
        tensors = {block.name: torch.cat(states) for block, states in self._states.items()}
        tensors["image"], tensors["sigma"] = torch.cat(self._images), torch.cat(self._sigmas)
        for parts in (*self._states.values(), self._images, self._sigmas):
            parts.clear()
        return store.append("lens", tensors, limit)


class LensRows(Mapping[Block, Tensor]):
    """All lens rows of a folder: each block's tokens [rows, hidden], read when asked for; `images` [rows] tells whose.

    Raises `UserError` where the folder holds none.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        store = HiddenStates.open(folder)
        paths = [store.folder / shard.file for shard in store.manifest.shards if shard.kind == "lens"]
        if not paths:
            raise UserError(f"{folder} holds no lens rows: use Record Hidden States with what = lens rows first.")
        self.family = store.manifest.family
        self._files = [open_safetensors(path) for path in paths]
        self._blocks = sorted(Block.named(name) for name in set(self._files[0].keys()) - {"image", "sigma"})
        self.images = self._read("image")

    def _read(self, key: str) -> Tensor:
        return torch.cat([file.get_tensor(key) for file in self._files])

    def __getitem__(self, block: Block) -> Tensor:
        return self._read(block.name)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)
