"""What a run left on its server, brought here: pictures, films, generations, and the recordings that it added to.

files = bring_outputs(client.fetch, result, Path("out"), "0007")      # ["0007_flux_poke_00001_.png", ...]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from ..files import replacing
from .client import Result

Fetch = Callable[[Mapping[str, str]], bytes]


def bring_outputs(fetch: Fetch, result: Result, out: Path, prefix: str) -> list[str]:
    """Writes what a run saved to `out` (its previews, where it saved nothing); names there, which begin with `prefix`.

    Raises `UserError` where the server names a file outside of its folders.
    """
    named: dict[str, dict[str, str]] = {}
    for where, file in _saved(result):
        name = f"{prefix}_{where}"
        number = 1
        while named.get(name, file) != file:
            number += 1
            name = f"{prefix}_{number}_{where}"
        named[name] = file
    for name, file in named.items():
        path = out / name
        if out.resolve() not in path.resolve().parents:
            raise UserError(f"The server names a file outside of its folder: {file['filename']}.")
        content = fetch(file)
        with replacing(path) as new:
            new.write_bytes(content)
    return [*named]


def _saved(result: Result) -> Iterator[tuple[str, dict[str, str]]]:
    """Name here and reference of each file, once: those that were saved, or the previews where there are no others."""
    entries = [
        entry for output in result.outputs.values() for kind in output.values() if isinstance(kind, list) for entry in kind
    ]
    entries = [entry for entry in entries if isinstance(entry, dict)]
    generations = [entry for entry in entries if "generation_id" in entry]
    folders = {entry["subfolder"] for entry in generations}
    for entry in generations:  # of Decode Block Previews
        for name in entry["files"]:
            there = PurePosixPath(entry["subfolder"], name)
            yield f"{entry['generation_id']}/{name}", _reference(there.name, there.parent.as_posix(), "output")
    files = [entry for entry in entries if "filename" in entry and entry.get("subfolder", "") not in folders]
    saved = [entry for entry in files if entry.get("type", "output") == "output"]
    for entry in saved or ([] if generations else files):
        name = PurePosixPath(entry["filename"].replace("\\", "/")).name
        yield name, _reference(entry["filename"], entry.get("subfolder", ""), entry.get("type", "output"))


def _reference(filename: Any, subfolder: Any, kind: Any) -> dict[str, str]:
    return {"filename": f"{filename}", "subfolder": f"{subfolder}", "type": f"{kind}"}
