"""Reading block states: what went into the blocks of a FLUX, and what came out.

    states = BlockStates.open(folder)                # this program's folders, and the original flux-poke's
    states.indices, states.image, states.groups      # what is there, whose it is, what can stand in one batch
    state = states.batch(torch.tensor([3, 14]), block_index=7)
    state.img, state.txt, state.vec, state.pe

Rows are read when they are asked for. The original's files have `{k}-vec` and `{k}-pe` for every k, and no manifest: each
row of a file counts as an image of its own there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.fingerprint import Fingerprint
from .manifest import record_first
from .shards import ShardSlices
from .store import MANIFEST, HiddenStates


@dataclass(frozen=True)
class State:
    """What enters a block: img, txt [batch, tokens, hidden], vec [batch, hidden], pe [batch, 1, tokens, head dim / 2, 2, 2]."""

    img: Tensor
    txt: Tensor
    vec: Tensor
    pe: Tensor


class BlockStates:
    """States by sample (one image at one step) and block index: what enters block k, and what leaves the last one.

    Attributes:
        indices: of the states that every file has, ascending. image: [samples] int64. groups: samples of equal shapes.
        fingerprint: of the model they come from; None in the original's folders. digest: hexadecimal, another one whenever
        block states are recorded (in the original's folders, by the files' names, sizes and times).
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[ShardSlices],
        images: Sequence[Tensor],
        fingerprint: Fingerprint | None,
        digest: str,
    ):
        self.folder, self.files, self.fingerprint, self.digest = folder, list(files), fingerprint, digest
        self.image = torch.cat(list(images))
        self.indices = sorted(set.intersection(*(_indices(file) for file in self.files)))
        if not self.indices:
            raise UserError(f"The block states in {folder} have no block in common: record the same blocks in one folder.")
        self._of = [(file, row) for file, image in zip(self.files, images, strict=True) for row in range(len(image))]
        by_shape: dict[tuple, list[int]] = {}
        for sample, (file, _) in enumerate(self._of):
            key = tuple(file.shape(f"{self.indices[0]}-{stream}")[1:] for stream in ("img", "txt"))
            by_shape.setdefault(key, []).append(sample)
        self.groups = [torch.tensor(samples) for samples in by_shape.values()]

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> BlockStates:
        """Raises `UserError` where there are no block states in `folder`."""
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            store = HiddenStates.open(folder)
            shards = [shard for shard in store.manifest.shards if shard.kind == "blocks"]
            files = [ShardSlices(folder / shard.file) for shard in shards]
            images = [torch.tensor([capture.image for capture in shard.captures]) for shard in shards]
            fingerprint: Fingerprint | None = store.manifest.fingerprint
            digest = store.digest("blocks")
        else:
            files = [file for path in sorted(folder.glob("*.safetensors")) if _indices(file := ShardSlices(path))]
            counts = [file.shape(f"{min(_indices(file))}-img")[0] for file in files]
            images = list(torch.arange(sum(counts)).split(counts)) if counts else []
            fingerprint = None
            known = [(file.path.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]
            digest = hashlib.sha256(f"{known}".encode()).hexdigest()
        if not files:
            raise UserError(f"{folder} holds no block states. {record_first('blocks')}")
        return cls(folder, files, images, fingerprint, digest)

    def require(self, fingerprint: Fingerprint, hidden: int, what: str) -> None:
        """Raises `UserError` where the states are of another model than the one with `fingerprint`, called `what`."""
        if self.fingerprint is not None and not self.fingerprint.matches(fingerprint):
            raise UserError(
                f"{self.folder} was recorded on another model than {what}: {self.fingerprint.difference(fingerprint)}. "
                "Choose the folder that belongs to it, or record again."
            )
        found = self.files[0].shape(f"{self.indices[0]}-img")[-1]
        if found != hidden:
            raise UserError(
                f"The states in {self.folder} are {found} wide, those of {what} {hidden}: they are another model's."
            )

    def batch(self, samples: Tensor, block_index: int, device: torch.device | str = "cpu") -> State:
        """Samples of one group as they enter a block, float32 on `device`; raises `UserError` where that was not recorded."""
        img, txt = self.tokens(samples, block_index, device)
        vec, pe = [], []
        for sample in samples.tolist():
            file, row = self._of[sample]
            vec.append(file.row(f"{block_index}-vec" if f"{block_index}-vec" in file else "vec", row))
            positions = file[f"{block_index}-pe" if f"{block_index}-pe" in file else "pe"][:]
            pe.append(positions.reshape(-1, 1, *positions.shape[-4:])[:1])
        return State(img, txt, *(torch.cat(part).to(device).float() for part in (vec, pe)))

    def tokens(self, samples: Tensor, block_index: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """img and txt of `batch`."""
        if block_index not in self.indices:
            raise UserError(
                f"{self.folder} holds the states at {_listed(self.indices)}, but {block_index} is needed (what enters block "
                f"{block_index}, or leaves block {block_index - 1}): record more blocks, or choose other layers."
            )
        found = [self._of[sample] for sample in samples.tolist()]
        img, txt = (torch.cat([file.row(f"{block_index}-{name}", row) for file, row in found]) for name in ("img", "txt"))
        return img.to(device).float(), txt.to(device).float()


def _indices(file: ShardSlices) -> set[int]:
    return {int(found[1]) for name in file if (found := re.fullmatch(r"(\d+)-img", name))}


def _listed(indices: Sequence[int]) -> str:
    return f"{indices[0]} to {indices[-1]}" if len(indices) == indices[-1] - indices[0] + 1 else ", ".join(map(str, indices))
