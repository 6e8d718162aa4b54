"""`hidden_states/`: a folder with sampled activations of one model, in shards beside a manifest.

    store = HiddenStates.for_model(folder, family, fingerprint)      # made, or gone on with where it is of this model
    drawing = store.index(call.drawn, images=4)                      # numbers for the four images of a run
    store.append("rows", tensors, Limit(gigabytes=20))               # one shard, whole or not at all

    store = HiddenStates.open(folder)
    for rows in store.rows("single-7"):                              # in pieces, each read when it is asked for
        rows.x, rows.attn, rows.image

A shard is `{kind}-00017.safetensors`. Kind `rows` holds, per site S, `S.x` [n, hidden] (the MLP's input), in single blocks
`S.attn` [n, hidden] (the attention half of linear2's input), `S.sigma`, `S.image` and `S.step` [n]. Kinds `blocks` and
`trajectories` are whole model calls, one a shard (`states.py`), kind `lens` tokens after every block (`lens_rows.py`). What is
where, and whose, is in the manifest (`manifest.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import locked, write_safetensors
from ..flux.checkpoint import open_safetensors
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Site
from .manifest import (
    FORMAT,
    MANIFEST,
    Capture,
    Drawing,
    Kind,
    Levels,
    Limit,
    Manifest,
    Shard,
    add_levels,
    nothing_recorded,
    require_model,
)  # fmt: skip
from .shards import ShardFile, halve, parts_at

__all__ = ["MANIFEST", "HiddenStates", "Limit", "Manifest", "Rows"]


@dataclass(frozen=True)
class Rows:
    """Token rows of one site: x [n, hidden], attn [n, hidden] (single blocks), sigma float32, image and step int64 [n]."""

    x: Tensor
    attn: Tensor | None
    sigma: Tensor
    image: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, chosen: Tensor | slice) -> Rows:
        return Rows(**parts_at(self, chosen))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        joined: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            joined[name] = None if first is None else torch.cat([vars(part)[name] for part in parts])
        return cls(**joined)


class HiddenStates:
    """A folder of shards; `manifest` is what was in it when it was last looked at."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> HiddenStates:
        """The hidden states in `folder`; raises `UserError` where there are none."""
        return cls(Path(folder), Manifest.load(Path(folder)))

    @classmethod
    def for_model(cls, folder: str | os.PathLike[str], family: str, fingerprint: Fingerprint, first: int = 0) -> HiddenStates:
        """`folder` to add to; it is made where it is not there, with `first` as the number of its first image. Raises
        `UserError` where it holds another model's."""
        folder = Path(folder)
        with locked(folder / MANIFEST):
            if (folder / MANIFEST).exists():
                store = cls.open(folder)
                store.require(fingerprint, "this model")
                return store
            store = cls(folder, Manifest(family, fingerprint, images=first))
            store.manifest.save(folder)
            return store

    def require(self, fingerprint: Fingerprint, what: str) -> None:
        """Raises `UserError` where the folder is not of the model with `fingerprint`, called `what`."""
        require_model(self.manifest.fingerprint, fingerprint, self.folder, what)

    def index(self, name: str, images: int) -> Drawing:
        """Numbers for the `images` images of a sampling run; `name` tells them from others (`Call.drawn`)."""
        with self._changing():
            for known in self.manifest.drawings:
                if (known.name, known.images) == (name, images):
                    return known
            new = Drawing(self.manifest.images, images, name, {})
            self.manifest = replace(self.manifest, images=new.first + images, drawings=(*self.manifest.drawings, new))
        return new

    def image_count(self, kind: Kind | None = None) -> int:
        """How many different images were recorded whole, of one kind or of any."""
        return sum(drawing.images for drawing in self.manifest.drawings if (kind in drawing.times if kind else drawing.times))

    def append(
        self, kind: Kind, tensors: Mapping[str, Tensor], limit: Limit | None = None, halvings: int = 0,
        captures: Sequence[Capture] = (), whole: Drawing | None = None,
    ) -> bool:  # fmt: skip
        """Adds one shard, of rows halved `halvings` times or of a call's `captures`; False where `limit` leaves no room.

        With it, `kind` of the images `whole` is noted as recorded whole, once more: a kill leaves both or neither.
        """
        with self._changing():
            while kind == "rows" and halvings < self.manifest.halvings:
                tensors, halvings = halve(tensors), halvings + 1
            while limit is not None and self.bytes(kind) + _bytes(tensors) > limit.bytes:
                if kind != "rows" or limit.when_full == "stop" or not self._may_halve(tensors, limit.least):
                    return False
                self._halve()
                tensors, halvings = halve(tensors), halvings + 1
            if any(len(tensor) for tensor in tensors.values()):
                number = max((shard.number for shard in self.manifest.shards), default=-1) + 1
                name = f"{kind}-{number:05d}.safetensors"
                shard = self._write_shard(Shard(name, kind, 0, {}, halvings, tuple(captures)), tensors)
                self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
            if whole is not None:
                drawings = (known.again(kind) if known.first == whole.first else known for known in self.manifest.drawings)
                self.manifest = replace(self.manifest, drawings=tuple(drawings))
        return True

    def add_amplification(self, measured: Mapping[str, Levels]) -> None:
        """Adds measurements, by site and sigma (their sum, their number)."""
        with self._changing():
            self.manifest = replace(self.manifest, amplification=add_levels(self.manifest.amplification, measured))

    @property
    def amplification(self) -> dict[str, float]:
        """Mean amplification by site, of those where it was measured: over the noise levels of all sites together, so that
        sites whose runs had other levels compare. The lowest level, which stands for the last step alone, counts half."""
        sigma, weights = self.probed()
        measured = self.manifest.amplification
        return {name: float(np.average(_at(levels, sigma), weights=weights)) for name, levels in measured.items() if levels}

    def probed(self) -> tuple[np.ndarray, np.ndarray]:
        """The noise levels at which amplification was measured, ascending [n], and how much each counts [n]."""
        sigma = np.array(sorted({level for levels in self.manifest.amplification.values() for level in levels}))
        return sigma, np.where(np.arange(len(sigma)) == 0, 0.5, 1.0)

    def amplification_at(self, site: str, sigma: np.ndarray) -> np.ndarray:
        """Amplification of a site that was measured, at noise levels [n]."""
        return _at(self.manifest.amplification[site], sigma)

    def importance(self, site: str, sigma: Tensor) -> Tensor:
        """How much an error at a site counts at these noise levels [n]: its amplification there, relative to its mean;
        1 where it was not measured, or is 0 throughout. The last step counts as the one measured before it, since its few rows
        would outweigh all others."""
        mean = self.amplification.get(site, 0.0)
        if not mean > 0:
            return torch.ones_like(sigma)
        measured = self.manifest.amplification[site]
        levels = {level: measured[level] for level in sorted(measured)[1:]} or measured
        return torch.from_numpy(_at(levels, sigma.numpy()) / mean).to(sigma)

    def digest(self, *kinds: str) -> str:
        """Hexadecimal; another one whenever something of these kinds, or "amplification", is recorded or thinned."""
        return self.manifest.digest(*kinds)

    def bytes(self, kind: Kind) -> int:
        return sum(shard.bytes for shard in self.manifest.shards if shard.kind == kind)

    def count(self, site: str) -> int:
        return sum(shard.rows.get(site, 0) for shard in self.manifest.shards)

    def files(self, kind: Kind) -> list[ShardFile]:
        """The shards of `kind`; raises `UserError` where there are none."""
        shards = [shard for shard in self.manifest.shards if shard.kind == kind]
        if not shards:
            raise nothing_recorded(self.folder, kind)
        images = [torch.tensor([capture.image for capture in shard.captures], dtype=torch.int64) for shard in shards]
        return [ShardFile(self.folder / shard.file, of) for shard, of in zip(shards, images, strict=True)]

    def scarcest(self, sites: Sequence[Site]) -> Site:
        """The one of `sites` that has the fewest rows for a regression on all that it reads."""
        return min(sites, key=lambda site: self.count(site.name) / site.regressors)

    def images(self, site: str) -> Tensor:
        """Numbers of the images that gave rows to a site, ascending, int64."""
        found = [self._read(shard, site, ("image",))["image"] for shard in self._shards(site)]
        return torch.cat(found).long().unique() if found else torch.empty(0, dtype=torch.int64)

    def sigmas(self, site: str) -> Tensor:
        """Noise levels of the rows of a site [n], float32, in the order of recording."""
        found = [self._read(shard, site, ("sigma",))["sigma"] for shard in self._shards(site)]
        return torch.cat(found).float() if found else torch.empty(0)

    def rows(self, site: str, images: Set[int] | None = None, size: int = 8192) -> Iterator[Rows]:
        """The rows of a site in pieces of at most `size`, in the order of recording; only of `images` where given."""
        waiting: list[Rows] = []
        for shard in self._shards(site):
            found = self._read(shard, site, ("x", "attn", "sigma", "image", "step"))
            rows = Rows(found["x"], found.get("attn"), found["sigma"], found["image"].long(), found["step"].long())
            if images is not None:
                rows = rows[torch.isin(rows.image, torch.tensor(sorted(images), dtype=torch.int64))]
            waiting.append(rows)
            while sum(map(len, waiting)) >= size:
                together = Rows.joined(waiting)
                yield together[:size]
                waiting = [together[size:]]
        if sum(map(len, waiting)):
            yield Rows.joined(waiting)

    def _shards(self, site: str) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.rows.get(site)]

    def _read(self, shard: Shard, site: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        file = ShardFile(self.folder / shard.file)
        found = {name: file.read(f"{site}.{name}") for name in names if f"{site}.{name}" in file.names}
        missing = sorted({*names} - {"attn"} - found.keys())
        if missing or len({len(tensor) for tensor in found.values()}) != 1:
            what = f"it lacks {missing[0]}" if missing else "its parts differ in length"
            raise UserError(f"{file.path} is damaged at {site}: {what}. Record again into a new folder.")
        return found

    def _write_shard(self, shard: Shard, tensors: Mapping[str, Tensor]) -> Shard:
        metadata = {"format": FORMAT, "kind": shard.kind, "halvings": str(shard.halvings)}
        write_safetensors(self.folder / shard.file, tensors, metadata)
        rows = {key.removesuffix(".x"): len(tensor) for key, tensor in tensors.items() if key.endswith(".x")}
        return replace(shard, bytes=_bytes(tensors), rows=rows)

    def _may_halve(self, tensors: Mapping[str, Tensor], least: Mapping[str, int]) -> bool:
        """Whether `tensors` can be halved, and every site has as many rows as `least` says when all rows are."""
        counts = {site: self.count(site) + len(tensors.get(f"{site}.x", ())) for site in least}
        return max(map(len, tensors.values()), default=0) > 1 and all(counts[site] // 2 >= least[site] for site in least)

    def _halve(self) -> None:
        """Takes every other row out of all shards, one file after the other; each tells itself how often that was done,
        so that a halving that was cut off is finished by the next one."""
        target = self.manifest.halvings + 1
        thinned = []
        for shard in self.manifest.shards:
            if shard.kind == "rows":
                with open_safetensors(self.folder / shard.file) as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}
                    done = int(file.metadata()["halvings"])
                for _ in range(target - done):
                    tensors = halve(tensors)
                shard = self._write_shard(Shard(shard.file, "rows", 0, halvings=target), tensors)
            thinned.append(shard)
        self.manifest = replace(self.manifest, halvings=target, shards=tuple(thinned))
        self.manifest.save(self.folder)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock; what others wrote is read first, and what changed is written at the end if all went well."""
        with locked(self.folder / MANIFEST):
            self.manifest = Manifest.load(self.folder)
            yield
            self.manifest.save(self.folder)


def _at(levels: Levels, sigma: np.ndarray) -> np.ndarray:
    """Amplification at noise levels [n]: the mean of what was measured, in between interpolated, and beyond the outermost
    measurements as at the nearest (so the last step of a run counts as the one before it)."""
    known = sorted(levels.items())
    return np.interp(sigma, [level for level, _ in known], [value / count for _, (value, count) in known])


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
