"""Cutting neurons out of a checkpoint, tensor by tensor.

    cut = Cut(dense, plan, Repairs(dense, plan, "affine", recording))
    cut["double_blocks.3.img_mlp.2.weight"]          # read, cut and repaired now
    model = Flux.load(cut)                           # runs at the pruned widths
    save_pruned("pruned.safetensors", cut)           # checkpoint.py

Neuron j of a site is row j of its up projection (in a gated MLP also row j + width) and column j of its down projection.
What is kept is not touched when nothing is repaired: numbers stay as the file stores them, quantised ones with their
scales. A repaired down projection goes back into the precision it came in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..files import kind_of
from ..flux.checkpoint import Checkpoint, scale_key
from ..flux.layout import Site
from ..flux.weights import require_plain, stored_like
from ..progress import Progress, silent
from .dense import Dense
from .plan import PruningPlan
from .refit import Fold, Repaired, RepairReport
from .repair import Repairs

#: What a tensor is to its MLP: up projection (weight, bias, scale by row), down projection, its bias, its scale.
Part = Literal["up", "down", "bias", "scale"]


class Changed(Mapping[str, Tensor]):
    """The tensors of `dense` under the same keys and in the same precision, some of them narrower or of other values; each is
    made when it is asked for. `plan` tells which neurons are left.
    """

    dense: Dense
    plan: PruningPlan

    def __iter__(self) -> Iterator[str]:
        return iter(self.dense.tensors)

    def __len__(self) -> int:
        return len(self.dense.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.dense.tensors

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, without making it."""

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Type (in safetensors' words) and shape of a tensor, without making it."""
        tensors = self.dense.tensors
        return tensors.dtype(key) if isinstance(tensors, Checkpoint) else kind_of(tensors[key])[0], self.shape(key)

    @abstractmethod
    def work_out(self, progress: Progress = silent, fold: bool = False) -> Mapping[str, RepairReport]:
        """Does what takes long (a repair, and with `fold` what LoRAs need of it), so that tensors come at once after it; by
        site that was changed, how it was made up for."""

    def fold(self, site: str, matrix: bool = True) -> Fold:
        """How a LoRA follows what was cut of `site`; without `matrix`, its offset alone."""
        return Fold(None, None)


class Cut(Changed):
    """The tensors of `dense` without the neurons that `plan` cuts, repaired.

    Raises `UserError` where the plan is of another model, or a weight to be cut is quantised in blocks.
    """

    def __init__(self, dense: Dense, plan: PruningPlan, repairs: Repairs | None = None):
        plan.require(dense)
        self.dense, self.plan = dense, plan
        self.repairs = repairs if repairs is not None else Repairs(dense, plan, "none")
        self._last: tuple[str, Repaired] | None = None
        self._parts: dict[str, tuple[Part, Site]] = {}
        for site in dense.layout.sites:
            if site.name not in plan.kept:
                continue
            for weight in (f"{site.up}.weight", f"{site.down}.weight"):
                require_plain(dense.tensors, weight)
            up_scale = scale_key(dense.tensors, f"{site.up}.weight")
            for key in (f"{site.up}.weight", f"{site.up}.bias", up_scale):
                if key is not None and key in dense.tensors and shape_of(dense.tensors, key)[:1] == (len_up(site),):
                    self._parts[key] = "up", site
            self._parts[f"{site.down}.weight"] = "down", site
            self._parts[f"{site.down}.bias"] = "bias", site
            down_scale = scale_key(dense.tensors, f"{site.down}.weight")
            if down_scale is not None:
                self._parts[down_scale] = "scale", site

    def __getitem__(self, key: str) -> Tensor:
        stored = self.dense.tensors[key]
        if key not in self._parts:
            return stored
        part, site = self._parts[key]
        kept = self.plan.kept[site.name]
        if part == "up":
            return take(stored, up_rows(site, kept), 0)
        if self.repairs.method == "none":
            return take(stored, down_columns(site, kept), 1) if part == "down" else stored
        repaired = self._repaired(site.name)
        if part == "bias":
            return stored if repaired.bias is None else _store(repaired.bias, stored.dtype, key)
        if repaired.report.method != "affine":  # the bias alone
            return take(stored, down_columns(site, kept), 1) if part == "down" else stored
        if scale_key(self.dense.tensors, f"{site.down}.weight") is None:
            _require_range(repaired.down, self.dense.tensors[f"{site.down}.weight"].dtype, key)
        weight, scale = stored_like(repaired.down, self.dense.tensors, f"{site.down}.weight")
        return weight if part == "down" or scale is None else scale

    def shape(self, key: str) -> tuple[int, ...]:
        shape = shape_of(self.dense.tensors, key)
        if key not in self._parts:
            return shape
        part, site = self._parts[key]
        kept = self.plan.kept[site.name]
        if part == "up":
            return (len(up_rows(site, kept)), *shape[1:])
        return (shape[0], len(down_columns(site, kept))) if part == "down" else shape

    def work_out(self, progress: Progress = silent, fold: bool = False) -> Mapping[str, RepairReport]:
        return self.repairs.compute(progress, fold)

    def fold(self, site: str, matrix: bool = True) -> Fold:
        return self.repairs.fold(site, matrix)

    def _repaired(self, site: str) -> Repaired:
        """One site's repair; the last one is kept, since its tensors are asked for one after the other."""
        if self._last is None or self._last[0] != site:
            self._last = site, self.repairs[site]
        return self._last[1]


def _store(repaired: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    _require_range(repaired, dtype, key)
    return repaired.to(dtype)


def _require_range(repaired: Tensor, dtype: torch.dtype, key: str) -> None:
    """Raises `UserError` where a repaired tensor has a number that `dtype` cannot hold."""
    largest, limit = repaired.abs().max().item(), torch.finfo(dtype).max
    if not largest <= limit:
        raise UserError(
            f"The repair of {key} reaches {largest:.3g}, and {str(dtype).removeprefix('torch.')}, which the checkpoint stores "
            f"it in, ends at {limit:,.0f}: start from a bf16 or float32 file of the model, or cut less."
        )


def shape_of(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading or making it where `tensors` knows it otherwise."""
    return tensors.shape(key) if isinstance(tensors, Checkpoint | Changed) else tuple(tensors[key].shape)


def take(stored: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Rows (dim 0) or columns (1) of a stored tensor; 8-bit floats, which torch cannot index everywhere, as bytes."""
    if stored.dtype.itemsize == 1:
        return stored.view(torch.uint8).index_select(dim, chosen).view(stored.dtype)
    return stored.index_select(dim, chosen)


def len_up(site: Site) -> int:
    """Rows of a site's up projection, in single blocks with those of q, k and v."""
    return site.up_row + site.width * (2 if site.gated else 1)


def up_rows(site: Site, kept: Tensor) -> Tensor:
    """Rows of the up projection that stay: what is not the MLP's, then the kept neurons' (gates first, in a gated MLP)."""
    own = torch.cat((kept, kept + site.width)) if site.gated else kept
    return torch.cat((torch.arange(site.up_row), site.up_row + own))


def down_columns(site: Site, kept: Tensor) -> Tensor:
    """Columns of the down projection that stay: what is not the MLP's, then the kept neurons'."""
    return torch.cat((torch.arange(site.down_column), site.down_column + kept))
