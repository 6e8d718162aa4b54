"""Writing files so that a reader finds the old one or the new one, whole, whatever happens in between.

with locked(path):                               # other processes wait
    write_safetensors(path, tensors, metadata)   # temporary name, fsync, rename
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a new file; it takes `path`'s place when the `with` ends well, and is gone otherwise.

    It has the name of `path`, in a hidden folder beside it, where a library may put temporary files of its own.
    Raises `UserError` where the folder or the file cannot be written.
    """
    path = Path(path)
    with _explained(path):
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    new = folder / path.name
    try:
        yield new
        with _explained(path):
            umask = os.umask(0)
            os.umask(umask)
            new.chmod(0o666 & ~umask)
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` where a folder stands at `path`, or a file that is marked read-only."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: choose another name.")
    if path.exists() and not path.stat().st_mode & 0o222:
        raise UserError(f"{path} is read-only: choose another name or make it writable.")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the file system has to say about `path` as a sentence for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}): choose another place or change its permissions.") from error


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of `path` (a `.lock` file next to it) against other processes and threads.

    Whoever holds it is the only one that writes: what a killed writer left half-written beside `path` is removed.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{path} cannot be locked for writing ({error}): choose another place or change its permissions."
        ) from error
    try:
        for abandoned in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield
    finally:
        lock.release()


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, replaced as a whole."""
    from safetensors.torch import save_file

    with replacing(path) as new, _explained(Path(path)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new, dict(metadata))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A UTF-8 text file, replaced as a whole."""
    with replacing(path) as new, _explained(Path(path)):
        new.write_text(text, encoding="utf-8")
