"""A number in a file that goes up by one each time it is asked for."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError
from .files import locked, write_text


def count_up(path: Path, limit: int = 0, restart: bool = False) -> int:
    """The next number of the counter at `path`, from 0; after `limit` numbers it starts over (0 = never).

    Safe beside other processes. Raises `UserError` where the file holds something else.
    """
    with locked(path):
        try:
            count = 0 if restart or not path.exists() else int(path.read_text()) + 1
        except ValueError as error:
            raise UserError(f"{path} holds no number: remove it, or set restart.") from error
        if limit and count >= limit:
            count = 0
        write_text(path, f"{count}\n")
    return count
