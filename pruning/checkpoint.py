"""A pruned checkpoint: one file that needs no other, and tells what was done to it.

    save_pruned("flux1-dev-8b.safetensors", cut)     # or a model with retrained layers in it
    pruned = Pruned.open("flux1-dev-8b.safetensors")
    model = Flux.load(pruned.tensors)
    pruned.plan.table(), pruned.report

The reduced tensors stand under their usual names; `flux_poke.kept.S` int32 are the kept neurons of site S, and
`flux_poke.fold.S.offset` and, where asked for, `.matrix` what a LoRA needs to follow (`lora.py`). The header holds the
plan, the repair with its held-out error by site, and the fingerprint of the dense model, beside what the dense file's
header held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import check_replaces, kind_of, stream_safetensors, write_safetensors
from ..flux.checkpoint import Checkpoint, open_safetensors, require_format
from ..flux.layout import FAMILY_NAMES, Layout, Site, canonical_key
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
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{path} is a damaged pruned checkpoint ({error}): copy it again or make it again.") from error
        checkpoint = Checkpoint(path)
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

    Args:
        fold: also write what exact conversion of LoRAs needs after affine repair: [cut, kept] numbers in bf16 per MLP, on
        disk only. progress: told after every tensor; an exception from it leaves no file.

    Raises `UserError`, before anything is computed, where a file at `path` is no pruned checkpoint.
    """
    check_replaces(path, PRUNED_FORMAT)
    report = changed.work_out(part(progress, 0, 2), fold)
    kinds = {key: changed.kind(key) for key in changed}
    extra: dict[str, Callable[[], Tensor]] = {}
    for name, kept in changed.plan.kept.items():
        extra[f"{KEPT}{name}"] = kept.int
        kinds[f"{KEPT}{name}"] = kind_of(kept.int())
        for what, kind in _fold_kinds(changed.dense.layout.site(name), len(kept), report[name].method, fold).items():
            extra[f"{FOLD}{name}.{what}"] = partial(_fold_part, changed, name, what)
            kinds[f"{FOLD}{name}.{what}"] = kind
    repaired = {name: asdict(site) for name, site in report.items()}
    header = {
        **_passed_on(changed.dense),
        **changed.plan.header(),
        "format": PRUNED_FORMAT,
        "repair": json.dumps(repaired),
    }
    done = 0

    def tensor(key: str) -> Tensor:
        nonlocal done
        changed.dense.release()
        value = extra[key]() if key in extra else changed[key]
        done += 1
        progress(f"writing {key}", len(kinds) + done, 2 * len(kinds))
        return value

    stream_safetensors(path, kinds, tensor, header)


def save_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    plan: PruningPlan,
    report: Mapping[str, RepairReport],
    progress: Progress = silent,
) -> None:
    """Writes a pruned model as it is in memory, with LoRAs merged say; `tensors` (canonical keys) are read one at a time.

    What LoRAs need to follow affine repair is not stored. Raises `UserError` where a file at `path` is not a pruned checkpoint.
    """
    check_replaces(path, PRUNED_FORMAT)
    kept = {f"{KEPT}{name}": indices.int() for name, indices in plan.kept.items()}
    kinds = {key: kind_of(tensor) for key, tensor in (*tensors.items(), *kept.items())}
    header = {
        **plan.header(),
        "format": PRUNED_FORMAT,
        "repair": json.dumps({name: asdict(site) for name, site in report.items()}),
    }
    done = 0

    def tensor(key: str) -> Tensor:
        nonlocal done
        progress(f"writing {key}", done, len(kinds))
        done += 1
        return kept[key] if key in kept else tensors[key]

    stream_safetensors(path, kinds, tensor, header)


def save_changed(
    path: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    report: Mapping[str, RepairReport],
) -> None:
    """Writes the pruned checkpoint `pruned` with some of its tensors (canonical keys) replaced, as retraining gives them.

    `report` tells of the sites they belong to.
    """
    with open_safetensors(pruned) as file:
        unknown = sorted(tensors.keys() - set(file.keys()))
        if unknown:
            raise UserError(f"{pruned} has no {unknown[0]}: these tensors belong to another model.")
        whole = {key: tensors[key] if key in tensors else file.get_tensor(key) for key in file.keys()}
        header = file.metadata()
        told = {**json.loads(header["repair"]), **{name: asdict(site) for name, site in report.items()}}
        write_safetensors(path, whole, {**header, "repair": json.dumps(told)})


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
        return self.checkpoint[key]

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
