"""The files of a `hidden_states/` folder, one at a time: read row by row, halved, and refused where a number is not finite.

file = ShardFile(path)
file.names, file.shape("x")
file.read("x"), file.read("x", row=3)            # all of it; one row [1, ...]

samples = Samples([file, ...], alike=("x",))     # the rows of several files as one list
samples.read(torch.tensor([3, 14]), "x")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..flux.checkpoint import open_safetensors


class ShardFile:
    """The tensors of one file, each read when it is asked for; `images` [rows] are those its rows belong to."""

    def __init__(self, path: Path, images: Tensor | None = None):
        self.path = path
        self.images = torch.empty(0, dtype=torch.int64) if images is None else images
        self._finite: set[tuple[str, int | None]] = set()

    @cached_property
    def _file(self) -> Any:
        return open_safetensors(self.path)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it [1, ...]; raises `UserError` where it is not there, or a number in it is not finite."""
        found = self._slice(name)[:] if row is None else self._slice(name)[row : row + 1]
        if (name, row) not in self._finite:
            wrong = int((~found.isfinite()).sum()) if found.is_floating_point() else 0
            if wrong:
                raise UserError(
                    f"{self.path} is damaged: {wrong} numbers of {name} are not finite. Record again into a new folder."
                )
            self._finite.add((name, row))
        return found

    def _slice(self, name: str) -> Any:
        try:
            found = self._file.get_slice(name)
            if not found.get_shape():
                raise UserError(f"{self.path} is damaged: {name} is a single number. Record again into a new folder.")
            return found
        except SafetensorError as error:
            raise UserError(f"{self.path} is damaged: {name} is not in it. Record again into a new folder.") from error


class HeldShard:
    """The same for tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], images: Tensor):
        self.tensors, self.names, self.images = tensors, frozenset(tensors), images

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, row: int | None = None) -> Tensor:
        return self.tensors[name] if row is None else self.tensors[name][row : row + 1]


class Samples:
    """Samples (one image at one step) of several files, one row each.

    Attributes:
        image: number of the image each belongs to, int64 [samples].
        groups: samples that can stand in one batch, since the tensors called `alike` have equal shapes, or are in none.
        digest: hexadecimal; another one whenever more of them are recorded. Empty for those in memory.
    """

    def __init__(self, files: Sequence[ShardFile | HeldShard], alike: Sequence[str], digest: str = ""):
        self.digest = digest
        self.image = torch.cat([file.images for file in files])
        self._place = [(file, row) for file in files for row in range(len(file.images))]
        by_shape: dict[tuple, list[int]] = {}
        for sample, (file, _) in enumerate(self._place):
            shapes = tuple(file.shape(name)[1:] if name in file.names else None for name in alike)
            by_shape.setdefault(shapes, []).append(sample)
        self.groups = [torch.tensor(samples) for samples in by_shape.values()]

    def __len__(self) -> int:
        return len(self.image)

    def places(self, samples: Tensor) -> list[tuple[ShardFile | HeldShard, int]]:
        return [self._place[sample] for sample in samples.tolist()]

    def read(self, samples: Tensor, name: str) -> Tensor:
        """One tensor of all `samples` [samples, ...]."""
        return torch.cat([file.read(name, row) for file, row in self.places(samples)])


def parts_at(values: Any, at: Any) -> dict[str, Any]:
    """The tensors of a dataclass at `at`, by name; None stays None."""
    return {name: None if part is None else part[at] for name, part in vars(values).items()}


def halve(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every other row. Rows of one image and step stand together and in random order, so each loses half of its own."""
    return {key: tensor[::2].contiguous() for key, tensor in tensors.items()}
