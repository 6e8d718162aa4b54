"""A model's tensors in the precision that its file is saved in, each rounded when it is asked for.

    rounded = Rounded(cut, "fp8")                    # as `cut`, with scales and formats beside the weights in 8 bits
    rounded.work_out(progress)                       # rounds with compensation, where rows were recorded (`rounding.py`)
    rounded["single_blocks.7.linear2.weight"], rounded["single_blocks.7.linear2.weight_scale"]

Biases of modulation layers take over the mean of what their rounded weights lose, wherever texts were recorded.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import astuple
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..flux.checkpoint import scale_key
from ..flux.layout import Site
from ..flux.weights import BESIDE_WEIGHT, full_precision
from ..progress import Progress, part, silent
from ..recording.recording import Recording
from .cache import cache_key, read_cached, recorded_rows, write_cached
from .low_rank import Vectors
from .modulation import has_texts, recorded_vectors
from .precision import FP8, comfy_quant, rounds_to_fp8
from .refit import Fold, RepairReport
from .rounding import RoundedLayer, RoundedSite, RoundingErrors, plain, round_site, scale_of
from .surgery import Changed

FORMAT = "flux-poke rounding 1"
#: Seconds after which what was worked out for another file is taken to be of a save that was given up.
ABANDONED = 86_400.0
#: What a tensor becomes: itself, bf16, float8, or the scale or format beside a float8 weight.
AS_IS, BF16, EIGHT, SCALE, QUANT = "as it is", "bf16", "float8", "scale", "format"


class Rounded(Changed):
    """The tensors of `changed` in `precision` ("bf16" or "fp8"). Without rows, plain rounding has to do."""

    def __init__(self, changed: Changed, precision: str):
        self.changed, self.precision = changed, precision
        self.dense, self.plan, layout = changed.dense, changed.plan, changed.dense.layout
        self._keys: dict[str, str] = {}
        self._quantised = {
            layer
            for key in changed
            if key.endswith(".weight") and (layer := key.removesuffix(".weight"))
            if scale_key(changed, key) or f"{layer}.comfy_quant" in changed
        }
        for key in changed:
            layer, _, name = key.rpartition(".")
            if (layer in self._quantised and (name == "weight" or name in BESIDE_WEIGHT)) or key == "scaled_fp8":
                if precision == "fp8":
                    self._keys[key] = AS_IS
                elif name == "weight":
                    self._keys[key] = BF16
            elif precision == "fp8" and rounds_to_fp8(layout, key, changed.shape(key)):
                self._keys |= {key: EIGHT, f"{layer}.weight_scale": SCALE, f"{layer}.comfy_quant": QUANT}
            else:
                whole = changed.kind(key)[0]
                self._keys[key] = BF16 if whole.startswith(("F", "BF")) else AS_IS
        recording = changed.recording
        self._sites = {site.name: site for site in layout.sites if self._compensates(site, recording)}
        self._layers = {getattr(site, which): (site, which) for site in self._sites.values() for which in ("up", "down")}
        self._modulated = {site.modulation: site for site in layout.modulated}
        self._folder: Path | None = None

    def _compensates(self, site: Site, recording: Recording | None) -> bool:
        """Whether both projections of an MLP go into 8 bits, and enough rows of it were recorded."""
        if recording is None or "rows" not in recording.kinds:
            return False
        both = all(self._keys.get(f"{layer}.weight") == EIGHT for layer in (site.up, site.down))
        return both and recording.states().count(site.name) >= site.regressors

    def shape(self, key: str) -> tuple[int, ...]:
        return self.kind(key)[1]

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        what = self._keys[key]
        if what in (SCALE, QUANT):
            return ("F32", ()) if what == SCALE else ("U8", (len(comfy_quant(key)),))
        kind, shape = self.changed.kind(key)
        return {AS_IS: kind, BF16: "BF16", EIGHT: "F8_E4M3"}[what], shape

    def __getitem__(self, key: str) -> Tensor:
        what, (layer, _, name) = self._keys[key], key.rpartition(".")
        if what == AS_IS:
            return self.changed[key]
        if what == QUANT:
            return torch.tensor(list(comfy_quant(key)), dtype=torch.uint8)
        if layer in self._layers and name in ("weight", "weight_scale", "bias"):
            return self._compensated(*self._layers[layer], name)
        if what == BF16:
            own = full_precision(self.changed, key) if name == "weight" else self.changed[key].float()
            if name == "bias" and layer in self._modulated:
                own = own + self._lost_by_modulation(layer)
            return own.bfloat16()
        rounded = rounded_plainly(self.changed[f"{layer}.weight"])
        return rounded.weight if what == EIGHT else rounded.scale

    @property
    def recording(self) -> Recording | None:
        return self.changed.recording

    @property
    def vectors(self) -> Vectors | None:
        return self.changed.vectors

    def fold(self, site: str, matrix: bool = True) -> Fold:
        return self.changed.fold(site, matrix)

    def work_out(self, progress: Progress = silent, fold: bool = False) -> Mapping[str, RepairReport]:
        report = self.changed.work_out(part(progress, 0, 2), fold)
        if self._sites and self.recording is not None:
            methods = json.dumps({name: site.method for name, site in report.items()})
            found = recorded_rows(self.recording), self.plan.digest, self.dense.fingerprint.digest, methods
            self._folder = self.recording.cache / "rounding" / cache_key(FORMAT, *found)
            for other in self._folder.parent.glob("*"):
                if other != self._folder and _age(other) > ABANDONED:  # a younger one may be in the making
                    shutil.rmtree(other, ignore_errors=True)
            within = part(progress, 1, 2)
            for done, site in enumerate(self._sites.values()):
                within(f"rounding {site.name}", done, len(self._sites))
                if read_cached(self._file(site), FORMAT, {"errors": (6,)}) is None:
                    self._round(site, part(within, done, len(self._sites)))
        return report

    def errors(self) -> dict[str, RoundingErrors]:
        """By site, what rounding its layers with compensation leaves, once it is worked out."""
        stored = {name: read_cached(self._file(site), FORMAT, {"errors": (6,)}) for name, site in self._sites.items()}
        return {name: RoundingErrors(*found["errors"].tolist()) for name, found in stored.items() if found is not None}

    def forget(self) -> None:
        """Removes what was worked out, once it is written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, site: Site) -> Path:
        assert self._folder is not None
        return self._folder / f"{site.name}.safetensors"

    def _round(self, site: Site, progress: Progress = silent) -> None:
        assert self.recording is not None
        found = round_site(self.changed, site, self.recording.states(), self.changed.device, progress)
        write_cached(self._file(site), FORMAT, _stored(found))
        self.dense.release()

    def _compensated(self, site: Site, which: str, name: str) -> Tensor:
        if self._folder is None:
            self.work_out()
        key = f"{which}.{name}"
        found = read_cached(self._file(site), FORMAT, {key: None})
        if found is None:
            self._round(site)
            found = read_cached(self._file(site), FORMAT, {key: None})
        assert found is not None
        if name == "weight":
            return found[key].view(FP8)
        return found[key].bfloat16() if name == "bias" else found[key]

    @cached_property
    def _mean(self) -> Tensor | None:
        """The mean of what modulation layers read, float32 [hidden]; None where no texts were recorded."""
        if self.recording is None or not has_texts(self.recording):
            return None
        return recorded_vectors(self.dense, self.recording).mean.float()

    def _lost_by_modulation(self, layer: str) -> Tensor | float:
        """What the rounded weights of a modulation layer lose of its mean output."""
        mean = self._mean
        if mean is None:
            return 0.0
        factors = [key for name in ("down.weight", "up.weight", "weight") if (key := f"{layer}.{name}") in self.changed]
        dense, rounded = mean, mean
        for key in factors:
            if self._keys[key] == AS_IS:
                return 0.0
            whole = full_precision(self.changed, key)
            dense = whole @ dense
            rounded = (rounded_plainly(whole).numbers if self._keys[key] == EIGHT else whole.bfloat16().float()) @ rounded
        return dense - rounded


def rounded_plainly(weight: Tensor) -> RoundedLayer:
    """A weight in 8 bits, each number rounded to the nearest. Numbers that are float8 already stay, with a scale of 1."""
    if weight.dtype == FP8:
        return RoundedLayer(weight, torch.ones(()), None)
    wide = weight.float()
    scale = scale_of(wide)
    return RoundedLayer(plain(wide, scale), scale, None)


def _stored(found: RoundedSite) -> dict[str, Tensor]:
    tensors = {"errors": torch.tensor(astuple(found.errors), dtype=torch.float64)}
    for which, layer in (("up", found.up), ("down", found.down)):
        tensors |= {f"{which}.weight": layer.weight.view(torch.uint8), f"{which}.weight_scale": layer.scale}
        if layer.bias is not None:
            tensors[f"{which}.bias"] = layer.bias
    return tensors


def _age(folder: Path) -> float:
    """Seconds since something was last written there."""
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:  # gone by now
        return 0.0
