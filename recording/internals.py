"""`internals.safetensors`: what was recorded of every MLP of one model, added up over runs.

    internals = Internals.new(layout.family, fingerprint, recorder.results(), steps=20)
    total = add_to_file(path, internals)             # locked, atomic; other processes may do the same
    Internals.load(path).sites["double-img-0"].rate

Keys, per site S: `S` int64 [width] (fires), `S.tokens` int64 [1], `S.sum` and `S.sum_sq` float64 [width]; everything else is in
the header. Sums stand on a grid of 2^-20, so that adding them is exact, and the same in every order, as long as they
stay below 2^33.

Where a queue recorded (`queued.py`), the header also names its runs, and `S.last`, `S.last.tokens`, ... are the part of the
last one in all of it.

The original flux-poke's files hold the counts alone and no header: they are read, for what counts are enough for.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..files import check_writable, locked, write_safetensors
from ..flux.checkpoint import open_safetensors, require_format, undamaged, unreplaced
from ..flux.fingerprint import Fingerprint
from ..flux.layout import FAMILY_NAMES, Family
from ..parsing import from_json
from .manifest import at_least, record_first, require_model, utc_now
from .statistics import SiteInternals

FORMAT = "flux-poke internals 1"
GRID = 2.0**-20

_SITE = re.compile(r"(double-img|double-txt|single)-\d{1,4}")


@dataclass(frozen=True)
class LastRun:
    """What the newest run of a queue added: the run's `key`, which of its attempts it was, and the statistics by site."""

    key: str
    attempt: str
    runs: int
    steps: int
    sites: Mapping[str, SiteInternals]


@dataclass(frozen=True)
class Internals:
    """Statistics of every MLP of the model with `fingerprint`.

    `steps` counts model calls; times are UTC; `workflow` holds ComfyUI's `workflow` and `prompt` of the run that made the file.
    `padded`: whether padding of the texts may be among the words that were counted; None where the file does not say.
    In the original's files `fingerprint` is None, sums are 0, and `tokens` is how often the busiest neuron of a stream fired.
    `queued` are the keys of all runs of queues in it, `last` is the newest one's part, where it can still be taken out.
    `drawn` tells the images of the newest run from all others, where that is known.
    """

    family: Family
    fingerprint: Fingerprint | None
    sites: Mapping[str, SiteInternals]
    runs: int
    steps: int
    created: str
    updated: str
    workflow: Mapping[str, str] = field(default_factory=dict)
    padded: bool | None = None
    queued: frozenset[str] = frozenset()
    last: LastRun | None = None
    drawn: str = ""

    @classmethod
    def new(
        cls,
        family: Family,
        fingerprint: Fingerprint,
        sites: Mapping[str, SiteInternals],
        steps: int,
        runs: int = 1,
        workflow: Mapping[str, str] | None = None,
        padded: bool | None = None,
        drawn: str = "",
    ) -> Internals:
        """What was just recorded; sums are rounded to the grid."""
        now = utc_now()
        rounded = {name: replace(site, sum=_on_grid(site.sum), sum_sq=_on_grid(site.sum_sq)) for name, site in sites.items()}
        return cls(family, fingerprint, rounded, runs, steps, now, now, workflow or {}, padded, drawn=drawn)

    def merge(self, other: Internals, name: str = "the other file") -> Internals:
        """Both together; raises `UserError` (calling `other` by `name`) where they are not of one model."""
        known, new = _known(self.fingerprint, "This file"), _known(other.fingerprint, name)
        require_model(new, known, name, "what it is to be added to")
        if differ := sorted(self._widths().items() ^ other._widths().items()):
            raise UserError(
                f"{name} holds other MLPs of the model ({len(other.sites)}) than this recording ({len(self.sites)}), "
                f"first {differ[0][0]}: record the same ones, or choose another file name."
            )
        if twice := self.queued & other.queued:
            raise UserError(
                f"{name} holds {len(twice)} run{'s' if len(twice) > 1 else ''} of a queue that this recording holds too, and "
                "they would count twice: choose recordings of different servers."
            )
        first = min(self, other, key=Internals._age)
        return replace(
            first,
            sites={name: site + other.sites[name] for name, site in self.sites.items()},
            runs=self.runs + other.runs,
            steps=self.steps + other.steps,
            updated=max(self.updated, other.updated),
            padded=None if None in (self.padded, other.padded) else self.padded or other.padded,
            queued=self.queued | other.queued,
            last=None if self.last and other.last else self.last or other.last,
            drawn="",
        )

    def _widths(self) -> dict[str, int]:
        return {name: len(site.fires) for name, site in self.sites.items()}

    def _age(self) -> tuple:
        """Sorts by age; where two are of the same second, by whatever tells them apart, so that order never matters."""
        return self.created, sorted(self.workflow.items()), self.fingerprint.to_json() if self.fingerprint else ""

    def require(self, fingerprint: Fingerprint, widths: Mapping[str, int], what: str) -> None:
        """Raises `UserError` where this was recorded on another model than the one with `fingerprint`, called `what`.

        `widths` of its MLPs, by site, are compared where the model is not known.
        """
        if self.fingerprint is not None:
            return require_model(self.fingerprint, fingerprint, "What is known of the neurons", what)
        for name, width in self._widths().items():
            if widths.get(name) != width:
                raise UserError(
                    f"The counts are of another model than {what}: {name} has {width} neurons in them, "
                    f"{widths.get(name, 'none')} there. Choose the file that belongs to it, or record again."
                )

    def require_sums(self, what: str) -> None:
        """Raises `UserError` where there are counts alone, and `what` needs more."""
        if self.fingerprint is None:
            raise UserError(
                f"The counts of the original flux-poke do not tell enough for {what}: they do for the score frequency and for "
                f"thresholds on counts. {record_first('internals')}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        assert self.fingerprint is not None
        tensors: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            tensors |= {name: site.fires, f"{name}.tokens": torch.tensor([site.tokens])}
            tensors |= {f"{name}.sum": site.sum, f"{name}.sum_sq": site.sum_sq}
        counted = {key: str(getattr(self, key)) for key in ("family", "runs", "steps", "created", "updated")}
        padded = {} if self.padded is None else {"padded": str(self.padded)}
        metadata = {"format": FORMAT, "model": self.fingerprint.to_json(), **counted, **padded, **self.workflow}
        if self.drawn:
            metadata["drawn"] = self.drawn
        if self.queued:
            metadata["queued"] = json.dumps(sorted(self.queued))
        if self.last is not None:
            metadata["last"] = json.dumps([self.last.key, self.last.attempt, self.last.runs, self.last.steps])
            for name, site in self.last.sites.items():
                tensors |= {f"{name}.last": site.fires, f"{name}.last.tokens": torch.tensor([site.tokens])}
                tensors |= {f"{name}.last.sum": site.sum, f"{name}.last.sum_sq": site.sum_sq}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Internals:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        return unreplaced(path, lambda: cls._read(path))

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Internals:
        with _opened(path) as (file, metadata):
            if metadata is None:
                return _originals(file)
            sites = {name: _site(file, name) for name in sorted((key for key in file.keys() if "." not in key), key=site_order)}
            return cls(
                family=next(known for known in FAMILY_NAMES if known == metadata["family"]),
                fingerprint=Fingerprint.from_json(metadata["model"]),
                sites=sites,
                runs=at_least(0, int(metadata["runs"])),
                steps=at_least(0, int(metadata["steps"])),
                created=metadata["created"],
                updated=metadata["updated"],
                workflow={key: metadata[key] for key in ("workflow", "prompt") if key in metadata},
                padded={"True": True, "False": False}[metadata["padded"]] if "padded" in metadata else None,
                queued=frozenset(from_json(metadata.get("queued", "[]"))),
                last=_last(file, metadata, sites),
                drawn=metadata.get("drawn", ""),
            )


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[safe_open, dict[str, str] | None]]:
    """An internals file and its header, None for the original's; what is found missing or wrong while it is read makes it a
    damaged one."""
    with open_safetensors(path) as file:
        keys, header = file.keys(), file.metadata()
        original = bool(keys) and not (header or {}).get("format") and all(_SITE.fullmatch(key) for key in keys)
        metadata = None if original else require_format(header, path, FORMAT, "internals file")
        with undamaged(path, "internals file"):
            yield file, metadata


def check_file(path: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
    """Raises `UserError` where a recording of this model could not be added to the file at `path`, by its header alone."""
    if Path(path).exists():
        check_writable(path)
        require_model(unreplaced(path, lambda: _model(path)), fingerprint, path, "this one")


def _model(path: str | os.PathLike[str]) -> Fingerprint:
    with _opened(path) as (_, metadata):
        return _known(None if metadata is None else Fingerprint.from_json(metadata["model"]), str(path))


def add_to_file(path: str | os.PathLike[str], new: Internals) -> Internals:
    """Adds a recording to the file at `path`, or makes it; the total. Safe beside other processes and against kills.

    A run whose images are known (`drawn`) to be the newest there is not added again: it was killed after it had been counted
    and before the rest of it was recorded.
    """
    with locked(path):
        total = Internals.load(path) if Path(path).exists() else None
        if total and new.drawn and total.drawn == new.drawn:
            return total
        total = replace(total.merge(new, "This run"), drawn=new.drawn) if total else new
        total.save(path)
    return total


def replace_in_file(path: str | os.PathLike[str], new: Internals) -> Internals:
    """Puts a recording in the place of the one in the file at `path`, or makes it; raises `UserError` where that is of another
    model."""
    assert new.fingerprint is not None  # what was recorded knows its model
    with locked(path):
        assert new.fingerprint is not None
        check_file(Path(path), new.fingerprint)
        new.save(path)
    return new


def site_order(name: str) -> tuple[str, int, str]:
    """Sort key that brings site names into the model's order: doubles by number (img, txt), then singles."""
    kind, *stream, index = name.split("-")
    return kind, int(index), stream[0] if stream else ""


def _site(file: safe_open, name: str) -> SiteInternals:
    """Raises `ValueError` where this cannot have been recorded."""
    fires, tokens, *sums = (file.get_tensor(f"{name}{part}") for part in ("", ".tokens", ".sum", ".sum_sq"))
    site = SiteInternals(fires, int(tokens), *sums)
    kinds = [(tensor.dtype, tensor.shape) for tensor in (site.fires, site.sum, site.sum_sq)]
    width = (site.fires.numel(),)
    if kinds != [(torch.int64, width), (torch.float64, width), (torch.float64, width)]:
        raise ValueError(f"{name} holds {kinds}, expected counts in int64 and two sums in float64 of one length")
    if not (site.sum.isfinite() & site.sum_sq.isfinite() & (site.sum_sq >= 0)).all():
        raise ValueError(f"{name} holds sums that are not finite, or sums of squares below 0")
    if not ((site.fires >= 0) & (site.fires <= site.tokens)).all():
        raise ValueError(f"{name} counts more fires than its {site.tokens} tokens, or less than none")
    return site


def _last(file: safe_open, metadata: Mapping[str, str], sites: Mapping[str, SiteInternals]) -> LastRun | None:
    if "last" not in metadata:
        return None
    key, attempt, runs, steps = from_json(metadata["last"])
    parts = {name: _site(file, f"{name}.last") for name in sites}
    if any(len(part.fires) != len(sites[name].fires) for name, part in parts.items()):
        raise ValueError("the newest run's MLPs have other widths than all of them together")
    return LastRun(f"{key}", f"{attempt}", at_least(0, runs), at_least(0, steps), parts)


def _known(fingerprint: Fingerprint | None, name: str) -> Fingerprint:
    if fingerprint is None:
        raise UserError(
            f"{name} holds counts of the original flux-poke, which do not say of which model: it is read, but nothing is added "
            "to it. Choose another name for new recordings."
        )
    return fingerprint


def _originals(file: safe_open) -> Internals:
    counts = {name: file.get_tensor(name) for name in sorted(file.keys(), key=site_order)}
    most: defaultdict[str, int] = defaultdict(int)
    for name, fires in counts.items():
        if fires.ndim != 1 or fires.is_floating_point() or bool((fires < 0).any()):
            raise ValueError(f"{name} is {fires.dtype} {tuple(fires.shape)}, expected counts of at least 0")
        most[_stream(name)] = max([most[_stream(name)], *fires.tolist()])
    sites = {
        name: SiteInternals(fires.long(), most[_stream(name)], *torch.zeros(2, len(fires), dtype=torch.float64))
        for name, fires in counts.items()
    }
    return Internals("flux1", None, sites, runs=0, steps=0, created="", updated="")


def _stream(name: str) -> str:
    return name.rsplit("-", 1)[0]


def _on_grid(sums: Tensor) -> Tensor:
    return torch.round(sums / GRID) * GRID
