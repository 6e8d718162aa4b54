"""A pruned checkpoint: one file that needs no other, and tells what was done to it.

    save_pruned("flux1-dev-8b.safetensors", cut)     # or a model with retrained layers in it
    save_weights("with-lora.safetensors", tensors, plan, report)     # what is pruned already
    pruned = Pruned.open("flux1-dev-8b.safetensors")
    model = Flux.load(pruned.tensors)
    pruned.plan.table(), pruned.report

The reduced tensors stand under their usual names; `flux_poke.kept.S` int32 are the kept neurons of site S, and
`flux_poke.fold.S.offset` and, where asked for, `.matrix` what a LoRA needs to follow (`lora.py`). The header holds the
plan, the repair with its held-out error by site, and the fingerprint of the dense model, beside what the dense file's
header held.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import check_replaces, kind_of, stream_safetensors
from ..flux.checkpoint import Checkpoint, open_safetensors, require_format
from ..flux.layout import FAMILY_NAMES, Layout, Site, canonical_key, read_layout
from ..progress import Progress, part, silent
from .dense import KEPT, PRUNED_FORMAT, Dense
from .plan import PruningPlan
from .refit import Fold, RepairReport
from .repair import report_table
from .surgery import Changed

FOLD = "flux_poke.fold."


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint. `tensors` are the model's alone, canonical keys, each read when it is asked for."""

    path: Path
    tensors: Mapping[str, Tensor]
    layout: Layout
    plan: PruningPlan
    report: Mapping[str, RepairReport]
    folds: Mapping[str, Fold]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Pruned:
        """Reads the header; raises `UserError` where the file is damaged or no pruned checkpoint."""
        with open_safetensors(path) as file:
            advice = (
                "Dense checkpoints load in the ordinary loader. A pruned MODEL is saved with Save Pruned FLUX: ModelSave and "
                "CheckpointSave leave out its plan."
            )
            header = require_format(file.metadata(), path, PRUNED_FORMAT, "pruned checkpoint", advice)
            try:
                kept = {key.removeprefix(KEPT): file.get_tensor(key) for key in file.keys() if key.startswith(KEPT)}
                plan = PruningPlan.from_header(header, kept)
                report = {name: RepairReport(**site) for name, site in json.loads(header["repair"]).items()}
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is a damaged pruned checkpoint ({error}): copy it again or make it again.") from error
        checkpoint = Checkpoint(path)
        _require_widths(checkpoint.layout, plan, str(path))
        return cls(
            path=Path(path),
            tensors=_Only(checkpoint, [key for key in checkpoint if not key.startswith("flux_poke.")]),
            layout=checkpoint.layout,
            plan=plan,
            report=report,
            folds=_Folds(checkpoint, list(kept)),
            metadata=header,
        )


def save_pruned(path: str | os.PathLike[str], changed: Changed, fold: bool = False, progress: Progress = silent) -> None:
    """Writes a cut or replaced checkpoint as a whole, one tensor in memory at a time.

    `fold`: also write what exact conversion of LoRAs needs after affine repair: [cut, kept] numbers in bf16 per MLP, on disk
    only. Raises `UserError`, before anything is computed, where a file at `path` is not a pruned checkpoint, and without a file
    being left where a tensor holds a number that is not finite.
    """
    check_replaces(path, PRUNED_FORMAT)
    changed.dense.release()
    report = changed.work_out(part(progress, 0, 2), fold)
    kinds = {key: changed.kind(key) for key in changed}
    folds: dict[str, Callable[[], Tensor]] = {}
    for name, kept in changed.plan.kept.items():
        for what, kind in _fold_kinds(changed.dense.layout.site(name), len(kept), report[name].method, fold).items():
            folds[f"{FOLD}{name}.{what}"] = partial(_fold_part, changed, name, what)
            kinds[f"{FOLD}{name}.{what}"] = kind

    def tensor(key: str) -> Tensor:
        changed.dense.release()
        return folds[key]() if key in folds else changed[key]

    _write(path, kinds, tensor, changed.plan, report, _passed_on(changed.dense), part(progress, 1, 2))


def save_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    plan: PruningPlan,
    report: Mapping[str, RepairReport],
    progress: Progress = silent,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors that are pruned already (canonical keys) as a pruned checkpoint: those of a model with LoRAs merged into
    them, or retrained; they are read one at a time. What conversion of LoRAs would need is not in it.

    `report` tells what the kept neurons of each site were repaired with, `metadata` is passed on. Raises `UserError`, leaving
    no file, where `plan` is not what was cut of them, or a tensor holds a number that is not finite.
    """
    check_replaces(path, PRUNED_FORMAT)
    kinds = {key: kind_of(tensor) for key, tensor in tensors.items()}
    _require_widths(read_layout({key: shape for key, (_, shape) in kinds.items()}, "The model"), plan, "The model")
    _write(path, kinds, tensors.__getitem__, plan, report, metadata or {}, progress)


def save_changed(
    path: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    report: Mapping[str, RepairReport],
) -> None:
    """Writes the pruned checkpoint `pruned` with some of its tensors (canonical keys) replaced, as retraining gives them.

    `report` tells of the sites they belong to.
    """
    found = Pruned.open(pruned)
    unknown = sorted(tensors.keys() - found.tensors.keys())
    if unknown:
        raise UserError(f"{pruned} has no {unknown[0]}: these tensors belong to another model.")
    save_weights(path, {**found.tensors, **tensors}, found.plan, {**found.report, **report}, metadata=found.metadata)


def _write(
    path: str | os.PathLike[str],
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    plan: PruningPlan,
    report: Mapping[str, RepairReport],
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """A pruned checkpoint of the tensors in `kinds` and the kept indices, one tensor in memory at a time.

    The file may be passed on: of the dense model and the recording it names the files, not where they lie.
    """
    kept = {f"{KEPT}{name}": indices.int() for name, indices in plan.kept.items()}
    plan = replace(plan, checkpoint=Path(plan.checkpoint).name, recording=Path(plan.recording).name)
    repaired = json.dumps({name: asdict(site) for name, site in report.items()})
    header = {**metadata, **plan.header(), "format": PRUNED_FORMAT, "repair": repaired}
    written = itertools.count(1)

    def next_tensor(key: str) -> Tensor:
        value = kept[key] if key in kept else _require_finite(tensor(key), key)
        progress(f"writing {key}", next(written), len(kinds) + len(kept))
        return value

    stream_safetensors(path, {**kinds, **{key: kind_of(indices) for key, indices in kept.items()}}, next_tensor, header)


def _require_finite(tensor: Tensor, key: str) -> Tensor:
    """`tensor`; raises `UserError` where it holds a number that is not finite. Numbers of 8 bits are not looked at."""
    looked_at = tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel()
    # Least and largest are not finite where any number is not; unlike isfinite(tensor), that takes no memory.
    if looked_at and not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(
            f"{key} holds numbers that are not finite, with which every picture is black: look at the model, the recording or "
            "the LoRA that it was made with."
        )
    return tensor


def _require_widths(layout: Layout, plan: PruningPlan, source: str) -> None:
    """Raises `UserError` where the MLPs of a pruned model are not as wide as `plan` leaves them."""
    for site in layout.sites:
        width = plan.widths.get(site.name, 0)
        expected = plan.unknown.get(site.name, len(plan.kept.get(site.name, range(width))))
        if site.width != expected:
            raise UserError(
                f"{source} has {site.width:,} neurons in {site.name}, and its plan leaves {expected:,}: they do not belong "
                "together."
            )


def inspect(path: str | os.PathLike[str]) -> str:
    """What a checkpoint is, as text: family, size, widths, and for a pruned one what was cut and how well it was repaired.

    Raises `UserError` where it is no FLUX.
    """
    checkpoint = Checkpoint(path)
    layout = checkpoint.layout
    pruned = checkpoint.metadata.get("format") == PRUNED_FORMAT
    parameters = sum(torch.Size(shape).numel() for key, shape in checkpoint.shapes.items() if not key.startswith("flux_poke."))
    lines = [
        f"{FAMILY_NAMES[layout.family]}{', pruned' if pruned else ''}: {layout.depth} double and {layout.depth_single} single "
        f"blocks, hidden {layout.hidden}, {layout.neurons:,} MLP neurons, {parameters:,} parameters",
    ]
    if not pruned:
        widths = sorted({site.width for site in layout.sites}, reverse=True)
        lines.append(f"MLP widths: {', '.join(f'{width:,}' for width in widths)}")
        return "\n".join(lines)
    found = Pruned.open(path)
    return "\n".join([*lines, found.plan.table(), report_table(found.report)])


class _Only(Mapping[str, Tensor]):
    """Some keys of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, keys: list[str]):
        self.checkpoint, self.names = checkpoint, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        return _require_finite(self.checkpoint[key], key)

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Folds(Mapping[str, Fold]):
    """The folds in a checkpoint, by site, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, sites: list[str]):
        self.checkpoint, self.sites = checkpoint, dict.fromkeys(sites)

    def __getitem__(self, name: str) -> Fold:
        if name not in self.sites:
            raise KeyError(name)
        parts = {part: f"{FOLD}{name}.{part}" for part in ("matrix", "offset")}
        return Fold(**{part: self.checkpoint.get(key) for part, key in parts.items()})

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def _fold_kinds(site: Site, kept: int, method: str, fold: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of what is stored of a site's fold: the offset of a repaired bias; of affine repair all or nothing."""
    cut = site.width - kept
    matrix = method == "affine" and fold
    found: dict[str, tuple[str, tuple[int, ...]]] = {"matrix": ("BF16", (cut, site.down_column + kept))} if matrix else {}
    return {**found, "offset": ("F32", (cut,))} if site.biased and (matrix or method == "bias") else found


def _fold_part(changed: Changed, name: str, part: str) -> Tensor:
    fold = changed.fold(name, matrix=part == "matrix")
    value = fold.matrix if part == "matrix" else fold.offset
    assert value is not None
    return value


def _passed_on(dense: Dense) -> dict[str, str]:
    """The dense file's header; names of quantised layers lose the prefix that the keys lose."""
    header = {key: value for key, value in dense.metadata.items() if key != "format"}
    quantised = header.get("_quantization_metadata")
    if quantised is not None:
        found = json.loads(quantised)
        found["layers"] = {canonical_key(name, dense.layout.prefix): v for name, v in found.get("layers", {}).items()}
        header["_quantization_metadata"] = json.dumps(found)
    return header
