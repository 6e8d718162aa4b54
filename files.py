"""Writing files so that a reader finds the old one or the new one, whole, whatever happens in between.

with locked(path):                               # other processes wait
    write_safetensors(path, tensors, metadata)   # temporary name, fsync, rename

Only a file of its own kind is replaced: a plan takes the place of a plan, never that of a recording or a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

#: Types a safetensors file names, by torch's name: the format's, and bytes a number.
_DTYPES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "float32": ("F32", 4), "int32": ("I32", 4), "float16": ("F16", 2),
    "bfloat16": ("BF16", 2), "int16": ("I16", 2), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
_BYTES = dict(_DTYPES.values())

#: What the names of folders end in that hold a file as long as it is being written.
_UNFINISHED = ".unfinished"
#: What the names of formats end in.
_VERSION = " 0123456789"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a new file; it takes `path`'s place when the `with` ends well, and is gone otherwise.

    It stands in a hidden folder beside `path`, where a library may put temporary files of its own, and its name ends in `.new`,
    so that nobody takes it for a model. Raises `UserError` where the folder or the file cannot be written.
    """
    path = Path(path)
    with _explained(path):
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        folder, lock = _claimed_folder(path)
    new = folder / f"{path.name}.new"
    try:
        yield new
        with _explained(path):
            as_usual = folder / "as usual"  # what a new file may here, by umask or by the folder
            as_usual.touch()
            new.chmod(stat.S_IMODE(as_usual.stat().st_mode))
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _claimed_folder(path: Path) -> tuple[Path, FileLock]:
    """A new hidden folder beside `path` and its lock, held: one that nobody holds was left by a writer that was killed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent))
        lock = FileLock(folder / "lock")
        with suppress(OSError, NotImplementedError):  # without locks, nobody removes what is abandoned either
            lock.acquire()
        if folder.is_dir():  # nobody took it for abandoned before it was locked
            return folder, lock
        lock.release()


def _remove_abandoned(folder: Path) -> None:
    """Removes from `folder` what killed writers left unfinished."""
    for abandoned in folder.glob(f".*{_UNFINISHED}"):
        lock = FileLock(abandoned / "lock")
        try:
            lock.acquire(blocking=False)
        except (OSError, NotImplementedError):  # somebody is writing there
            continue
        shutil.rmtree(abandoned, ignore_errors=True)
        lock.release()
        if os.name == "nt":  # where the lock could not be removed as long as it was held
            shutil.rmtree(abandoned, ignore_errors=True)


def check_replaces(path: str | os.PathLike[str], format: str | None) -> None:
    """Raises `UserError` where a file stands at `path` whose header names another `format`, or none; its version may differ."""
    path = Path(path)
    if not path.is_file():
        return
    try:
        with safe_open(path, "np") as file:
            found = (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({error}): remove it, or choose another name.") from error
    if found.rstrip(_VERSION) != (format or "").rstrip(_VERSION):
        raise UserError(
            f"{path} is something else and is not replaced: expected '{format}', found '{found or 'no format'}'. "
            "Choose another name."
        )


def check_not_read(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises `UserError` where `path`, which is to be written, is one of the `inputs`."""
    if Path(path).resolve() in {Path(found).resolve() for found in inputs}:
        raise UserError(f"{path} is also what is read: choose another name for what is written.")


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
    """Holds the lock of `path` (a `.lock` file next to it) against other processes and threads."""
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
        yield
    finally:
        lock.release()


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, replaced as a whole; raises `UserError` where a file of another `format` stands there."""
    from safetensors.torch import save_file

    check_replaces(path, metadata.get("format"))
    with replacing(path) as new, _explained(Path(path)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new, dict(metadata))


def stream_safetensors(
    path: str | os.PathLike[str],
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """`write_safetensors` with one tensor in memory at a time.

    `kinds` gives every key's type in the format's words ("BF16", …) and shape; `tensor(key)` is asked for each in turn, and
    must be of that type and shape. The format: 8 bytes little-endian length, JSON header padded to 8 bytes, data without gaps
    (huggingface/safetensors, README). Wider types come first, so that all stay aligned.
    """
    import torch

    check_replaces(path, metadata.get("format"))
    order = sorted(kinds, key=lambda key: (-_BYTES[kinds[key][0]], key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        dtype, shape = kinds[key]
        start, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as new, _explained(Path(path)), open(new, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            value = tensor(key).detach().cpu().contiguous()
            if kind_of(value) != kinds[key]:
                raise ValueError(f"{key} is {value.dtype} {tuple(value.shape)}; announced as {kinds[key]}")
            if value.numel():
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def kind_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """A tensor's type, in the words of the safetensors format, and its shape."""
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")][0], tuple(tensor.shape)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A UTF-8 text file, replaced as a whole."""
    with replacing(path) as new, _explained(Path(path)):
        new.write_text(text, encoding="utf-8")
