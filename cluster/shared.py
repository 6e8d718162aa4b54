"""A folder that all machines of a cluster reach: on a disk that they share, or wherever fsspec can write (s3://, gcs://, ...).

    shared = Shared("s3://bucket/recording")
    shared.put(Path("/tmp/rows.safetensors"), "hidden_states/rows-00000.safetensors")
    shared.fetch("internals.safetensors", Path("/tmp/internals.safetensors"))
    shared.local                                     # the folder itself where it is one of this machine, else None

A file is there whole or not at all: on a disk it takes its name when it is complete, as in an object store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import replacing
from ..parsing import from_json


class Shared:
    """The folder at `url`, which need not exist; raises `UserError` where fsspec does not know how to reach it."""

    def __init__(self, url: str):
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError, OSError) as error:
            raise UserError(
                f"{url} cannot be reached ({error}): expected a folder, or a URL that fsspec knows, such as s3://bucket/name, "
                "with the package that it takes."
            ) from error
        self.local = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def __str__(self) -> str:
        return self.url

    def put(self, file: Path, name: str) -> None:
        """Copies a file of this machine to `name`, in place of what is there."""
        with self._explained(name):
            if self.local is None:
                self.fs.put_file(str(file), self._place(name))
                return
            with replacing(self.local / name) as new:
                shutil.copyfile(file, new)

    def fetch(self, name: str, to: Path) -> Path:
        """A copy of a file on this machine, `to`."""
        to.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(name):
            self.fs.get_file(self._place(name), str(to))
        return to

    def write(self, name: str, text: str) -> None:
        with self._explained(name):
            if self.local is None:
                self.fs.pipe_file(self._place(name), text.encode())
                return
            with replacing(self.local / name) as new:
                new.write_text(text, encoding="utf-8")

    def read(self, name: str) -> str:
        with self._explained(name):
            return self.fs.cat_file(self._place(name)).decode()

    def exists(self, name: str) -> bool:
        with self._explained(name):
            return self.fs.exists(self._place(name))

    def names(self, folder: str, ending: str) -> list[str]:
        """Names of the files in `folder` with this ending, as the other methods take them, sorted."""
        with self._explained(folder):
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self._place(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(f"{folder}/{Path(place).name}" for place in found if place.endswith(ending))

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there."""
        with self._explained(name), suppress(FileNotFoundError):
            self.fs.rm(self._place(name), recursive=True)

    def _place(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """An error of the place becomes a sentence; what errors there are depends on the package that reaches it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.url}/{name} cannot be read or written ({error!r:.300}).") from error


def claim(shared: Shared, name: str, own: Mapping[str, Any], kind: str) -> None:
    """Notes in the file `name` whose the folder is: a `kind` of work, told from others by `own`.

    Raises `UserError` where it is another one's, and says what differs, or where the file is damaged.
    """
    if not shared.exists(name):
        return shared.write(name, json.dumps(own, indent=1))
    text = shared.read(name)
    try:
        found = from_json(text)
        differ = sorted(key for key in {*own, *found} if own.get(key) != found.get(key))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{shared}/{name} is damaged ({error}): choose another folder with --out.") from error
    if differ:
        raise UserError(
            f"{shared} holds another {kind} of a cluster (other {', '.join(differ)}): give the arguments that it was begun "
            "with to go on with it, or choose another folder with --out."
        )
