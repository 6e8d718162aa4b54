"""What stands at a URL, on the machine that works with it: one copy for all its workers.

    checkpoint = file_at_hand("s3://bucket/flux.safetensors")        # a path of this machine
    folder = folder_at_hand("s3://bucket/recording", rows_of("single-7"))
    before = cached(folder)
    ...
    bring_back("s3://bucket/recording", folder, before)

A folder that all machines reach is worked in where it is: files are mapped into memory, and a machine's page cache reads them
once for all its workers. What changed at a URL is copied again.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import locked, replacing, write_text
from ..parsing import from_json
from ..recording.recording import CACHE, INTERNALS, STATES
from .shared import Shared

#: Seconds to wait for another worker of the same machine that copies.
PATIENCE = 86_400.0
VERSIONS = ".copied.json"
#: By what an object store or a disk tells that a file is another one.
_TOLD = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")


def copies_folder() -> Path:
    """Where this machine has copies: in its folder of temporary files ($TMPDIR), for its user alone."""
    folder = Path(tempfile.gettempdir()) / f"flux_poke_copies_{getpass.getuser()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise UserError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own.")
    return folder


def everything(name: str) -> bool:
    return True


def recorded(*kinds: str) -> Callable[[str], bool]:
    """Of a recording, what tells what is in it, and the files of these kinds of states."""
    begin = tuple(f"{STATES}/{kind}-" for kind in kinds)
    return lambda name: name in (INTERNALS, f"{STATES}/manifest.json") or name.startswith(begin)


def cached_of(name: str) -> Callable[[str], bool]:
    """Of a recording's cache, what was worked out of the site `name`, and what all share."""
    return lambda path: path.startswith(f"{CACHE}/") and (f"/{name}." in path or f".{name}." in path or "/vectors." in path)


def file_at_hand(url: str) -> Path:
    """The file at `url`, or a path; raises `UserError` where it cannot be reached."""
    folder, _, name = url.rpartition("/")
    shared = Shared(url)
    return shared.local or folder_at_hand(folder, lambda other: other == name) / name


def folder_at_hand(url: str, wanted: Callable[[str], bool] = everything) -> Path:
    """The folder at `url`, or a path; of a URL, what `wanted(name)` says."""
    shared = Shared(url)
    if shared.local is not None:
        return shared.local
    folder = copies_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / VERSIONS, patience=PATIENCE):
        known = _versions(folder)
        for name, version in _listed(shared).items():
            if wanted(name) and not (known.get(name) == version and (folder / name).is_file()):
                with replacing(folder / name) as new:
                    shared.fetch(name, new)
                write_text(folder / VERSIONS, json.dumps(known := {**known, name: version}))
    return folder


def cached(folder: Path) -> dict[str, int]:
    """Files in the cache of the recording in `folder`, with when they were written."""
    found = {}
    for path in (folder / CACHE).rglob("*.safetensors"):
        name = path.relative_to(folder).as_posix()
        if "/." not in name:
            with suppress(FileNotFoundError):
                found[name] = path.stat().st_mtime_ns
    return found


def bring_back(url: str, folder: Path, before: Mapping[str, int]) -> None:
    """Puts what is new in the cache of the recording in `folder` since `before` to the `url` that it is a copy of."""
    shared = Shared(url)
    if shared.local is None:
        for name, written in cached(folder).items():
            if before.get(name) != written:
                shared.put(folder / name, name)


def is_remote(url: str) -> bool:
    """Whether what is there has to be copied to be worked with."""
    return "://" in url and Shared(url).local is None


def absolute(place: str | os.PathLike[str]) -> str:
    """A path as all machines know it, or a URL as it is."""
    return f"{place}" if "://" in f"{place}" else os.path.abspath(place)


def _listed(shared: Shared) -> dict[str, str]:
    """What is there, by name, with what tells its version."""
    shared.fs.invalidate_cache()
    found: dict[str, dict[str, Any]] = shared.fs.find(shared.root, detail=True)
    begins = shared.root.rstrip("/") + "/"
    return {
        path.removeprefix(begins): json.dumps({key: str(about[key]) for key in _TOLD if key in about})
        for path, about in found.items()
    }


def _versions(folder: Path) -> dict[str, str]:
    try:
        return {str(name): str(version) for name, version in from_json((folder / VERSIONS).read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
