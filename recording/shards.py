"""The files of a `hidden_states/` folder, one at a time: read row by row, halved, and refused where a number is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..flux.checkpoint import open_safetensors


class ShardSlices(Mapping[str, Any]):
    """The tensors of one shard as things to be sliced: `slices["x"][3:4]` reads that row alone."""

    def __init__(self, path: Path):
        self.path = path
        self._finite: set[tuple[str, int]] = set()

    @cached_property
    def _file(self):
        return open_safetensors(self.path)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file.keys())

    def row(self, name: str, row: int) -> Tensor:
        """One row [1, ...]; raises `UserError` where it holds a number that is not finite, which the first look at it tells."""
        found = self[name][row : row + 1]
        if (name, row) not in self._finite:
            require_finite(found, self.path, name)
            self._finite.add((name, row))
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].get_shape())

    def __getitem__(self, name: str) -> Any:
        try:
            return self._file.get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{self.path} is damaged: {name} is not in it. Record again into a new folder.") from error

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def require_finite(tensor: Tensor, path: Path, name: str) -> None:
    """Raises `UserError` where a number in `tensor`, called `name` in the file at `path`, is not finite."""
    wrong = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
    if wrong:
        raise UserError(f"{path} is damaged: {wrong} numbers of {name} are not finite. Record again into a new folder.")


def halve(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every other row. Rows of one image and step stand together and in random order, so each loses half of its own."""
    return {key: tensor[::2].contiguous() for key, tensor in tensors.items()}
