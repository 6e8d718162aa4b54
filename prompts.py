"""Prompts from a text file, one per line.

    prompts = read_prompts("prompts.txt", pattern='"')       # those that contain a quotation mark
    prompt, index = pick(prompts, 7)                         # wraps around at the end
    prompt, index = pick(prompts, RANDOM, seed=1)
    recorded, measured = split_prompts(prompts)              # never the same in both

`SHIPPED` is the short list that comes with the package; `download_prompts.py` fetches long ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

SHIPPED = Path(__file__).with_name("prompts.txt")
#: Those that come with the package by name: for a FLUX, and for the tiny ones.
LISTS = {path.name: path for path in (SHIPPED, SHIPPED.with_name("digits.txt"))}
#: The index that stands for any prompt.
RANDOM = -1
#: Prompts to record where no number is given, and to leave to measure on: one of five, and no more than this.
ENOUGH, MEASURED = 60, 20

#: Looks for a regular expression in lines: reads [pattern, lines] and writes the numbers of those it is found in, or why not.
_SEARCH = """
import json, re, sys
pattern, lines = json.load(sys.stdin)
try:
    search = re.compile(pattern).search
    found = [number for number, line in enumerate(lines) if search(line)]
except Exception as error:
    found = f"{error}"
json.dump(found, sys.stdout)
"""
#: Seconds that it may take.
SEARCH_LIMIT = 10.0


def read_prompts(path: str | os.PathLike[str] = SHIPPED, pattern: str = "") -> list[str]:
    """The lines of a UTF-8 file, without blank ones, in which the regular expression `pattern` is found.

    Raises `UserError` where the file is missing or is not text, where `pattern` is not a regular expression or takes more than
    `SEARCH_LIMIT` seconds, and where no line is left.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # editors on Windows put a byte order mark in front
            prompts = [line.strip() for line in file if not line.isspace()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{path} {why}: expected a text file with one prompt per line.") from error
    if not prompts:
        raise UserError(f"{path} holds no prompts: expected one per line.")
    found = _matching(prompts, pattern) if pattern else prompts
    if not found:
        raise UserError(f"None of the {len(prompts)} prompts in {path} matches the regular expression {pattern!r}.")
    return found


def _matching(prompts: Sequence[str], pattern: str) -> list[str]:
    """The prompts in which `pattern` is found.

    Python's `re` can take longer than the universe exists, and stops every thread meanwhile: it works in a process of its own.
    """
    if pattern == re.escape(pattern):  # plain words
        return [prompt for prompt in prompts if pattern in prompt]
    try:
        search = subprocess.run(  # nosec B603 # Python itself; what users write goes in by stdin
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([pattern, prompts]).encode(),
            capture_output=True,
            timeout=SEARCH_LIMIT,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        found = json.loads(search.stdout)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"The regular expression {pattern!r} took more than {SEARCH_LIMIT:.0f} s on {len(prompts)} prompts: "
            "make it simpler, without repetitions inside of repetitions such as (a+)+."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"The regular expression {pattern!r} cannot be used ({error}): make it simpler.") from error
    if isinstance(found, str):
        raise UserError(f"The regular expression {pattern!r} cannot be read: {found}.")
    return [prompts[number] for number in found]


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those to record, and those to measure on; in an order that is drawn by what they say.

    So a file may be sorted, and lines that are added to it hardly move the others from one side to the other. Raises
    `UserError` where there are fewer than three different ones.
    """
    different = sorted({*prompts}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(different) < 3:
        raise UserError(
            f"There are {len(different)} different prompts, and at least 3 are needed, 2 to record and 1 to measure on; "
            f"{ENOUGH + MEASURED} or more are best."
        )
    measured = min(MEASURED, max(1, len(different) // 5))
    return different[:-measured], different[-measured:]


def pick(prompts: Sequence[str], index: int, seed: int | None = None) -> tuple[str, int]:
    """Prompt number `index`, counted round and round from 0, and its place in the list.

    `RANDOM` takes any of them: the same for the same `seed`, a new one each time without. Raises `UserError` for
    other numbers below 0.
    """
    if index < RANDOM:
        raise UserError(f"Prompts are counted from 0, and {RANDOM} takes one at random; found {index}.")
    number = random.Random(seed).randrange(len(prompts)) if index == RANDOM else index % len(prompts)
    return prompts[number], number
