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
from .manifest import nothing_recorded, require_model
from .shards import Samples, ShardFile
from .store import MANIFEST, HiddenStates


@dataclass(frozen=True)
class State:
    """What enters a block: img, txt [batch, tokens, hidden], vec [batch, hidden], pe [batch, 1, tokens, head dim / 2, 2, 2]."""

    img: Tensor
    txt: Tensor
    vec: Tensor
    pe: Tensor


class BlockStates(Samples):
    """States by sample (one image at one step) and block index: what enters block k, and what leaves the last one.

    Attributes:
        indices: of the states that every file has, ascending.
        fingerprint: of the model they come from; None in the original's folders, whose digest is of files' names, sizes, times.
    """

    def __init__(self, folder: Path, files: Sequence[ShardFile], fingerprint: Fingerprint | None, digest: str):
        self.folder, self.fingerprint = folder, fingerprint
        self.indices = sorted(set.intersection(*(_indices(file) for file in files)))
        if not self.indices:
            raise UserError(f"The block states in {folder} have no block in common: record the same blocks in one folder.")
        super().__init__(files, [f"{self.indices[0]}-{stream}" for stream in ("img", "txt")], digest)
        self.hidden = files[0].shape(f"{self.indices[0]}-img")[-1]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> BlockStates:
        """Raises `UserError` where there are no block states in `folder`."""
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            store = HiddenStates.open(folder)
            return cls(folder, store.files("blocks"), store.manifest.fingerprint, store.digest("blocks"))
        files = [file for path in sorted(folder.glob("*.safetensors")) if _indices(file := ShardFile(path))]
        if not files:
            raise nothing_recorded(folder, "blocks")
        counts = [file.shape(f"{min(_indices(file))}-img")[0] for file in files]
        for file, images in zip(files, torch.arange(sum(counts)).split(counts), strict=True):
            file.images = images
        known = [(file.path.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]
        return cls(folder, files, None, hashlib.sha256(f"{known}".encode()).hexdigest())

    def require(self, fingerprint: Fingerprint, hidden: int, what: str) -> None:
        """Raises `UserError` where the states are of another model than the one with `fingerprint`, called `what`."""
        if self.fingerprint is not None:
            require_model(self.fingerprint, fingerprint, self.folder, what)
        if self.hidden != hidden:
            raise UserError(
                f"The states in {self.folder} are {self.hidden} wide, those of {what} {hidden}: they are another model's."
            )

    def batch(self, samples: Tensor, block_index: int, device: torch.device | str = "cpu") -> State:
        """Samples of one group as they enter a block, float32 on `device`; raises `UserError` where that was not recorded."""
        img, txt = self.tokens(samples, block_index, device)
        vec, pe = [], []
        for file, row in self.places(samples):
            own = f"{block_index}-" if f"{block_index}-vec" in file.names else ""
            vec.append(file.read(f"{own}vec", row))
            positions = file.read(f"{own}pe")
            pe.append(positions.reshape(-1, 1, *positions.shape[-4:])[:1])
        return State(img, txt, *(torch.cat(part).to(device).float() for part in (vec, pe)))

    def tokens(self, samples: Tensor, block_index: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """img and txt of `batch`."""
        if block_index not in self.indices:
            raise UserError(
                f"{self.folder} holds the states at {_listed(self.indices)}, but {block_index} is needed (what enters block "
                f"{block_index}, or leaves block {block_index - 1}): record more blocks, or choose other layers."
            )
        img, txt = (self.read(samples, f"{block_index}-{stream}").to(device).float() for stream in ("img", "txt"))
        return img, txt


def _indices(file: ShardFile) -> set[int]:
    return {int(found[1]) for name in file.names if (found := re.fullmatch(r"(\d{1,9})-img", name))}


def _listed(indices: Sequence[int]) -> str:
    return f"{indices[0]} to {indices[-1]}" if len(indices) == indices[-1] - indices[0] + 1 else ", ".join(map(str, indices))
