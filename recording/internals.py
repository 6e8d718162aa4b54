"""`internals.safetensors`: what was recorded of every MLP of one model, added up over runs.

    internals = Internals.new(layout.family, fingerprint, recorder.results(), steps=20)
    total = add_to_file(path, internals)             # locked, atomic; other processes may do the same
    Internals.load(path).sites["double-img-0"].rate

Keys, per site S: `S` int64 [width] (fires), `S.tokens` int64 [1], `S.sum` and `S.sum_sq` float64 [width]; everything else is in
the header. Sums stand on a grid of 2^-20, so that adding them is exact, and the same in every order, as long as they
stay below 2^33.

The original flux-poke's files hold the counts alone and no header: they are read, for what counts are enough for.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..files import check_writable, locked, write_safetensors
from ..flux.checkpoint import open_safetensors, require_format
from ..flux.fingerprint import Fingerprint
from ..flux.layout import FAMILY_NAMES, Family
from .manifest import record_first
from .neurons import merge
from .statistics import SiteInternals

FORMAT = "flux-poke internals 1"
GRID = 2.0**-20

_SITE = re.compile(r"(double-img|double-txt|single)-\d{1,4}")
_NOT_ADDED = "it is read, but nothing is added to it. Choose another name for new recordings."


@dataclass(frozen=True)
class Internals:
    """Statistics of every MLP of the model with `fingerprint`.

    `runs` and `steps` count sampling runs and model calls; times are UTC, as 2026-01-31T12:00:00Z. `workflow` holds
    the ComfyUI graphs (`workflow`, `prompt`) of the run that made the file.

    In the original's files the model is not known (`fingerprint` is None). They have counts alone: sums are 0, and `tokens` of
    an MLP is how often the busiest neuron of its stream fired.
    """

    family: Family
    fingerprint: Fingerprint | None
    sites: Mapping[str, SiteInternals]
    runs: int
    steps: int
    created: str
    updated: str
    workflow: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def new(
        cls,
        family: Family,
        fingerprint: Fingerprint,
        sites: Mapping[str, SiteInternals],
        steps: int,
        runs: int = 1,
        workflow: Mapping[str, str] | None = None,
    ) -> Internals:
        """What was just recorded; sums are rounded to the grid."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rounded = {name: replace(site, sum=_on_grid(site.sum), sum_sq=_on_grid(site.sum_sq)) for name, site in sites.items()}
        return cls(family, fingerprint, rounded, runs, steps, now, now, workflow or {})

    def merge(self, other: Internals, name: str = "the other file") -> Internals:
        """Both together; raises `UserError` (calling `other` by `name`) where they are not of one model."""
        if self.fingerprint is None or other.fingerprint is None:
            which = "This file" if self.fingerprint is None else name
            raise UserError(f"{which} holds counts of the original flux-poke, which do not say of which model: {_NOT_ADDED}")
        if not self.fingerprint.matches(other.fingerprint):
            raise UserError(
                f"{name} was recorded on another model: {self.fingerprint.difference(other.fingerprint)}. "
                "Recordings add up only for one model; choose another file name for this one."
            )
        if differ := sorted(self._widths().items() ^ other._widths().items()):
            raise UserError(
                f"{name} holds other MLPs of the model ({len(other.sites)}) than this recording ({len(self.sites)}), "
                f"first {differ[0][0]}: record the same ones, or choose another file name."
            )
        first = min(self, other, key=Internals._age)
        return replace(
            first,
            sites={name: merge(site, other.sites[name]) for name, site in self.sites.items()},
            runs=self.runs + other.runs,
            steps=self.steps + other.steps,
            updated=max(self.updated, other.updated),
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
        if self.fingerprint is None:
            differ = [name for name, width in self._widths().items() if widths.get(name) != width]
            if differ:
                raise UserError(
                    f"The counts are of another model than {what}: {differ[0]} has {self._widths()[differ[0]]} neurons in "
                    f"them, {widths.get(differ[0], 'none')} there. Choose the file that belongs to it, or record again."
                )
        elif not self.fingerprint.matches(fingerprint):
            raise UserError(
                f"The internals were recorded on another model than {what}: {self.fingerprint.difference(fingerprint)}. Record "
                "internals of this one, or choose the checkpoint they belong to."
            )

    def require_sums(self, what: str) -> None:
        """Raises `UserError` where there are counts alone, and `what` needs more."""
        if self.fingerprint is None:
            raise UserError(
                f"The counts of the original flux-poke do not tell enough for {what}: they do for the score frequency and for "
                f"thresholds on counts. {record_first('internals')}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file as a whole, in place of what was there."""
        assert self.fingerprint is not None
        tensors: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            tensors[name] = site.fires
            tensors[f"{name}.tokens"] = torch.tensor([site.tokens])
            tensors[f"{name}.sum"] = site.sum
            tensors[f"{name}.sum_sq"] = site.sum_sq
        metadata = {
            "format": FORMAT,
            "family": self.family,
            "model": self.fingerprint.to_json(),
            "runs": str(self.runs),
            "steps": str(self.steps),
            "created": self.created,
            "updated": self.updated,
            **self.workflow,
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Internals:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        with _opened(path) as (file, metadata):
            if metadata is None:
                return _originals(file, path)
            names = [key for key in file.keys() if "." not in key]
            family = next(known for known in FAMILY_NAMES if known == metadata["family"])
            sites = {
                name: _whole(
                    name,
                    SiteInternals(
                        fires=file.get_tensor(name),
                        tokens=int(file.get_tensor(f"{name}.tokens")),
                        sum=file.get_tensor(f"{name}.sum"),
                        sum_sq=file.get_tensor(f"{name}.sum_sq"),
                    ),
                )
                for name in sorted(names, key=site_order)
            }
            return cls(
                family=family,
                fingerprint=Fingerprint.from_json(metadata["model"]),
                sites=sites,
                runs=_count(metadata["runs"]),
                steps=_count(metadata["steps"]),
                created=metadata["created"],
                updated=metadata["updated"],
                workflow={key: metadata[key] for key in ("workflow", "prompt") if key in metadata},
            )


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[safe_open, dict[str, str] | None]]:
    """An internals file and its header, None for the original's; what is found missing or wrong while it is read makes it a
    damaged one."""
    with open_safetensors(path) as file:
        keys, header = file.keys(), file.metadata()
        original = bool(keys) and not (header or {}).get("format") and all(_SITE.fullmatch(key) for key in keys)
        metadata = None if original else require_format(header, path, FORMAT, "internals file")
        try:
            yield file, metadata
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, RuntimeError, StopIteration, SafetensorError, OverflowError) as error:
            raise UserError(f"{path} is a damaged internals file ({error}): record again or use a copy.") from error


def check_file(path: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
    """Raises `UserError` where a recording of the model with `fingerprint` could not be added to the file at `path`.

    Reads the header alone.
    """
    if Path(path).exists():
        check_writable(path)
        with _opened(path) as (_, metadata):
            if metadata is None:
                raise UserError(f"{path} holds counts of the original flux-poke, which do not say of which model: {_NOT_ADDED}")
            found = Fingerprint.from_json(metadata["model"])
        if not found.matches(fingerprint):
            raise UserError(
                f"{path} was recorded on another model than this one: {found.difference(fingerprint)}. "
                "Recordings add up only for one model; choose another file name for this one."
            )


def add_to_file(path: str | os.PathLike[str], new: Internals) -> Internals:
    """Adds a recording to the file at `path`, or makes it; the total. Safe beside other processes and against kills.

    Raises `UserError`, with the file as it was, where it is of another model, damaged or read-only.
    """
    with locked(path):
        total = Internals.load(path).merge(new, "This run") if Path(path).exists() else new
        total.save(path)
    return total


def merge_files(out: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> Internals:
    """The sum of the recordings in `files`, written to `out`, which is a new file or one of them; the total.

    Raises `UserError`, with `out` as it was, where another file stands there, or the recordings are not of one model.
    """
    out = Path(out)
    if len({Path(file).resolve() for file in files}) < len(files):
        raise UserError("A recording is named twice, and would be counted twice: name each once.")
    with locked(out):
        if out.exists() and out.resolve() not in {Path(file).resolve() for file in files}:
            raise UserError(f"{out} is there already and is none of the files to add up: choose another name, or add it too.")
        total, *others = [Internals.load(file) for file in files]
        for file, other in zip(files[1:], others, strict=True):
            total = total.merge(other, str(file))
        total.save(out)
    return total


def site_order(name: str) -> tuple[str, int, str]:
    """Sort key that brings site names into the model's order: doubles by number (img, txt), then singles."""
    kind, *stream, index = name.split("-")
    return kind, int(index), stream[0] if stream else ""


def _whole(name: str, site: SiteInternals) -> SiteInternals:
    """`site`, or a `ValueError` where it cannot have been recorded."""
    kinds = [(tensor.dtype, tensor.shape) for tensor in (site.fires, site.sum, site.sum_sq)]
    width = (site.fires.numel(),)
    if kinds != [(torch.int64, width), (torch.float64, width), (torch.float64, width)]:
        raise ValueError(f"{name} holds {kinds}, expected counts in int64 and two sums in float64 of one length")
    if not (site.sum.isfinite() & site.sum_sq.isfinite() & (site.sum_sq >= 0)).all():
        raise ValueError(f"{name} holds sums that are not finite, or sums of squares below 0")
    if not ((site.fires >= 0) & (site.fires <= site.tokens)).all():
        raise ValueError(f"{name} counts more fires than its {site.tokens} tokens, or less than none")
    return site


def _originals(file: safe_open, path: str | os.PathLike[str]) -> Internals:
    """The counts in a file of the original flux-poke."""
    counts = {name: file.get_tensor(name) for name in sorted(file.keys(), key=site_order)}
    for name, fires in counts.items():
        if fires.ndim != 1 or fires.is_floating_point() or bool((fires < 0).any()):
            raise ValueError(f"{name} is {fires.dtype} {tuple(fires.shape)}, expected counts of at least 0")
    most: dict[str, int] = {}
    for name, fires in counts.items():
        stream = name.rsplit("-", 1)[0]
        most[stream] = max(most.get(stream, 0), int(fires.max()) if len(fires) else 0)
    nothing = {name: torch.zeros(len(fires), dtype=torch.float64) for name, fires in counts.items()}
    sites = {
        name: SiteInternals(fires.long(), most[name.rsplit("-", 1)[0]], nothing[name], nothing[name].clone())
        for name, fires in counts.items()
    }
    return Internals("flux1", None, sites, runs=0, steps=0, created="", updated="")


def _count(text: str) -> int:
    """A number of at least 0; raises `ValueError` for others."""
    if int(text) < 0:
        raise ValueError(f"{text} where a number of at least 0 is expected")
    return int(text)


def _on_grid(sums: Tensor) -> Tensor:
    return torch.round(sums / GRID) * GRID
