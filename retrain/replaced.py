"""Runs with retrained layers in place of the dense ones.

    layers = RetrainedLayers.open(folder, dense, first=0, last=18)
    replaced = Replaced(dense, layers)
    model = Flux.load(replaced)
    save_pruned("replaced.safetensors", replaced)    # pruning/checkpoint.py: a file that needs no other

Files that hold a whole block, as the original flux-poke wrote them, are read like those of `files.py`; which model they belong
to can be told by their shapes alone, and which neurons they keep not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..flux.blocks import blocks_of, sites_at
from ..flux.checkpoint import open_safetensors, scale_key
from ..flux.layout import Layout, canonical_key
from ..flux.weights import full_precision, stored_like
from ..parsing import from_json
from ..progress import Progress, silent
from ..pruning.dense import KEPT, Dense
from ..pruning.low_rank import Vectors
from ..pruning.modulation import LowRanks
from ..pruning.plan import PruningPlan, require_indices
from ..pruning.planning import open_dense, open_recording
from ..pruning.refit import RepairReport
from ..pruning.surgery import Smaller, Thin, len_up, shape_of, truncate
from .files import FORMAT, layer_files, read_header

_SCALES = ("scale_weight", "weight_scale")


@dataclass(frozen=True)
class StoredLayer:
    """One block's file, which fits one dense model. Keys are the dense model's.

    Attributes:
        names: what a tensor is called in the file. shapes: of all but the scales.
        plan: what is cut of this block. report: how its MLPs came about.
        plan_digest: of the whole plan that the layer is of; None of the original flux-poke's.
        together: the blocks that it was trained with, itself among them; key: of that training.
    """

    path: Path
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    plan: PruningPlan
    report: Mapping[str, RepairReport]
    plan_digest: str | None
    together: frozenset[int]
    key: str

    @classmethod
    def open(cls, path: Path, dense: Dense, block_index: int) -> StoredLayer:
        """Raises `UserError` where the file is damaged, of another model, or not a layer that can stand at `block_index`."""
        block, sites = blocks_of(dense.layout)[block_index], sites_at(dense.layout, block_index)
        with open_safetensors(path) as file:
            header = file.metadata() or {}
            kept = {key.removeprefix(KEPT): file.get_tensor(key) for key in file.keys() if key.startswith(KEPT)}
            names = {f"{block.path}.{canonical_key(key)}": key for key in file.keys() if not key.startswith(KEPT)}
            weights = {key: name for key, name in names.items() if not key.endswith(_SCALES)}
            shapes = {key: tuple(file.get_slice(name).get_shape()) for key, name in weights.items()}
        before = after = None
        together: frozenset[int] = frozenset()
        try:
            if header.get("format") == FORMAT:
                plan, stats = PruningPlan.from_header(header, kept), from_json(header["stats"])
                before, after = (_error(stats[name]) for name in ("relative_cut", "relative_final"))
                together = frozenset(stats.get("together", ()))
            elif "format" in header:
                raise ValueError(f"expected '{FORMAT}', found '{header['format']}'")
            else:
                widths = {site.name: site.width for site in sites}
                kept = {name: require_indices(indices, widths[name], name) for name, indices in kept.items()}
                plan = replace(PruningPlan.keeping_all(dense), kept=kept, score="unknown", made="unknown")
            own, layers = {site.name for site in sites}, {site.name for site in sites if site in dense.layout.modulated}
            if foreign := (kept.keys() - own) | (plan.ranks.keys() - layers):
                raise ValueError(f"it tells of {min(foreign)}, which is in another block than {block.title}")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a retrained layer, or a damaged one ({error}): retrain it.") from error
        if not plan.fingerprint.matches(dense.fingerprint):
            raise UserError(
                f"{path} was trained for another model than {dense.source}: {plan.fingerprint.difference(dense.fingerprint)}. "
                "Choose the checkpoint it was made from, or retrain."
            )
        whole = {key: shape_of(dense.tensors, key) for key in dense.tensors if key.startswith(f"{block.path}.")}
        keys, thin = truncate(whole, dense, plan.ranks)
        expected, unknown = {key: thin[key].shape if key in thin else whole[key] for key in keys}, {}
        for site in sites:
            up, bias, down = f"{site.up}.weight", f"{site.up}.bias", f"{site.down}.weight"
            found_width = shapes[down][-1] - site.down_column if shapes.get(down) else site.width
            width = len(kept[site.name]) if site.name in kept else min(max(found_width, 1), site.width)
            if width < site.width and site.name not in kept:
                unknown[site.name] = width
            narrow = replace(site, width=width)
            expected |= {key: (len_up(narrow), *whole[key][1:]) for key in (up, bias) if key in whole}
            expected[down] = (*whole[down][:1], narrow.regressors)
        if missing := sorted(thin.keys() - shapes.keys()):
            raise UserError(
                f"{path} lacks {missing[0].removeprefix(f'{block.path}.')}, and by its plan the modulation layer is truncated: "
                "the layer is damaged. Retrain it."
            )
        stays = {key: shape for key, shape in whole.items() if key in expected}  # where the file does not hold it
        for key, shape in {**stays, **shapes}.items():
            if key not in expected:
                raise UserError(
                    f"{path} has {names[key]}, which {block.title} of {dense.source} has not: it is not a layer of this model."
                )
            if shape != expected[key]:
                raise UserError(
                    f"{path}: with it, {key} has the shape {shape}, expected {expected[key]} by the neurons and ranks that "
                    f"are kept: the layer is damaged, or does not fit {block.title} of {dense.source}. Retrain it."
                )
        report = RepairReport("retrained", before=before, after=after)
        replaced = [site.name for site in sites if f"{site.down}.weight" in shapes]
        plan = replace(plan, unknown=unknown)
        made, key = dict.fromkeys(replaced, report), header.get("key", "")
        return cls(path, names, shapes, plan, made, header.get("plan_digest"), together, key)

    def read(self, key: str) -> Tensor:
        """A tensor in float32, with its scale undone; raises `UserError` where it holds numbers that are not finite."""
        layer = key.removesuffix(".weight")
        wanted = (key, *(f"{layer}.{scale}" for scale in _SCALES))
        with open_safetensors(self.path) as file:
            tensors = {name: file.get_tensor(self.names[name]) for name in wanted if name in self.names}
        try:
            value = full_precision(tensors, key)
        except RuntimeError as error:
            raise UserError(
                f"{self.path}: the scale of {self.names[key]} does not fit it ({error}): retrain the layer."
            ) from error
        if value.shape != self.shapes[key] or not value.isfinite().all():
            raise UserError(f"{self.path} holds numbers in {self.names[key]} that are not finite: retrain the layer.")
        return value


@dataclass(frozen=True)
class RetrainedLayers:
    """Layers from a folder that fit one dense model, by block index; `missing` are indices of the range without a file."""

    folder: Path
    layers: Mapping[int, StoredLayer]
    missing: tuple[int, ...]

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], dense: Dense, first: int | None = None, last: int | None = None
    ) -> RetrainedLayers:
        """Raises `UserError` where the folder holds no layer in the range, another model's, one whose shapes do not fit, or
        layers of two plans."""
        folder = Path(folder)
        files, blocks = layer_files(folder), len(blocks_of(dense.layout))
        if not files:
            raise UserError(f"{folder} holds no retrained layers: expected files such as 0.safetensors in it.")
        low = 0 if first is None else first
        high = max(files) if last is None else last
        if not 0 <= low <= high < blocks:
            raise UserError(f"Layers {low} to {high} are asked for, but {dense.source} has blocks 0 to {blocks - 1}.")
        chosen = {index: StoredLayer.open(path, dense, index) for index, path in files.items() if low <= index <= high}
        if not chosen:
            raise UserError(f"{folder} holds no layer from {low} to {high}; it has {', '.join(map(str, files))}.")
        plans: dict[str, list[str]] = {}
        for index, layer in chosen.items():
            if layer.plan_digest is not None:
                plans.setdefault(layer.plan_digest, []).append(str(index))
        if len(plans) > 1:
            parts = "; ".join(map(", ".join, plans.values()))
            raise UserError(
                f"{folder} holds layers of {len(plans)} plans ({parts}), which do not go together: choose a range of layers of "
                "one plan (first and last layer), or retrain into a folder of its own."
            )
        return cls(folder, chosen, tuple(index for index in range(low, high + 1) if index not in chosen))

    @property
    def anew(self) -> tuple[int, ...]:
        """Layers that were trained together with others of the range, and anew since, without those."""
        partners = [(layer.key, other) for layer in self.layers.values() for other in layer.together & self.layers.keys()]
        return tuple(sorted({other for key, other in partners if self.layers[other].key != key}))

    def notes(self, layout: Layout) -> list[str]:
        """Sentences about layers that are missing, or do not go with the others."""
        blocks, found = blocks_of(layout), []
        if names := [blocks[index].title for index in self.missing]:
            found.append(f"{self.folder} has no file for {', '.join(names)}: left dense.")
        if names := [blocks[index].title for index in self.anew]:
            found.append(
                f"{self.folder} mixes two trainings: {', '.join(names)}, once trained together with others, came about by "
                "another one. What they made up for each other is lost: retrain all of them, or into a folder of its own."
            )
        return found


def open_dense_of(folder: str | os.PathLike[str], override: str | os.PathLike[str] | None = None) -> Dense:
    """The dense model that the layers in a folder were made of: from the file that their plan tells, or from `override`.

    Raises `UserError` where neither is there, or the layers do not tell.
    """
    if override is not None:
        return Dense.open(override)
    for path in layer_files(Path(folder)).values():
        header = read_header(path)
        if header.get("format") == FORMAT:
            try:
                plan = PruningPlan.from_header(header, {})
            except ValueError as error:
                raise UserError(f"{path} is a damaged retrained layer ({error}): retrain it.") from error
            return open_dense(plan)
    raise UserError(f"{folder} holds no layers that tell which model they are of: choose the dense model (--checkpoint FILE).")


class Replaced(Smaller):
    """The tensors of `dense` with the retrained layers in place.

    Weights come back in what `dense` stores them as, with new scales where it has any. The plan is put together from the
    layers' own; of the original flux-poke's layers it knows only how many neurons they keep.
    """

    def __init__(self, dense: Dense, layers: RetrainedLayers):
        self.layers = layers
        plans = [layer.plan for layer in layers.layers.values() if layer.plan.cut or layer.plan.ranks]
        plan = reduce(PruningPlan.joined, plans) if plans else PruningPlan.keeping_all(dense)
        super().__init__(dense, replace(plan, fingerprint=dense.fingerprint))
        self._layer_of = {key: layer for layer in layers.layers.values() for key in layer.shapes}
        # The dense model's scales of replaced weights, and those weights.
        self._scaled = {scale: key for key in self._layer_of if (scale := scale_key(dense.tensors, key))}

    def _factor(self, key: str, thin: Thin) -> Tensor:
        return self._layer_of[key].read(key)

    def _stored(self, key: str) -> Tensor:
        weight_key = self._scaled.get(key, key)
        if weight_key not in self._layer_of:
            return self.dense.tensors[key]
        value = self._layer_of[weight_key].read(weight_key)
        weight, scale = stored_like(value, self.dense.tensors, weight_key)
        return weight if key == weight_key or scale is None else scale

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        dense, weight_key = shape_of(self.dense.tensors, key), self._scaled.get(key, key)
        if weight_key not in self._layer_of:
            return dense
        shape = self._layer_of[weight_key].shapes[weight_key]
        if weight_key == key:
            return shape
        return (shape[0], *dense[1:]) if len(dense) and dense[0] > 1 else dense  # a scale by row, or one for all

    def work_out(self, progress: Progress = silent, fold: bool = False) -> Mapping[str, RepairReport]:
        return {name: report for layer in self.layers.layers.values() for name, report in layer.report.items()}

    @property
    def vectors(self) -> Vectors | None:
        """From the plan's recording, and None as well where that is not at hand, or not sound."""
        if not self.plan.ranks:
            return None
        try:
            return LowRanks(self.dense, self.plan, open_recording(self.plan)).vectors
        except UserError:
            return None


def _error(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"it says {value!r} of an error, expected a finite number from 0 on")
    return float(value)
