"""Writing files so that a reader finds the old one or the new one, whole, whatever happens in between.

    with locked(path, progress):                     # other processes wait
        write_safetensors(path, tensors, metadata)   # temporary name, fsync, rename

Every file is written through here. Only a file of its own kind is replaced: a plan takes the place of a plan, a PNG that of a
PNG, a table that of a table. Where `path` is a link, the file that it leads to is replaced, and the link stays.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .errors import UserError
from .progress import Progress, silent, whole

if TYPE_CHECKING:
    from torch import Tensor

#: Types a safetensors file names, by torch's name: the format's, and bytes a number.
_DTYPES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "float32": ("F32", 4), "int32": ("I32", 4), "float16": ("F16", 2),
    "bfloat16": ("BF16", 2), "int16": ("I16", 2), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
_BYTES = dict(_DTYPES.values())

#: What files with these endings begin with. XML says what it is after its own first line.
_BEGINNINGS = {
    ".png": rb"\x89PNG\r\n\x1a\n",
    ".jpg": rb"\xff\xd8\xff",
    ".jpeg": rb"\xff\xd8\xff",
    ".gif": rb"GIF8[79]a",
    ".webp": rb"RIFF.{4}WEBP",
    ".mp4": rb".{4}ftyp",
    ".pdf": rb"%PDF-",
    ".svg": rb"<svg|<\?xml",
}

#: What figures of matplotlib, and images of Pillow, are written as.
FIGURES = (".png", ".jpg", ".pdf", ".svg")
IMAGES = (".png", ".jpg", ".webp")

#: Names of the folders that hold a file while it is written, and of all that stands in them.
_UNFINISHED = re.compile(r"\.flux-poke-[a-z0-9_]{8}\.unfinished")
_LOCK, _SAMPLE, _NEW, _OLD = "lock", "as usual", ".new", ".old.new"
_OURS = re.compile(rf"{_LOCK}|{_SAMPLE}|.*\{_NEW}|\.tmp.*", re.DOTALL)  # safetensors writes to a ".tmp..." first
#: As much of a text as is read to see whose it is.
_MOST_TEXT = 10_000_000
#: What the names of formats end in.
_VERSION = " 0123456789"
#: Seconds to wait for a lock, and between two looks at it. Who has one for longer is stuck.
PATIENCE, _LOOK = 600.0, 0.25


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a new file; it takes `path`'s place when the `with` ends well, and is gone otherwise.

    It stands in a hidden folder beside `path`, where a library may put temporary files of its own, and nobody takes it for a
    model. Raises `UserError` where it cannot be written, and where `path` has the ending of a picture and is something else.
    """
    given, path = Path(path), _target(path)
    with _explained(given):
        check_writable(path)
        check_beginning(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        folder, lock = _claimed_folder(path)
    new = folder / f"{path.name}{_NEW}"
    try:
        with _explained(given):
            yield new
            as_usual = folder / _SAMPLE  # what a new file may here, by umask or by the folder
            as_usual.touch()
            new.chmod(stat.S_IMODE(as_usual.stat().st_mode))
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], foreign: Callable[[Path], str | None]) -> Iterator[Path]:
    """An empty folder to fill; it takes `path`'s place when the `with` ends well, and is gone otherwise.

    `foreign(folder)` names what in a folder is not of the kind that is written. Raises `UserError` where a file stands at
    `path`, or a folder with something foreign in it.
    """
    given, path = Path(path), Path(os.path.abspath(_target(path)))
    with _explained(given):
        check_folder(path, foreign)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        folder, lock = _claimed_folder(path)
    new, old = folder / f"{path.name}{_NEW}", folder / f"{path.name}{_OLD}"
    try:
        with _explained(given):
            new.mkdir()
            yield new
            with whole():
                if path.is_dir():
                    os.replace(path, old)
                try:
                    os.replace(new, path)
                except OSError:
                    if old.is_dir():
                        os.replace(old, path)
                    raise
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def check_folder(path: str | os.PathLike[str], foreign: Callable[[Path], str | None]) -> None:
    """Raises `UserError` where `replacing_folder` would replace something else than its own kind."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another name for a folder.")
    if path.is_dir() and os.path.samefile(path, os.getcwd()):
        raise UserError(f"{path} is the folder that you are in, which cannot be replaced: name one in it.")
    if path.is_dir() and (found := foreign(path)) is not None:
        raise UserError(f"{path} holds {found}, which is something else and is not replaced: choose another folder.")


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that `path` stands for: where a link leads, else itself."""
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise UserError(f"{path} is a link that leads to itself: remove it, or choose another name.")
    return target


def _claimed_folder(path: Path) -> tuple[Path, FileLock]:
    """A new hidden folder beside `path` and its lock, held: one that nobody holds was left by a writer that was killed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".flux-poke-", suffix=".unfinished", dir=path.parent))
        lock = FileLock(folder / _LOCK)
        with suppress(OSError, NotImplementedError):  # without locks, nobody removes what is abandoned either
            lock.acquire()
        if folder.is_dir():  # nobody took it for abandoned before it was locked
            return folder, lock
        lock.release()


def _remove_abandoned(folder: Path) -> None:
    """Removes from `folder` what our own killed writers left unfinished."""
    for abandoned in folder.glob(".flux-poke-*.unfinished"):
        if not _UNFINISHED.fullmatch(abandoned.name) or abandoned.is_symlink():
            continue
        lock = FileLock(abandoned / _LOCK)
        try:
            if not all(map(_OURS.fullmatch, os.listdir(abandoned))):
                continue
            lock.acquire(blocking=False)
        except (OSError, NotImplementedError):  # somebody is writing there
            continue
        _put_back(abandoned)
        shutil.rmtree(abandoned, ignore_errors=True)
        lock.release()
        if os.name == "nt":  # where the lock could not be removed as long as it was held
            shutil.rmtree(abandoned, ignore_errors=True)


def _put_back(abandoned: Path) -> None:
    """Puts a folder that was about to be replaced back into its place, where a kill came before the new one took it."""
    for old in abandoned.glob(f"*{_OLD}"):
        place = abandoned.parent / old.name.removesuffix(_OLD)
        if old.is_dir() and not place.exists():
            os.replace(old, place)


def check_beginning(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` where a file stands at `path` that is not what its ending says: a ".png" that is not a PNG."""
    path = Path(path)
    with suppress(FileNotFoundError), open(path, "rb") as file:
        found = file.read(16)
        if found and not re.match(_BEGINNINGS.get(path.suffix.lower(), b""), found, re.DOTALL):
            raise UserError(f"{path} is something else than its ending says, and is not replaced: choose another name.")


def check_picture(path: str | os.PathLike[str], endings: Iterable[str] = FIGURES) -> None:
    """Raises `UserError` where no picture can be written to `path`: another ending than `endings`, or another file is there."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise UserError(f"{path} is not a picture that can be written: expected a name ending in one of {', '.join(endings)}.")
    check_writable(path)
    check_beginning(path)


def check_text(path: str | os.PathLike[str], what: str, ours: Callable[[str], Any]) -> None:
    """Raises `UserError` where a file stands at `path` that is not `what`: `ours(text)` is false, or fails."""
    path = Path(path)
    check_writable(path)
    try:
        with open(path, encoding="utf-8") as file:
            found = not (text := file.read(_MOST_TEXT)) or ours(text)
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        found = False
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): choose another name.") from error
    if not found:
        raise UserError(f"{path} is not {what}, and is not replaced: choose another name.")


def check_replaces(path: str | os.PathLike[str], format: str | None) -> None:
    """Raises `UserError` where a folder stands at `path`, or a file whose header names another `format`, or none.

    Its version may differ.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: choose another name.")
    if not path.is_file():
        return
    try:
        with safe_open(path, "np") as file:
            found = (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}): remove it, or choose another name.") from error
    if found.rstrip(_VERSION) != (format or "").rstrip(_VERSION):
        raise UserError(
            f"{path} is something else and is not replaced: expected '{format}', found '{found or 'no format'}'. "
            "Choose another name."
        )


def check_not_read(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises `UserError` where `path`, which is to be written, is one of the `inputs`."""
    if os.path.realpath(path) in {os.path.realpath(found) for found in inputs}:
        raise UserError(f"{path} is also what is read: choose another name for what is written.")


def check_sum(path: str | os.PathLike[str], parts: Iterable[str | os.PathLike[str]], what: str = "the files") -> None:
    """Raises `UserError` where something stands at `path`, to which the sum of `parts` is written, that is none of them."""
    if os.path.exists(path) and os.path.realpath(path) not in {os.path.realpath(part) for part in parts}:
        raise UserError(f"{path} is there already and is none of {what} to add up: choose another name, or add it too.")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` where a folder stands at `path`, or a file that is marked read-only."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: choose another name.")
    if path.exists() and not path.stat().st_mode & 0o222:
        raise UserError(f"{path} is read-only: choose another name or make it writable.")


@contextmanager
def _explained(path: Path, done: str = "written") -> Iterator[None]:
    """What the file system has to say about `path` as a sentence for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be {done} ({error}): choose another place or change its permissions.") from error


@contextmanager
def locked(path: str | os.PathLike[str], progress: Progress = silent, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the lock of `path` (a hidden file next to it) against other processes and threads.

    While another has it, `progress` is called four times a second. Raises `UserError` after `patience` seconds, saying whose
    lock it is, and where there can be none.
    """
    path = _target(path)
    hidden = path.with_name(f".{path.name}.lock")
    owner, whose = path.with_name(f".{path.name}.owner"), "another program"
    lock, began = FileLock(hidden), time.monotonic()
    with _explained(path, "locked"):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(Timeout):
                lock.acquire(timeout=_LOOK)
                break
            if time.monotonic() - began > patience:
                with suppress(OSError):
                    whose = owner.read_text() or whose
                raise UserError(f"{path} has been locked for {patience:.0f} s by {whose}: wait until it has ended, or end it.")
            progress(f"waiting for {path.name}", 0, 1)
    try:
        with suppress(OSError):  # whose lock it is; it does without
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}")
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, replaced as a whole; raises `UserError` where a file of another `format` stands there."""
    from safetensors.torch import save_file

    check_replaces(path, metadata.get("format"))
    with replacing(path) as new:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new, dict(metadata))


def stream_safetensors(
    path: str | os.PathLike[str],
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """`write_safetensors` with one tensor in memory at a time.

    `kinds` gives every key's type in the format's words ("BF16", ...) and shape, `tensor(key)` each in turn. The format: 8
    bytes little-endian length, JSON header padded to 8 bytes, data without gaps (huggingface/safetensors, README). Wider types
    come first, so that all stay aligned.
    """
    import torch

    check_replaces(path, metadata.get("format"))
    order = sorted(kinds, key=lambda key: (-_BYTES[kinds[key][0]], key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        dtype, shape = kinds[key]
        start, end = end, end + bytes_of(kinds[key])
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as new, open(new, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            value = tensor(key).detach().cpu().contiguous()
            if kind_of(value) != kinds[key]:
                raise ValueError(f"{key} is {value.dtype} {tuple(value.shape)}; announced as {kinds[key]}")
            if value.numel():
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def size_text(size: float) -> str:
    """Bytes in words: GB from a tenth of one on, else MB."""
    return f"{size / 1e9:.4g} GB" if size >= 1e8 else f"{size / 1e6:.4g} MB"


def kind_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """A tensor's type, in the words of the safetensors format, and its shape."""
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")][0], tuple(tensor.shape)


def torch_type(word: str) -> Any:
    """torch's type for the word of the safetensors format."""
    import torch

    return getattr(torch, next(name for name, (known, _) in _DTYPES.items() if known == word))


def bytes_of(kind: tuple[str, tuple[int, ...]]) -> int:
    """Bytes that a tensor of a type, in the words of the safetensors format, and shape takes in a file."""
    return _BYTES[kind[0]] * math.prod(kind[1])


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A UTF-8 text file, replaced as a whole."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_picture(path: str | os.PathLike[str], picture: Any) -> None:
    """A figure of matplotlib or an image of Pillow as what the ending of `path` says, replaced as a whole."""
    format, figure = Path(path).suffix[1:].lower(), hasattr(picture, "savefig")
    check_picture(path, FIGURES if figure else IMAGES)
    with replacing(path) as new:
        if figure:
            picture.savefig(new, format=format, dpi=110)
        else:
            picture.save(new, {"jpg": "JPEG"}.get(format, format))
