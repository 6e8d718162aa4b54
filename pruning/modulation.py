"""Low-rank modulation (FLUX.1): two thin factors in the place of every layer that makes shift, scale and gate from the vector.

How a layer of a rank is found is in `low_rank.py`. What it reads is sampled from the embedders alone (`flux/vectors.py`), over
all noise levels and guidances for every recorded text; noise levels weigh what an error at them does to the velocity
(`HiddenStates.importance`). What it costs is judged on texts held out, at the noise levels that were recorded: errors and what
they do differ tenfold between levels, and are largest close to 0, where few runs have a step. What that gives for a whole model
is kept in the recording's cache:

    errors = modulation_errors(dense, recording)     # by site and rank
    layers = LowRanks(dense, plan, recording)        # by site, of the rank that the plan says
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Site
from ..flux.vectors import VECTOR
from ..flux.weights import full_precision
from ..progress import Progress, silent
from ..recording.amplification import MODULATION
from ..recording.recording import Recording
from ..recording.split import held_out
from ..recording.store import HiddenStates
from .cache import Shapes, cache_key, cached_header, read_cached, recorded_rows, write_cached
from .dense import Dense
from .low_rank import LowRank, Vectors, low_rank, rank_errors
from .plan import PruningPlan

#: Its number changes with what goes into the errors or the layers.
FORMAT = "flux-poke modulation 2"
#: Noise levels that layers are judged at, of those recorded: more would tell no more of a rank.
JUDGED = 16


def modulation_errors(
    dense: Dense, recording: Recording, device: torch.device | str = "cpu", progress: Progress = silent
) -> dict[str, Tensor]:
    """By site, what truncating its modulation layer costs at every rank (`rank_errors`): on texts of held-out images, at the
    recorded noise levels, where each counts what an error of this site does to the velocity there. So times the site's
    amplification, which has to have been measured, it is the predicted error of the velocity.

    Raises `UserError` where the model's blocks have no modulation layers of their own, or the recording no texts.
    """
    sites = require_modulated(dense, recording)
    path = _errors_file(dense, recording)
    known = read_cached(path, FORMAT, {site.name: None for site in sites})
    if known is not None:
        return known
    store = recording.states()
    fit, others = held_out(store.images(VECTOR))
    vectors, texts = _sampled(dense, recording, fit, device), _texts(recording, others)
    levels, counts = _judged(store)
    judges = [Vectors.sample(dense.tensors, dense.layout, texts, None, device, [level]) for level in levels]
    found = {}
    for done, site in enumerate(sites):
        progress(f"truncating the modulation of {site.name}", done, len(sites))
        amplified = store.amplification_at(f"{site.name}{MODULATION}", levels) * counts
        weight = full_precision(dense.tensors, f"{site.modulation}.weight", device)
        found[site.name] = rank_errors(weight, vectors, Vectors.mixed(judges, amplified.tolist()))
        dense.release()
    for other in path.parent.glob("modulation.*.safetensors"):
        other.unlink(missing_ok=True)
    write_cached(path, FORMAT, found)
    return found


def lacks_modulation_errors(dense: Dense, recording: Recording) -> bool:
    """Whether `modulation_errors` are still to be worked out."""
    return cached_header(_errors_file(dense, recording), FORMAT, {site.name: None for site in dense.layout.modulated}) is None


def _errors_file(dense: Dense, recording: Recording) -> Path:
    return recording.cache / "rankings" / f"modulation.{_key(dense, recording)}.safetensors"


class LowRanks(Mapping[str, LowRank]):
    """The modulation layers of a plan, by site, of the ranks it says: worked out from all recorded texts when they are asked
    for, on `device`, and kept in the recording's cache.

    Raises `UserError` as `modulation_errors`, where the plan truncates any.
    """

    def __init__(self, dense: Dense, plan: PruningPlan, recording: Recording | None, device: torch.device | str = "cpu"):
        self.dense, self.ranks, self.device = dense, plan.ranks, device
        #: Changes with what the layers are worked out from.
        self.digest = ""
        if not self.ranks:
            return
        if recording is None:
            raise UserError(
                "Modulation layers are truncated by what was recorded of the dense model, and no recording is given."
            )
        require_modulated(dense, recording)
        self.recording, self.digest = recording, _key(dense, recording)
        self.folder = recording.cache / "modulation" / self.digest
        self.sites = {site.name: site for site in dense.layout.sites}

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def vectors(self) -> Vectors:
        """What all layers read."""
        return recorded_vectors(self.dense, self.recording, self.device)

    def lacks(self, name: str) -> bool:
        """Whether the layer of a site is still to be worked out."""
        return self._known(name) is None

    def __getitem__(self, name: str) -> LowRank:
        if (known := self._known(name)) is not None:
            return known
        site = self.sites[name]
        weight = full_precision(self.dense.tensors, f"{site.modulation}.weight", self.device)
        bias = self.dense.tensors[f"{site.modulation}.bias"].to(self.device)
        layer = low_rank(weight, bias, self.vectors.to(self.device), self.ranks[name], thin_dtype(self.dense.tensors, site))
        write_cached(self._path(name), FORMAT, {"up": layer.up, "down": layer.down, "bias": layer.bias})
        self.dense.release()
        return LowRank(layer.up.cpu(), layer.down.cpu(), layer.bias.cpu())

    def _known(self, name: str) -> LowRank | None:
        rank, (outputs, hidden) = self.ranks[name], self.shape(name)
        shapes = {"up": (outputs, rank), "down": (rank, hidden), "bias": (outputs,)}
        found = read_cached(self._path(name), FORMAT, shapes)
        return None if found is None else LowRank(**found)

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a site's modulation layer."""
        hidden = self.dense.layout.hidden
        return (3 if self.sites[name].stream == "single" else 6) * hidden, hidden

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.ranks[name]}.safetensors"


def has_texts(recording: Recording) -> bool:
    """Whether `recording` holds the pooled texts that modulation layers are truncated by."""
    return "rows" in recording.kinds and recording.states().count(VECTOR) > 0


def thin_dtype(tensors: Mapping[str, Tensor], site: Site) -> torch.dtype:
    """What the thin tensors of a modulation layer are stored as: what its bias is in the dense file, from 16 bits on."""
    dtype = tensors[f"{site.modulation}.bias"].dtype
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def require_modulated(dense: Dense, recording: Recording | None = None) -> tuple[Site, ...]:
    """The sites of `dense` whose modulation can be truncated; raises `UserError` where there are none, or `recording` does not
    hold what that takes."""
    layout = dense.layout
    if not layout.modulated:
        raise UserError(
            f"{dense.source} has no modulation layers to truncate: FLUX.2 shares three among all its blocks, and Chroma has "
            "none, so there is nothing to gain. Cut neurons alone."
        )
    if recording is not None and not has_texts(recording):
        raise UserError(
            f"{recording.folder} holds no pooled texts, which modulation layers are truncated by: record rows again (Record, "
            "Calibrate, or `uv run flux-poke record`), or cut neurons alone."
        )
    return layout.modulated


def recorded_vectors(dense: Dense, recording: Recording, device: torch.device | str = "cpu") -> Vectors:
    """What all modulation layers read, over all recorded texts; worked out once, on `device`, and kept in the recording's
    cache; on the CPU."""
    path, shapes = _vectors_file(dense, recording)
    known = read_cached(path, FORMAT, shapes)
    if known is not None:
        return Vectors(**known)
    found = _sampled(dense, recording, None, device).to("cpu")
    write_cached(path, FORMAT, {"mean": found.mean, "spread": found.spread})
    return found


def lacks_vectors(dense: Dense, recording: Recording) -> bool:
    """Whether `recorded_vectors` are still to be worked out."""
    path, shapes = _vectors_file(dense, recording)
    return cached_header(path, FORMAT, shapes) is None


def _vectors_file(dense: Dense, recording: Recording) -> tuple[Path, Shapes]:
    shapes = {"mean": (dense.layout.hidden,), "spread": None}
    return recording.cache / "modulation" / _key(dense, recording) / "vectors.safetensors", shapes


def _sampled(dense: Dense, recording: Recording, images: Set[int] | None, device: torch.device | str) -> Vectors:
    """From the recorded texts, of `images` alone where given; noise levels weigh what errors there do to the velocity."""
    store = recording.states()
    names = [f"{site.name}{MODULATION}" for site in dense.layout.modulated]

    def importance(sigma: Tensor) -> Tensor:
        return torch.stack([store.importance(name, sigma) for name in names]).mean(0)

    return Vectors.sample(dense.tensors, dense.layout, _texts(recording, images), importance, device)


def _texts(recording: Recording, images: Set[int] | None) -> Tensor:
    """The pooled texts that were recorded, of `images` alone where given, each once [texts, vector width]."""
    return torch.cat([rows.x.float() for rows in recording.states().rows(VECTOR, images)]).unique(dim=0)


def _judged(store: HiddenStates) -> tuple[np.ndarray, np.ndarray]:
    """The recorded noise levels that layers are judged at, and how much each counts: all where they are few, else from every
    few neighbours the middle one, which counts for them all."""
    levels, counts = store.probed()
    each = math.ceil(len(levels) / JUDGED)
    starts = np.arange(0, len(levels), each)
    return levels[np.minimum(starts + each // 2, len(levels) - 1)], np.add.reduceat(counts, starts)


def _key(dense: Dense, recording: Recording) -> str:
    return cache_key(FORMAT, recorded_rows(recording), dense.fingerprint.digest)
