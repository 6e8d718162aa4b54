"""The parts that a recording on a cluster is put together from, in a folder that all machines reach.

    part = publish(shared, recording, [piece])       # by a worker: what it recorded of one piece
    part = merge(shared, parts)                      # several become one
    finish(shared, parts)                            # all of them become the recording

A part is its internals and its manifest in `.parts/ID/`, and `.parts/ID.json`, written last, which says what is in it: what
has no such file is not there. Shards stand in `hidden_states/` of the recording from the beginning, numbered by their piece, so
that none is copied again. Whatever is attempted twice, and however parts were merged before a kill, every piece counts once: of
parts that hold the same one, a single one is taken (`chosen`), and adding up refuses a piece that is there already
(`Internals.queued`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from ..flux.checkpoint import open_safetensors
from ..parsing import from_json
from ..recording.internals import Internals
from ..recording.manifest import MANIFEST, Manifest, Shard
from ..recording.recording import INTERNALS, STATES, Recording
from .shared import Shared

FORMAT, PARTS = "flux-poke part 1", ".parts"
#: Numbers that the shards of one piece may take, and bytes that rows of one file may.
SHARDS, FILE = 1000, 1_000_000_000


@dataclass(frozen=True)
class Part:
    """What a part holds: the keys of its pieces, and whether there is a manifest beside the internals."""

    id: str
    pieces: tuple[str, ...]
    states: bool

    @property
    def folder(self) -> str:
        return f"{PARTS}/{self.id}"

    @classmethod
    def read(cls, shared: Shared, name: str) -> Part:
        """Raises `UserError` where the file is damaged."""
        text = shared.read(name)
        try:
            found = from_json(text)
            if found["format"] != FORMAT:
                raise ValueError(f"expected '{FORMAT}', found '{found['format']}'")
            return cls(f"{found['id']}", tuple(map(str, found["pieces"])), bool(found["states"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{shared}/{name} is damaged ({error}): remove it, and its piece is recorded again.") from error

    def internals(self, shared: Shared, folder: Path) -> Internals:
        return Internals.load(shared.fetch(f"{self.folder}/{INTERNALS}", folder / f"{self.id}.safetensors"))

    def manifest(self, shared: Shared, folder: Path) -> Manifest:
        return Manifest.load(shared.fetch(f"{self.folder}/{MANIFEST}", folder / self.id / MANIFEST).parent)


def publish(shared: Shared, recording: Recording, key: str, number: int, first: int) -> Part:
    """Brings what was recorded of piece `number`, called `key`, to the shared folder; its images are number `first` and on.

    Where the recording counts them from another number, they take theirs here. Raises `UserError` where nothing was counted.
    """
    internals = replace(recording.internals(), queued=frozenset({key}), last=None, drawn="")
    manifest = recording.states().manifest if recording.kinds - {"internals"} else None
    if manifest is not None:
        by = first - min((drawing.first for drawing in manifest.drawings), default=first)
        shards = []
        for place, some in enumerate(_together_in_files(manifest.shards)):
            if place == SHARDS:
                raise UserError(f"Images drawn at once left more than {SHARDS:,} files: record fewer at once.")
            file = recording.states_folder / some[0].file
            if by or len(some) > 1:
                _write_together([recording.states_folder / shard.file for shard in some], by)
            name = f"{some[0].kind}-{number * SHARDS + place:05d}.safetensors"
            shared.put(file, f"{STATES}/{name}")
            shards.append(_one(name, some, by))
        drawings = tuple(drawing._replace(first=drawing.first + by) for drawing in manifest.drawings)
        manifest = replace(manifest, images=manifest.images + by, drawings=drawings, shards=tuple(shards))
    return _written(shared, uuid.uuid4().hex, [key], internals, manifest)


def merge(shared: Shared, parts: Sequence[Part]) -> Part:
    """One part that holds what these hold, which are gone then. A kill in the middle of it loses nothing: it is done again."""
    id = hashlib.sha256(json.dumps(sorted(part.id for part in parts)).encode()).hexdigest()[:32]
    if shared.exists(f"{PARTS}/{id}.json"):
        merged = Part.read(shared, f"{PARTS}/{id}.json")
    else:
        with _folder() as folder:
            merged = _written(shared, id, [key for part in parts for key in part.pieces], *_together(shared, parts, folder))
    _remove(shared, parts)
    return merged


def finish(shared: Shared, parts: Sequence[Part]) -> None:
    """Adds `parts` to the recording, which is made where there is none, and removes them.

    A kill in the middle of it loses nothing and counts nothing twice: it is done again.
    """
    with _folder() as folder:
        earlier = _recorded(shared, folder)
        known = earlier.queued if earlier else frozenset[str]()
        new = [part for part in parts if not known & {*part.pieces}]
        if new:
            internals, manifest = _together(shared, new, folder)
            if manifest is not None:
                if shared.exists(f"{STATES}/{MANIFEST}"):
                    there = Manifest.load(shared.fetch(f"{STATES}/{MANIFEST}", folder / "earlier" / MANIFEST).parent)
                    manifest = Manifest.joined([manifest, _without(there, manifest)])
                manifest.save(folder)
                shared.put(folder / MANIFEST, f"{STATES}/{MANIFEST}")
            if earlier is not None:
                internals = earlier.merge(internals)
            internals.save(folder / INTERNALS)
            shared.put(folder / INTERNALS, INTERNALS)  # last: from now on these pieces are there
    _remove(shared, parts)


class Joiner:
    """Puts parts together, in a process of its own."""

    def __init__(self, url: str):
        self.shared = Shared(url)

    def merge(self, parts: Sequence[Part]) -> Part:
        return merge(self.shared, parts)

    def finish(self, parts: Sequence[Part]) -> None:
        finish(self.shared, parts)


def find_parts(shared: Shared) -> tuple[frozenset[str], list[Part]]:
    """Keys of the pieces that are in the recording, and the parts that are to be added to it; others are removed."""
    with _folder() as folder:
        recorded = _recorded(shared, folder)
    known = recorded.queued if recorded else frozenset[str]()
    found = [Part.read(shared, name) for name in shared.names(PARTS, ".json")]
    taken = chosen(found, known)
    _remove(shared, [part for part in found if part not in taken])
    return known, taken


def _recorded(shared: Shared, folder: Path) -> Internals | None:
    """The recording's internals as they are by now, fetched to `folder`."""
    if not shared.exists(INTERNALS):
        return None
    return Internals.load(shared.fetch(INTERNALS, folder / "earlier" / INTERNALS))


def chosen(parts: Iterable[Part], known: Iterable[str] = ()) -> list[Part]:
    """The parts that count: of those that hold the same piece one, the largest, and none that holds one of `known`."""
    taken, keys = [], {*known}
    for part in sorted(parts, key=lambda part: (-len(part.pieces), part.id)):
        if not keys & {*part.pieces}:
            taken.append(part)
            keys |= {*part.pieces}
    return taken


def _together(shared: Shared, parts: Sequence[Part], folder: Path) -> tuple[Internals, Manifest | None]:
    """What `parts` hold; one of them after the other is in memory."""
    internals = reduce(Internals.merge, (part.internals(shared, folder) for part in parts))
    manifests = [part.manifest(shared, folder) for part in parts if part.states]
    return internals, Manifest.joined(manifests) if manifests else None


def _without(earlier: Manifest, new: Manifest) -> Manifest:
    """What `earlier` holds and `new` does not."""
    images, files = {drawing.first for drawing in new.drawings}, {shard.file for shard in new.shards}
    return replace(
        earlier,
        drawings=tuple(drawing for drawing in earlier.drawings if drawing.first not in images),
        shards=tuple(shard for shard in earlier.shards if shard.file not in files),
        amplification={} if new.amplification else earlier.amplification,
    )


def _written(shared: Shared, id: str, keys: Sequence[str], internals: Internals, manifest: Manifest | None) -> Part:
    part = Part(id, tuple(keys), manifest is not None)
    with _folder() as folder:
        internals.save(folder / INTERNALS)
        shared.put(folder / INTERNALS, f"{part.folder}/{INTERNALS}")
        if manifest is not None:
            manifest.save(folder)
            shared.put(folder / MANIFEST, f"{part.folder}/{MANIFEST}")
    shared.write(f"{part.folder}.json", json.dumps({"format": FORMAT, **asdict(part)}))
    return part


def _remove(shared: Shared, parts: Iterable[Part]) -> None:
    for part in parts:
        shared.remove(f"{part.folder}.json")
        shared.remove(part.folder)


def _together_in_files(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Shards that become one file each: rows that follow each other, up to `FILE` bytes of them."""
    found: list[list[Shard]] = []
    for shard in shards:
        last = found[-1] if found else []
        fits = sum(other.bytes for other in last) + shard.bytes <= FILE
        if last and fits and shard.kind == last[0].kind == "rows" and shard.halvings == last[0].halvings:
            last.append(shard)
        else:
            found.append([shard])
    return found


def _one(name: str, shards: Sequence[Shard], by: int) -> Shard:
    """What the manifest says of several shards that became one, whose images are `by` numbers further."""
    rows: Counter[str] = Counter()
    for shard in shards:
        rows.update(shard.rows)
    captures = tuple(replace(capture, image=capture.image + by) for shard in shards for capture in shard.captures)
    return replace(shards[0], file=name, bytes=sum(shard.bytes for shard in shards), rows=dict(rows), captures=captures)


def _write_together(files: Sequence[Path], by: int) -> None:
    """Writes what is in all `files` to the first one, with `by` added to the numbers of images."""
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for file in files:
        with open_safetensors(file) as opened:
            header = opened.metadata()
            for key in opened.keys():
                tensor = opened.get_tensor(key)
                parts[key].append(tensor + by if key.rpartition(".")[2] == "image" else tensor)
    write_safetensors(files[0], {key: torch.cat(some) for key, some in parts.items()}, header)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="flux_poke_parts_") as folder:
        yield Path(folder)
