"""Cutting neurons out of a checkpoint, tensor by tensor.

    cut = Cut(dense, plan, Repairs(dense, plan, "affine", recording))
    cut["double_blocks.3.img_mlp.2.weight"]          # read, cut and repaired now
    model = Flux.load(cut)                           # runs at the pruned widths
    save_pruned("pruned.safetensors", cut)           # checkpoint.py

Neuron j of a site is row j of its up projection (in a gated MLP also row j + width) and column j of its down projection.
What is kept is not touched when nothing is repaired: numbers stay as the file stores them, quantised ones with their
scales. A repaired down projection goes back into the precision it came in. A modulation layer of lower rank is two matrices,
`....lin.down.weight` and `....lin.up.weight`, in place of one, at 16 bits at least.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..files import kind_of
from ..flux.checkpoint import Checkpoint, scale_key
from ..flux.layout import Site
from ..flux.weights import require_plain, stored_like
from ..progress import Progress, silent
from ..recording.recording import Recording
from .dense import Dense
from .low_rank import Vectors
from .modulation import thin_dtype
from .plan import PruningPlan
from .refit import Fold, RepairReport
from .repair import Repairs

#: What a tensor is to its MLP: up projection (weight, bias, scale by row), down projection, its bias, its scale.
Part = Literal["up", "down", "bias", "scale"]


@dataclass(frozen=True)
class Thin:
    """A tensor of a modulation layer of lower rank: which of three, whose, and what it is stored as (`thin_dtype`)."""

    part: Literal["down", "up", "bias"]
    site: Site
    dtype: torch.dtype
    shape: tuple[int, ...]


def truncate(keys: Iterable[str], dense: Dense, ranks: Mapping[str, int]) -> tuple[dict[str, None], dict[str, Thin]]:
    """`keys` of `dense` with those of thin tensors in place of those of modulation layers that are left with `ranks` (by site),
    and the thin tensors by key.

    Raises `UserError` where such a layer is quantised in blocks.
    """
    found, thin = dict.fromkeys(keys), dict[str, Thin]()
    for site, rank in ((dense.layout.site(name), rank) for name, rank in ranks.items()):
        layer = site.modulation
        require_plain(dense.tensors, f"{layer}.weight")
        (outputs, inputs), stored = shape_of(dense.tensors, f"{layer}.weight"), thin_dtype(dense.tensors, site)
        thin[f"{layer}.down.weight"] = Thin("down", site, stored, (rank, inputs))
        thin[f"{layer}.up.weight"] = Thin("up", site, stored, (outputs, rank))
        thin[f"{layer}.bias"] = Thin("bias", site, stored, (outputs,))
        for key in [key for key in found if key.startswith(f"{layer}.")]:  # with its scale, where it has one
            del found[key]
    return found | dict.fromkeys(thin), thin


class Changed(Mapping[str, Tensor]):
    """The tensors of `dense`, some of them narrower or of other values; each is made when it is asked for. `plan` tells what is
    left.
    """

    dense: Dense
    plan: PruningPlan
    _keys: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, without making it."""

    @abstractmethod
    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Type (in safetensors' words) and shape of a tensor, without making it."""

    @abstractmethod
    def work_out(self, progress: Progress = silent, fold: bool = False) -> Mapping[str, RepairReport]:
        """Does what takes long (a repair, and with `fold` what LoRAs need of it), so that tensors come at once after it; by
        site that was changed, how it was made up for."""

    def fold(self, site: str, matrix: bool = True) -> Fold:
        """How a LoRA follows what was cut of `site`; without `matrix`, its offset alone."""
        return Fold()

    @property
    def vectors(self) -> Vectors | None:
        """What truncated modulation layers read, which a LoRA follows them by; None where none is."""
        return None

    @property
    def recording(self) -> Recording | None:
        """What was recorded of the dense model, where that is known."""
        return None

    @property
    def device(self) -> torch.device | str:
        """Where long work is done."""
        return "cpu"


class Smaller(Changed):
    """The tensors of `dense` in the same precision, those of modulation layers of lower rank (`thin`) in place of theirs."""

    def __init__(self, dense: Dense, plan: PruningPlan):
        self.dense, self.plan = dense, plan
        self._keys, self.thin = truncate(dense.tensors, dense, plan.ranks)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.thin:
            return self._stored(key)
        thin = self.thin[key]
        return _in_range(self._factor(key, thin), thin.dtype, key).to(thin.dtype)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.thin[key].shape if key in self.thin else self._stored_shape(key)

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        if key in self.thin:
            return kind_of(torch.empty(0, dtype=self.thin[key].dtype))[0], self.thin[key].shape
        tensors = self.dense.tensors
        return tensors.dtype(key) if isinstance(tensors, Checkpoint) else kind_of(tensors[key])[0], self.shape(key)

    @abstractmethod
    def _stored(self, key: str) -> Tensor:
        """A tensor that the dense model has too."""

    @abstractmethod
    def _stored_shape(self, key: str) -> tuple[int, ...]:
        """Its shape."""

    @abstractmethod
    def _factor(self, key: str, thin: Thin) -> Tensor:
        """A thin tensor, in any precision."""


class Cut(Smaller):
    """The tensors of `dense` without the neurons that `plan` cuts, repaired.

    Raises `UserError` where the plan is of another model, or a weight to be cut is quantised in blocks.
    """

    def __init__(self, dense: Dense, plan: PruningPlan, repairs: Repairs | None = None):
        plan.require(dense)
        self.repairs = repairs if repairs is not None else Repairs(dense, plan, "none")
        super().__init__(dense, plan)
        # the last one is kept, since its tensors are asked for one after the other
        self._repaired = lru_cache(maxsize=1)(self.repairs.__getitem__)
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
        self._low_rank = lru_cache(maxsize=1)(self.repairs.low_ranks.__getitem__)

    def _factor(self, key: str, thin: Thin) -> Tensor:
        return getattr(self._low_rank(thin.site.name), thin.part)

    def _stored(self, key: str) -> Tensor:
        stored = self.dense.tensors[key]
        if key not in self._parts:
            return stored
        part, site = self._parts[key]
        kept = self.plan.kept[site.name]
        if part == "up":
            return take(stored, up_rows(site, kept), 0)
        repaired = None if self.repairs.method == "none" else self._repaired(site.name)
        if part == "bias":
            changed = None if repaired is None else repaired.bias
            return stored if changed is None else _in_range(changed, stored.dtype, key).to(stored.dtype)
        if repaired is None or repaired.report.method != "affine":
            return take(stored, down_columns(site, kept), 1) if part == "down" else stored
        weight, scale = stored_like(repaired.down, self.dense.tensors, f"{site.down}.weight")
        if scale is None:
            _in_range(repaired.down, stored.dtype, key)
        return weight if part == "down" or scale is None else scale

    def _stored_shape(self, key: str) -> tuple[int, ...]:
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

    @property
    def vectors(self) -> Vectors | None:
        return self.repairs.low_ranks.vectors if self.plan.ranks else None

    @property
    def recording(self) -> Recording | None:
        return self.repairs.recording

    @property
    def device(self) -> torch.device | str:
        return self.repairs.device


def _in_range(repaired: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """`repaired`; raises `UserError` where it has a number that `dtype` cannot hold."""
    largest, limit = repaired.abs().max().item(), torch.finfo(dtype).max
    if not largest <= limit:
        raise UserError(
            f"The repair of {key} reaches {largest:.3g}, and {str(dtype).removeprefix('torch.')}, which the checkpoint stores "
            f"it in, ends at {limit:,.0f}: start from a bf16 or float32 file of the model, or cut less."
        )
    return repaired


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
