"""Cutting neurons out of a checkpoint, tensor by tensor.

    cut = Cut(dense, plan, Repairs(dense, plan, "affine", rows=store, folder=folder))
    cut["double_blocks.3.img_mlp.2.weight"]          # read, cut and repaired now
    model = Flux.load(cut)                           # runs at the pruned widths
    save_pruned("pruned.safetensors", cut)           # checkpoint.py

Neuron j of a site is row j of its up projection (in a gated MLP also row j + width) and column j of its down projection. What is kept
is not touched when nothing is repaired: numbers stay as the file stores them, quantised ones with their scales. A repaired down
projection goes back into the precision it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..files import kind_of
from ..flux.checkpoint import Checkpoint
from ..flux.layout import Site
from .dense import Dense
from .plan import PruningPlan
from .repair import Repaired, Repairs
from .weights import require_plain, scale_key, stored_like


class Cut(Mapping[str, Tensor]):
    """The tensors of `dense` without the neurons that `plan` cuts, under the same keys; each is made when it is asked for.

    Raises `UserError` where the plan is of another model, or a weight to be cut is quantised in blocks.
    """

    def __init__(self, dense: Dense, plan: PruningPlan, repairs: Repairs | None = None):
        plan.require(dense)
        self.dense, self.plan = dense, plan
        self.repairs = repairs if repairs is not None else Repairs(dense, plan, "none")
        self._last: tuple[str, Repaired] | None = None
        self._changed: dict[str, Callable[[Tensor | None], Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        tensors = dense.tensors
        for site in dense.layout.sites:
            if site.name not in plan.kept:
                continue
            for key in (f"{site.up}.weight", f"{site.down}.weight"):
                require_plain(tensors, key)
            rows, columns = up_rows(site, plan.kept[site.name]), down_columns(site, plan.kept[site.name])
            up_scale, down_scale = scale_key(tensors, f"{site.up}.weight"), scale_key(tensors, f"{site.down}.weight")
            for key in (f"{site.up}.weight", f"{site.up}.bias", up_scale):
                if key is not None and key in tensors and self._dense_shape(key)[:1] == (len_up(site),):
                    self._changed[key] = lambda stored, rows=rows: stored[rows]  # type: ignore[misc]
                    self._shapes[key] = (len(rows), *self._dense_shape(key)[1:])
            key = f"{site.down}.weight"
            self._changed[key] = lambda stored, site=site, columns=columns: self._down(site, columns, stored)  # type: ignore[misc]
            self._shapes[key] = (self._dense_shape(key)[0], len(columns))
            if f"{site.down}.bias" in tensors and self.repairs.method != "none":
                self._changed[f"{site.down}.bias"] = lambda stored, site=site: self._bias(site, stored)  # type: ignore[misc]
            if down_scale is not None and self.repairs.method == "affine":
                self._changed[down_scale] = lambda stored, site=site: self._down_scale(site, stored)  # type: ignore[misc]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dense.tensors)

    def __len__(self) -> int:
        return len(self.dense.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.dense.tensors

    def __getitem__(self, key: str) -> Tensor:
        stored = self.dense.tensors[key]
        return self._changed[key](stored) if key in self._changed else stored

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Type (in safetensors' words) and shape of a tensor, without making it."""
        tensors = self.dense.tensors
        dtype = tensors.dtype(key) if isinstance(tensors, Checkpoint) else kind_of(tensors[key])[0]
        return dtype, self._shapes.get(key, self._dense_shape(key))

    def _dense_shape(self, key: str) -> tuple[int, ...]:
        tensors = self.dense.tensors
        return tensors.shape(key) if isinstance(tensors, Checkpoint) else tuple(tensors[key].shape)

    def _repaired(self, site: Site) -> Repaired:
        if self._last is None or self._last[0] != site.name:
            self._last = site.name, self.repairs[site.name]
        return self._last[1]

    def _refitted(self, site: Site) -> tuple[Tensor, Tensor | None] | None:
        """The down projection and its scale as they are to be stored; None where its columns were left as they are."""
        if self.repairs.method != "affine" or self._repaired(site).report.method != "affine":
            return None
        return stored_like(self._repaired(site).down, self.dense.tensors, f"{site.down}.weight")

    def _down(self, site: Site, columns: Tensor, stored: Tensor) -> Tensor:
        refitted = self._refitted(site)
        return stored[:, columns] if refitted is None else refitted[0]

    def _down_scale(self, site: Site, stored: Tensor) -> Tensor:
        refitted = self._refitted(site)
        return stored if refitted is None or refitted[1] is None else refitted[1]

    def _bias(self, site: Site, stored: Tensor) -> Tensor:
        repaired = self._repaired(site).bias
        return stored if repaired is None else repaired.to(stored.dtype)


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
