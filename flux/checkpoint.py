"""Reading a FLUX checkpoint file tensor by tensor.

    checkpoint = Checkpoint(path)
    checkpoint.layout, checkpoint.metadata
    weight = checkpoint["double_blocks.3.img_mlp.0.weight"]      # read now, only this

Keys are canonical (no prefix, `.scale` for the q/k norms). Opening reads the header alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .layout import canonical_key, read_layout

Read = TypeVar("Read")


class Checkpoint(Mapping[str, Tensor]):
    """A FLUX transformer on disk as a mapping of canonical keys to tensors, each read when it is asked for.

    Raises `UserError` where the file is missing, damaged, not safetensors, or no FLUX.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open_safetensors(self.path)
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.layout = read_layout(self.shapes, source=str(self.path))
        self._stored = {
            canonical_key(key, self.layout.prefix): key for key in self.shapes if key.startswith(self.layout.prefix)
        }

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(self._stored[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[self._stored[key]]

    def dtype(self, key: str) -> str:
        """What the tensor's numbers are stored as, in the format's own words ("BF16", "F8_E4M3", ...), without reading them."""
        return self._file.get_slice(self._stored[key]).get_dtype()

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor, without reading the others."""
        return self._file.get_slice(self._stored[key])[start:stop]

    def release(self) -> None:
        """Gives back the memory that read tensors take as pages of the file, but for those still in use."""
        self._file = open_safetensors(self.path)


def scale_key(keys: Container[str], key: str) -> str | None:
    """The key of the scale that belongs to the quantised weight `key`, or None."""
    layer = key.removesuffix(".weight")
    return next((name for name in (f"{layer}.weight_scale", f"{layer}.scale_weight") if name in keys), None)


def require_finite(tensor: Tensor, key: str) -> Tensor:
    """`tensor`; raises `UserError` where it holds a number that is not finite. Numbers of 8 bits are not looked at."""
    looked_at = tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel()
    # Least and largest are not finite where any number is not; unlike isfinite(tensor), that takes no memory.
    if looked_at and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(
            f"{key} holds numbers that are not finite, with which every picture is black: look at the model, the recording or "
            "the LoRA that it was made with."
        )
    return tensor


def require_format(
    metadata: Mapping[str, str] | None, path: str | os.PathLike[str], expected: str, what: str, advice: str = ""
) -> dict[str, str]:
    """The header of a safetensors file whose `format` is `expected`.

    Else raises `UserError`, saying that `path` is not a `what`, with the sentence `advice` on what to do.
    """
    found = (metadata or {}).get("format", "a safetensors file of another kind")
    if found != expected:
        article = "an" if what[0] in "aeiou" else "a"
        raise UserError(f"{path} is not {article} {what}: expected '{expected}', found '{found}'. {advice}".rstrip())
    return dict(metadata or {})


def open_safetensors(path: str | os.PathLike[str]):
    """`safetensors.safe_open` with errors that name the file and say what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: expected a .safetensors file.")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: replaced by a smaller file meanwhile
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it is damaged, cut short, or of another format. "
            "Copy or download it again."
        ) from error


def read_finite(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """All tensors of a small file, and its header; raises `UserError` where a number is not finite."""
    with open_safetensors(path) as file:
        return {key: require_finite(file.get_tensor(key), f"{path}: {key}") for key in file.keys()}, file.metadata()


@contextmanager
def undamaged(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """What is found missing or wrong in the file at `path` makes it a damaged `what`, in a sentence."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, ValueError, TypeError, RuntimeError, StopIteration, SafetensorError, OverflowError) as error:
        raise UserError(f"{path} is a damaged {what} ({error}): record again or use a copy.") from error


def unreplaced(path: str | os.PathLike[str], read: Callable[[], Read]) -> Read:
    """What `read` gives of a file that nobody replaced meanwhile; it is read again where somebody did.

    safetensors opens a file twice, so that a reader could meet the old header and the new numbers.
    """
    while True:
        before = _state(path)
        try:
            found = read()
        except UserError:
            if _state(path) == before:
                raise
        else:
            if _state(path) == before:
                return found


def _state(path: str | os.PathLike[str]) -> tuple[int, ...]:
    with suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return ()
