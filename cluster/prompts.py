"""Prompts for a cluster: a text file, or a column of a dataset of Hugging Face's, read as it streams.

prompts_from("prompts.txt")
prompts_from("hf:org/name#caption", count=10_000)    # or hf:FOLDER#caption, with its files in it; #caption:test for a split
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..errors import UserError
from ..prompts import read_prompts

DATASET = "hf:"
#: As many as are read where no number is given: a dataset may have hundreds of millions.
MOST = 100_000


def prompts_from(source: str, count: int | None = None) -> list[str]:
    """The first `count` prompts of a file or a dataset, one line each; raises `UserError` where there are none."""
    if not source.startswith(DATASET):
        return read_prompts(source)[:count]
    found = [*islice(_texts(source), MOST if count is None else count)]
    if not found:
        raise UserError(f"{source} holds no prompts: expected texts in that column.")
    return found


def _texts(source: str) -> Iterator[str]:
    name, _, place = source.removeprefix(DATASET).partition("#")
    column, _, split = place.partition(":")
    if not name or not column:
        raise UserError(f"{source}: expected {DATASET}DATASET#COLUMN, such as {DATASET}org/name#caption.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("Prompts from datasets need the package datasets: pip install 'flux-poke[datasets]'.") from error
    try:
        rows = load_dataset(name, split=split or "train", streaming=True)  # nosec B615 # texts, of which none is run
        for row in rows:
            if column not in row:
                raise UserError(f"{source} has no column {column}: it has {', '.join(sorted(row))}.")
            if text := " ".join(f"{row[column] or ''}".split()):
                yield text
    except UserError:
        raise
    except Exception as error:  # of whatever its files are read with
        raise UserError(f"{source} cannot be read ({error!r:.300}): look at its name, or give a text file.") from error
