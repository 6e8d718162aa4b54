"""What a run left on its server, brought here: pictures, films, generations, and the recordings that it added to.

files = bring_outputs(client.fetch, result, Path("out"), "0007")      # ["0007_flux_poke_00001_.png", ...]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from ..files import replacing
from .client import Result

Fetch = Callable[[Mapping[str, str]], bytes]

#: What the nodes call a generation's folder.
GENERATION_ID = re.compile(r"[0-9a-f]{8}")


def bring_outputs(fetch: Fetch, result: Result, out: Path, prefix: str) -> list[str]:
    """Writes what a run saved to `out` (its previews, where it saved nothing); names there, which begin with `prefix`.

    Raises `UserError`, before anything is fetched, where the server names a file outside of its folders, or what is no name.
    """
    named: dict[str, dict[str, str]] = {}
    for where, file in _saved(result):
        name = f"{prefix}_{where}"
        number = 1
        while named.get(name, file) != file:
            number += 1
            name = f"{prefix}_{number}_{where}"
        if out.resolve() not in (out / name).resolve().parents:
            raise UserError(f"The server names a file outside of its folder: {file['filename']}.")
        named[name] = file
    for name, file in named.items():
        content = fetch(file)
        with replacing(out / name) as new:
            new.write_bytes(content)
    return [*named]


def generation_files(told: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, str]]]:
    """A generation's id, and references to its files by their names in its folder ("decoded/a.jpg"), as its server told of it.

    Raises `UserError` where the id is none, or a name leads out of that folder or is none.
    """
    generation_id, subfolder, names = f"{told.get('generation_id')}", told.get("subfolder"), told.get("files")
    if not GENERATION_ID.fullmatch(generation_id):
        raise UserError(f"The server calls a generation {generation_id!r}: expected 8 hexadecimal digits.")
    if not isinstance(subfolder, str) or not isinstance(names, list | tuple):
        raise UserError(
            f"The server does not say which files the generation {generation_id} has: update this pack in its custom_nodes."
        )
    files = {}
    for name in names:
        if not all(_is_name(part) and ":" not in part for part in f"{name}".split("/")):
            raise UserError(f"The server names a file outside of its generation's folder: {name!r}.")
        where = PurePosixPath(subfolder, f"{name}")
        files[f"{name}"] = _reference(where.name, where.parent.as_posix(), "output")
    return generation_id, files


def _saved(result: Result) -> Iterator[tuple[str, dict[str, str]]]:
    """Name here and reference of each file, once: those that were saved, or the previews where there are no others."""
    entries = result.files()
    generations = [entry for entry in entries if "generation_id" in entry]
    for entry in generations:  # of Decode Block Previews
        generation_id, references = generation_files(entry)
        for name, reference in references.items():
            yield f"{generation_id}/{name}", reference
    folders = [entry["subfolder"] for entry in generations]
    pictures = [entry for entry in entries if "filename" in entry and entry.get("subfolder", "") not in folders]
    saved = [entry for entry in pictures if entry.get("type", "output") == "output"]
    for entry in saved or ([] if generations else pictures):
        name = PurePosixPath(f"{entry['filename']}".replace("\\", "/")).name
        if not _is_name(name):
            raise UserError(f"The server calls a file {entry['filename']!r}, which is no name.")
        yield name, _reference(entry["filename"], entry.get("subfolder", ""), entry.get("type", "output"))


def _is_name(part: str) -> bool:
    """Whether a file or a folder can be called so."""
    return part not in ("", ".", "..") and "\\" not in part and part.isprintable()


def _reference(filename: Any, subfolder: Any, kind: Any) -> dict[str, str]:
    return {"filename": f"{filename}", "subfolder": f"{subfolder}", "type": f"{kind}"}
