"""A number in a file that goes up by one each time it is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from .files import check_text, locked, write_text


def count_up(path: Path, limit: int = 0, restart: bool = False) -> int:
    """The next number of the counter at `path`, from 0; after `limit` numbers it starts over (0 = never).

    Safe beside other processes. Raises `UserError` where the file is something else, which is not replaced by `restart` either.
    """
    with locked(path):
        check_text(path, "a counter's file", lambda text: re.fullmatch(r"\d{1,18}\s*", text, re.ASCII))
        count = 0 if restart or not path.exists() else int(path.read_text() or -1) + 1
        if limit and count >= limit:
            count = 0
        write_text(path, f"{count}\n")
    return count
