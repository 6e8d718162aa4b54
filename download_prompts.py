"""Prompts that people really wrote, from two public collections, to record a model with.

    python download_prompts.py                                    # 10,000 of them into downloaded_prompts.txt
    python download_prompts.py --contains '"' --limit 500         # only those with a text in quotes
    flux-poke download-prompts --limit 0                          # all there are: hours

Reads the Hugging Face datasets server page by page (https://huggingface.co/docs/dataset-viewer/rows). What came so far
is beside the output as `NAME.txt.partial`, and how far it is in `NAME.txt.progress`: after an interrupt the same
command goes on from there. The output itself appears when it is complete.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder, whatever its name, is the package
    import importlib.util

    _spec = importlib.util.spec_from_file_location("flux_poke", Path(__file__).resolve().with_name("__init__.py"))
    assert _spec is not None
    sys.modules.setdefault("flux_poke", importlib.util.module_from_spec(_spec))
    __package__ = "flux_poke"

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError

from .answers import content_of
from .errors import UserError
from .files import check_text, locked, write_text
from .parsing import from_json, read_text
from .progress import Progress, silent
from .prompts import SHIPPED

SERVER = "https://datasets-server.huggingface.co"
#: Dataset: the column that holds the prompt. Both have one configuration, `default`, and a split `train`.
DATASETS = {
    "Gustavosta/Stable-Diffusion-Prompts": "Prompt",
    "isidentical/random-stable-diffusion-prompts": "prompt",
}
PAGE = 100  # the most rows that the server gives at once
LIMIT = 10_000
OUT = Path("downloaded_prompts.txt")
#: Seconds to wait for another download into the same file, which takes long.
PATIENCE = 5.0
#: Seconds to connect, and between two bytes of an answer.
TIMEOUT = (10, 30)
#: Most that an answer may hold, and may take.
MOST_BYTES, MOST_SECONDS = 64_000_000, 120.0
#: Most seconds that are waited because a server asks for it.
LONGEST_WAIT = 300.0


class Patience(Retry):
    """Retries that wait as long as a server asks for with Retry-After, and no longer than `LONGEST_WAIT`."""

    def get_retry_after(self, response: Any) -> float | None:
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, LONGEST_WAIT)


#: Waits 0, 2, 4 ... 120 s between attempts, or what the server's Retry-After asks for; gives up sooner without a network.
RETRIES = Patience(total=8, connect=3, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)


@dataclass
class Downloaded:
    """How far a download is: what was asked for, rows read and rows there are by dataset, and the size of the partial file."""

    contains: str
    rows: dict[str, int]
    totals: dict[str, int]
    size: int = 0

    def next(self) -> str | None:
        """The dataset that is furthest behind, so that a short list has prompts of all of them; None at the end."""
        unread = [name for name in self.rows if self.rows[name] < self.totals.get(name, 1)]
        return min(unread, key=self.rows.__getitem__, default=None)


class RowsServer:
    """The part of the datasets server that gives the rows of a dataset, with patience."""

    def __init__(self, url: str = SERVER, retries: Retry = RETRIES, timeout: tuple[float, float] = TIMEOUT):
        self.url, self.retries, self.timeout = url, retries, timeout
        self.session = requests.Session()
        self.session.mount(url, HTTPAdapter(max_retries=retries))

    def page(self, dataset: str, offset: int) -> tuple[list[str], int]:
        """Prompts of the rows from `offset` on ("" where a row has none), and how many rows the dataset has.

        Raises `UserError` where the server cannot be reached, refuses, or answers with something else.
        """
        try:
            query: dict[str, str | int] = {
                "dataset": dataset,
                "config": "default",
                "split": "train",
                "offset": offset,
                "length": PAGE,
            }
            response, content = self._get(query)
        except (requests.RequestException, HTTPError) as error:
            raise UserError(f"{self.url} cannot be read ({error}): run the same command again to go on.") from error
        try:
            answer = from_json(content, halves=True)
            if not response.ok:
                raise UserError(f"{self.url} refused rows of {dataset} ({response.status_code}): {answer['error']}")
            rows = [row["row"][DATASETS[dataset]] or "" for row in answer["rows"]]
            # a few prompts hold half of an emoji
            return [row.encode("utf-8", "replace").decode() for row in rows], int(answer["num_rows_total"])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{response.url} answered with status {response.status_code} and not with rows that have a column "
                f"{DATASETS[dataset]!r}: {content[:100]!r}. Run the same command later to go on."
            ) from error

    def _get(self, query: dict[str, str | int]) -> tuple[requests.Response, bytes]:
        url, retries = f"{self.url}/rows", self.retries
        while True:
            try:
                answer = self.session.get(url, params=query, timeout=self.timeout, stream=True)
                return answer, content_of(answer, MOST_BYTES, MOST_SECONDS)
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                # The adapter tries again until an answer begins; one that breaks off or stalls after that is left to us.
                cause = error.args[0]
                if not isinstance(cause, ProtocolError | ReadTimeoutError):
                    raise
                retries = retries.increment("GET", url, error=cause)
            retries.sleep()


def download_prompts(
    out: str | os.PathLike[str] = OUT,
    datasets: Sequence[str] = tuple(DATASETS),
    contains: str = "",
    limit: int = LIMIT,
    progress: Progress = silent,
    server: RowsServer | None = None,
) -> int:
    """Writes at most `limit` (0 = all) different prompts that contain a text to `out`, one per line; how many there are.

    Line breaks inside a prompt become spaces. An interrupted call goes on with the same `out`, `datasets` and `contains`.
    Raises `UserError`, with everything so far kept, where the server cannot be reached or answers with something else.
    """
    out = Path(out)
    if limit < 0:
        raise UserError(f"The limit is a number of prompts, or 0 for all; found {limit}.")
    if unknown := [name for name in datasets if name not in DATASETS]:
        raise UserError(f"No dataset {unknown[0]!r} is known here; there are {' and '.join(DATASETS)}.")
    if out.resolve() == SHIPPED.resolve():
        raise UserError(f"{out} is the list that comes with Flux Poke: choose another name with --out.")
    check_text(out, "a text file of prompts (.txt)", lambda text: out.suffix == ".txt" and "\0" not in text)
    partial, saved = (out.with_name(out.name + ending) for ending in (".partial", ".progress"))
    server = server or RowsServer()
    with locked(out, progress, PATIENCE):
        state = _resumed(saved, partial, datasets, contains)
        with open(partial, "ab+") as file:
            file.truncate(state.size)  # lines that were written after the last saved state
            file.seek(0)
            seen = dict.fromkeys(file.read().decode().splitlines())
            while (name := state.next()) and not 0 < limit <= len(seen):
                rows, length = server.page(name, state.rows[name])
                prompts = (" ".join(row.splitlines()).strip() for row in rows)
                new = dict.fromkeys(prompt for prompt in prompts if prompt and contains in prompt and prompt not in seen)
                file.write("".join(f"{prompt}\n" for prompt in new).encode())
                file.flush()
                os.fsync(file.fileno())
                seen |= new
                state.rows[name] = state.rows[name] + len(rows) if rows else length
                state.totals[name], state.size = length, file.tell()
                write_text(saved, json.dumps(asdict(state)))
                rows_read, rows_there = sum(state.rows.values()), sum(state.totals.values())
                done, total = (min(len(seen), limit), limit) if limit else (rows_read, rows_there)
                progress(f"{len(seen):,} prompts in {rows_read:,} of {rows_there:,} rows", done, total)
        chosen = list(seen)[: limit or None]
        write_text(out, "".join(f"{prompt}\n" for prompt in chosen))
        saved.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return len(chosen)


def _resumed(saved: Path, partial: Path, datasets: Sequence[str], contains: str) -> Downloaded:
    """The state in `saved`, or that of a download which has yet to begin."""
    fresh = Downloaded(contains, dict.fromkeys(datasets, 0), {})
    if not saved.exists():
        return fresh
    try:
        state = Downloaded(**from_json(read_text(saved)))
        counts = [*state.rows.values(), *state.totals.values(), state.size]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("a count is no whole number from 0 on")
        kept = partial.read_bytes()[: state.size]
        if len(kept) < state.size or not kept.decode().endswith("\n" if kept else ""):
            raise ValueError("lines are missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{saved} does not belong to {partial} ({error}): delete both to start over.") from error
    if (state.contains, list(state.rows)) != (contains, list(datasets)):
        raise UserError(
            f"{saved} belongs to a download of {' and '.join(state.rows)} with --contains {state.contains!r} that has not "
            "ended: give the same options to go on with it, delete the file to start over, or choose another output."
        )
    return state


def download_in_terminal(
    out: Path,
    datasets: Sequence[str],
    contains: str,
    limit: int,
    server: RowsServer | None = None,
    progress: Progress = lambda what, done, total: print(what, file=sys.stderr),
) -> None:
    """`download_prompts` for the terminal: at the end or an interrupt, what there is and what to do next."""
    try:
        count = download_prompts(out, datasets, contains, limit, progress, server=server)
    except KeyboardInterrupt:
        print(f"\nStopped. What came so far is in {out}.partial; the same command goes on.", file=sys.stderr)
        raise
    print(f"{count:,} prompts in {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes prompts from public collections to a text file, one per line.")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the file (default: {OUT})")
    parser.add_argument("--dataset", action="append", choices=[*DATASETS], help="only this one (default: both)")
    parser.add_argument("--contains", default="", metavar="TEXT", help="only prompts with TEXT in them, such as '\"'")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help=f"at most N; 0 = all (default: {LIMIT})")
    parser.add_argument("--server", default=SERVER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        download_in_terminal(given.out, given.dataset or [*DATASETS], given.contains, given.limit, RowsServer(given.server))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
