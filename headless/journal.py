"""`queue.json` in a queue's output folder: what is done, and which attempts were begun and never heard of again.

journal = Journal.at(Path("out"), resume=True)
journal.begin("127.0.0.1:8188", "4f1c...", attempt)
journal.end("127.0.0.1:8188", "4f1c...", ["0007_a.png"])
journal.done, journal.given_up("127.0.0.1:8188")
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from threading import Lock

from ..errors import UserError, WrongArguments
from ..files import check_text, write_text
from ..parsing import from_json, read_text

NAME, FORMAT = "queue.json", "flux-poke queue 1"


class Journal:
    """In memory, and in `folder` where there is one; threads may share it.

    Attributes:
        id: of this queue; its runs count apart from those of any other.
        done: by key of a run that ended well, the server that drew it and the names of its files.
        attempts: by prompt id of one that did not, its server and its run's key.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.id = uuid.uuid4().hex[:8]
        self.done: dict[str, tuple[str, list[str]]] = {}
        self.attempts: dict[str, tuple[str, str]] = {}
        self._lock = Lock()

    @classmethod
    def at(cls, folder: Path | None, resume: bool = False) -> Journal:
        """The journal in `folder`: a new one, or with `resume` the one that is there.

        Raises `WrongArguments` where one is there and it is not to be resumed, or it is no journal.
        """
        journal = cls(folder)
        if folder is None or not (folder / NAME).exists():
            return journal
        path = folder / NAME
        try:
            found = from_json(read_text(path))
            if found["format"] != FORMAT:
                raise ValueError(found["format"])
            journal.id = str(found["id"])
            journal.done = {str(key): (str(server), list(map(str, files))) for key, (server, files) in found["done"].items()}
            journal.attempts = {str(name): (str(server), str(key)) for name, (server, key) in found["attempts"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WrongArguments(f"{path} is no journal of a queue ({error!r}): choose another folder with --out.") from error
        if not resume:
            raise WrongArguments(
                f"{folder} holds a queue with {len(journal.done)} runs done: add --resume to go on with it, or choose another "
                "folder with --out."
            )
        return journal

    def begin(self, server: str, key: str, attempt: str) -> None:
        """Called before a run is sent."""
        with self._lock:
            self.attempts[attempt] = (server, key)
            self._save()

    def end(self, server: str, key: str, files: list[str]) -> None:
        """A run ended well, and what it left is here: it counts, and what was given up on that server is settled."""
        with self._lock:
            self.done[key] = (server, files)
            self.attempts = {attempt: (there, of) for attempt, (there, of) in self.attempts.items() if there != server}
            self._save()

    def forget(self, attempt: str) -> None:
        """An attempt that the server did not take."""
        with self._lock:
            self.attempts.pop(attempt, None)
            self._save()

    def given_up(self, server: str) -> tuple[str, ...]:
        """Attempts on a server that are not to count."""
        with self._lock:
            return tuple(attempt for attempt, (there, _) in self.attempts.items() if there == server)

    def _save(self) -> None:
        if self.folder is None:
            return
        path = self.folder / NAME
        check_text(path, "a journal of a queue", lambda text: json.loads(text)["format"] == FORMAT)
        try:
            write_text(
                path, json.dumps({"format": FORMAT, "id": self.id, "done": self.done, "attempts": self.attempts}, indent=1)
            )
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error}): make room, then go on with --resume.") from error
