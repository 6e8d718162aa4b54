"""`manifest.json` of a `hidden_states/` folder: whose samples are in it, in which files, of which images.

    manifest = Manifest.load(folder)
    manifest.shards, manifest.drawings, manifest.amplification
    manifest.digest("rows", "amplification")         # another one whenever something of these kinds is recorded

What the manifest does not name is not there. Every shard has an id that was drawn when it was written: two recordings of equal
shape are never taken for each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from ..errors import UserError
from ..files import write_text
from ..flux.fingerprint import Fingerprint
from ..parsing import from_json, read_text

FORMAT = "flux-poke hidden states 2"
MANIFEST = "manifest.json"

Kind = Literal["rows", "lens", "blocks", "trajectories"]
Number = TypeVar("Number", int, float)
#: Of one site, by sigma: the sum of what was measured, and how often it was.
Levels = Mapping[float, tuple[float, int]]

#: What a recording may lack, and the node that records it, where these are not its own name and Record.
_WORDS = {"lens": "lens rows", "blocks": "block states"}
_NODES = {"lens": "Record Lens Rows", "blocks": "Record Block States", "trajectories": "Record Trajectories"}


def record_first(kind: str) -> str:
    """How to get what is missing, in a sentence."""
    return f"Record it first ({_NODES.get(kind, 'Record')}, or `uv run flux-poke record --what {kind}`)."


def nothing_recorded(folder: Path, kind: str) -> UserError:
    return UserError(f"{folder} holds no {_WORDS.get(kind, kind)}. {record_first(kind)}")


def require_model(found: Fingerprint, expected: Fingerprint, source: object, what: str) -> None:
    """Raises `UserError` where `source`, recorded on the model of `found`, is not of `what`, the model of `expected`."""
    if not found.matches(expected):
        raise UserError(
            f"{source} was recorded on another model than {what}: {found.difference(expected)}. "
            "Choose the recording that belongs to it, or a new name to record to."
        )


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def at_least(least: int, number: Number) -> Number:
    """`number`; raises `ValueError` where it is below `least` or not finite."""
    if not least <= number < math.inf:
        raise ValueError(f"{number} where a number of at least {least} is expected")
    return number


@dataclass(frozen=True)
class Limit:
    """How much one kind of shard may take on disk (1 GB = 10^9 bytes), and what to do when the next does not fit.

    "thin" halves every image's share, as often as needed, but leaves every site as many rows as `least` says; "stop" leaves
    what is there and takes no more.
    """

    gigabytes: float
    when_full: Literal["thin", "stop"] = "thin"
    least: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.gigabytes < 1e9:
            raise UserError(f"A limit is a number of gigabytes above 0 (1 GB = 10^9 bytes); found {self.gigabytes}.")

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * 1e9)


@dataclass(frozen=True)
class Capture:
    """One row of a recorded model call: its image's number, the step and its sigma, and how the image was asked for."""

    image: int
    step: int
    sigma: float
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Shard:
    """One file: its kind, size, rows by site, and how often its rows were halved; of a recorded model call, its captures.

    `id` was drawn when it was written, and is another one once its rows were halved.
    """

    file: str
    kind: Kind
    bytes: int
    rows: Mapping[str, int] = field(default_factory=dict)
    halvings: int = 0
    captures: tuple[Capture, ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def number(self) -> int:
        return int(self.file.removeprefix(f"{self.kind}-").removesuffix(".safetensors"))

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Shard:
        """Raises `KeyError`, `TypeError` or `ValueError` where `found` is not a shard."""
        if found["kind"] not in get_args(Kind) or not re.fullmatch(rf"{found['kind']}-\d{{5,}}\.safetensors", found["file"]):
            raise ValueError(f"{found['file']} of kind {found['kind']} is not a shard")
        captures = tuple(Capture(**capture) for capture in found["captures"])
        return cls(**{**found, "captures": captures, "id": bytes.fromhex(found["id"]).hex()})


class Drawing(NamedTuple):
    """Images of one sampling run: the number of the first one, how many there are, a digest of what tells them from others, and
    how often they were recorded whole, by kind."""

    first: int
    images: int
    name: str
    times: Mapping[str, int]

    def key(self, kind: Kind) -> str:
        """What the steps and tokens of a kind are drawn by: others each time."""
        times = self.times.get(kind, 0)
        return f"{self.first} {times}" if times else f"{self.first}"

    def again(self, kind: Kind) -> Drawing:
        return self._replace(times={**self.times, kind: self.times.get(kind, 0) + 1})


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. `images` is the next image's number; `halvings` is what new rows start at.

    The images of a drawing keep their numbers, whatever is recorded of them, so that none is on both sides of a split.
    `amplification` is, by site and sigma, [sum of measurements, their number] (see `amplification.py`).
    """

    family: str
    fingerprint: Fingerprint
    images: int = 0
    drawings: tuple[Drawing, ...] = ()
    halvings: int = 0
    shards: tuple[Shard, ...] = ()
    amplification: Mapping[str, Levels] = field(default_factory=dict)
    created: str = field(default_factory=utc_now)
    updated: str = field(default_factory=utc_now)

    @classmethod
    def joined(cls, parts: Sequence[Manifest]) -> Manifest:
        """All parts of one recording together, in the order of their images: shards and images keep their numbers.

        Raises `UserError` where they are of different models, or two of them hold the same image or the same shard.
        """
        first, *others = parts
        for other in others:
            require_model(other.fingerprint, first.fingerprint, "A part of the recording", "the first one")
        drawings = sorted((drawing for part in parts for drawing in part.drawings), key=lambda drawing: drawing.first)
        shards = sorted((shard for part in parts for shard in part.shards), key=lambda shard: shard.number)
        files, halvings = {shard.file for shard in shards}, {part.halvings for part in parts}
        overlap = any(one.first + one.images > after.first for one, after in pairwise(drawings))
        if overlap or len(files) < len(shards) or len(halvings) > 1:
            raise UserError("Two parts of the recording hold the same images, or were thinned differently: record again.")
        return cls(
            family=first.family,
            fingerprint=first.fingerprint,
            images=max(part.images for part in parts),
            drawings=tuple(drawings),
            halvings=halvings.pop(),
            shards=tuple(shards),
            amplification=reduce(add_levels, (part.amplification for part in parts)),
            created=min(part.created for part in parts),
        )

    def digest(self, *kinds: str) -> str:
        """Hexadecimal; another one whenever something of these kinds is recorded or thinned; "amplification" is one."""
        shards = [shard.id for shard in self.shards if shard.kind in kinds]
        measured = [self.amplification] if "amplification" in kinds else []
        text = json.dumps([self.fingerprint.values, shards, measured], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        content = asdict(self)
        model = content.pop("fingerprint")
        write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "model": model, **content, "updated": utc_now()}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises `UserError` where `folder` holds no hidden states, or its manifest is damaged."""
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} holds no hidden states: expected a {MANIFEST} in it. {record_first('rows')}")
        try:
            found = from_json(read_text(path))
            if found.get("format") != FORMAT:
                raise UserError(
                    f"{path} is another format: expected '{FORMAT}', found '{found.get('format')}'. Record again elsewhere."
                )
            return cls(
                family=found["family"],
                fingerprint=Fingerprint.from_json(json.dumps(found["model"])),
                images=int(found["images"]),
                drawings=tuple(Drawing(int(first), int(n), name, dict(times)) for first, n, name, times in found["drawings"]),
                halvings=int(found["halvings"]),
                shards=tuple(Shard.from_json(shard) for shard in found["shards"]),
                amplification={
                    name: {_level(sigma): (_level(value), at_least(1, int(count))) for sigma, (value, count) in levels.items()}
                    for name, levels in found["amplification"].items()
                },
                created=found["created"],
                updated=found["updated"],
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it or record into another folder.") from error


def add_levels(total: Mapping[str, Levels], measured: Mapping[str, Levels]) -> Mapping[str, Levels]:
    """Amplifications, by site and sigma (their sum, their number), of both together."""
    together = {name: dict(levels) for name, levels in total.items()}
    for name, levels in measured.items():
        known = together.setdefault(name, {})
        for sigma, (value, count) in levels.items():
            before, times = known.get(sigma, (0.0, 0))
            known[sigma] = (before + value, times + count)
    return together


def _level(number: Any) -> float:
    return at_least(0, float(number))
