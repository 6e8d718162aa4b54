"""Prompts from a text file, one a line.

    prompts = read_prompts("prompts.txt", pattern='"')       # those with a text to be rendered in quotes
    prompt, index = pick(prompts, 7)                         # wraps around at the end
    prompt, index = pick(prompts, RANDOM, seed=1)

`SHIPPED` is the short list that comes with the package; `download_prompts.py` fetches long ones.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

SHIPPED = Path(__file__).with_name("prompts.txt")
#: The index that stands for any prompt.
RANDOM = -1


def read_prompts(path: str | os.PathLike[str] = SHIPPED, pattern: str = "") -> list[str]:
    """The lines of a UTF-8 file, without blank ones, in which the regular expression `pattern` is found.

    Raises `UserError` where the file is missing or no text, where `pattern` is no regular expression, and where no
    line is left.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UserError(f"The regular expression {pattern!r} cannot be read: {error}.") from error
    try:
        with open(path, encoding="utf-8-sig") as file:  # editors on Windows put a byte order mark in front
            prompts = [line.strip() for line in file if not line.isspace()]
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: expected a text file with one prompt a line.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): expected a text file with one prompt a line.") from error
    found = [prompt for prompt in prompts if wanted.search(prompt)]
    if not prompts:
        raise UserError(f"{path} holds no prompts: expected one a line.")
    if not found:
        raise UserError(f"None of the {len(prompts)} prompts in {path} matches the regular expression {pattern!r}.")
    return found


def pick(prompts: Sequence[str], index: int, seed: int | None = None) -> tuple[str, int]:
    """Prompt number `index`, counted round and round from 0, and its place in the list.

    `RANDOM` takes any of them: the same for the same `seed`, a new one each time without. Raises `UserError` for
    other numbers below 0.
    """
    if index < RANDOM:
        raise UserError(f"Prompts are counted from 0, and {RANDOM} takes one at random; found {index}.")
    place = random.Random(seed).randrange(len(prompts)) if index == RANDOM else index % len(prompts)
    return prompts[place], place
