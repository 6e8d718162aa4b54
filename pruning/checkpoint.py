"""A pruned checkpoint: one file that needs no other, and tells what was done to it.

    save_pruned("flux1-dev-8b.safetensors", cut)     # or a model with retrained layers in it
    save_weights("with-lora.safetensors", tensors, plan, report)     # what is pruned already
    pruned = Pruned.open("flux1-dev-8b.safetensors")
    model = Flux.load(Plain(pruned.tensors))         # flux/weights.py
    pruned.plan.table(), pruned.report

The reduced tensors stand under their usual names; `flux_poke.kept.S` int32 are the kept neurons of site S. A LoRA needs
`flux_poke.fold.S.offset` and, where asked for, `.matrix` to follow cut neurons, and `flux_poke.vectors.mean` and `.spread`
(what modulation layers read, `low_rank.py`) to follow truncated layers (`lora.py`). The header holds the plan, the repair
with its held-out error by site, a certificate (`certificate.py`), and the fingerprint of the dense model, beside what the dense
file's header held.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..files import check_replaces, kind_of, stream_safetensors
from ..flux.checkpoint import Checkpoint, open_safetensors, require_finite, require_format, scale_key
from ..flux.layout import FAMILY_NAMES, Layout, canonical_key, read_layout
from ..flux.weights import stored_like
from ..parsing import from_json
from ..progress import Progress, part, silent
from .certificate import certificate, certificate_text, read_certificate
from .dense import KEPT, PRUNED_FORMAT, Dense
from .low_rank import Vectors
from .plan import PruningPlan
from .precision import ENTRIES, require_precision, rounded_layers
from .refit import Fold, RepairReport
from .repair import report_table
from .rounded import Rounded
from .surgery import Changed

#: What a header says, under which key, to those who wonder at the shapes: ComfyUI's own loader expects others.
LOAD_WITH = "flux_poke.load_with"
LOADED_BY = "Opens in Flux Poke's Load Pruned Checkpoint; in Load Diffusion Model, it ends in a size mismatch."
#: Keys of a header that hold the graph of another file's making.
GRAPH = ("workflow", "prompt")

FOLD, VECTORS = "flux_poke.fold.", "flux_poke.vectors."
#: Directions of what modulation layers read that are stored, for each rank of the layer that has the most.
DIRECTIONS = 2
Value = TypeVar("Value")


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint. `tensors` are the model's alone, canonical keys, each read when it is asked for."""

    path: Path
    tensors: Mapping[str, Tensor]
    layout: Layout
    plan: PruningPlan
    report: Mapping[str, RepairReport]
    folds: Mapping[str, Fold]
    vectors: Vectors | None
    certificate: Mapping[str, Any]
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
                report = {name: RepairReport.from_header(site) for name, site in from_json(header["repair"]).items()}
                certified = read_certificate(header.get("certificate", "{}"))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is a damaged pruned checkpoint ({error}): copy it again or make it again.") from error
        checkpoint = Checkpoint(path)
        _require_widths(checkpoint.layout, plan, str(path))
        return cls(
            path=Path(path),
            tensors=WhenAsked(
                [key for key in checkpoint if not key.startswith("flux_poke.")],
                lambda key: require_finite(checkpoint[key], key),
            ),
            layout=checkpoint.layout,
            plan=plan,
            report=report,
            folds=WhenAsked(
                kept, lambda name: Fold(*(checkpoint.get(f"{FOLD}{name}.{part}") for part in ("matrix", "offset")))
            ),
            vectors=_vectors(checkpoint),
            certificate=certified,
            metadata=header,
        )


def save_pruned(
    path: str | os.PathLike[str], changed: Changed, fold: bool = False, progress: Progress = silent,
    precision: str = "stored", graph: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Writes a cut or replaced checkpoint as a whole, one tensor in memory at a time, in `precision` (`precision.py`).

    `fold`: also write what exact conversion of LoRAs needs after affine repair: [cut, kept] numbers in bf16 per MLP, on disk
    only. The header also holds the `graph` that made the file. Raises `UserError`, before anything is computed, where a file at
    `path` is not a pruned checkpoint, and without a file being left where a tensor holds a number that is not finite.
    """
    check_replaces(path, PRUNED_FORMAT)
    changed = changed if require_precision(precision) == "stored" else Rounded(changed, precision)
    changed.dense.release()
    report = changed.work_out(part(progress, 0, 2), fold)
    kinds = {key: changed.kind(key) for key in changed}
    for name, kept in changed.plan.kept.items():
        site, method = changed.dense.layout.site(name), report[name].method
        cut, matrix = site.width - len(kept), fold and method == "affine"
        if matrix:
            kinds[f"{FOLD}{name}.matrix"] = "BF16", (cut, site.down_column + len(kept))
        if site.biased and (matrix or method == "bias"):
            kinds[f"{FOLD}{name}.offset"] = "F32", (cut,)

    extra: dict[str, Tensor] = {}
    if (vectors := changed.vectors) is not None:
        spread = vectors.spread[:, -DIRECTIONS * max(changed.plan.ranks.values()) :]  # the last ones vary most
        extra = {f"{VECTORS}mean": vectors.mean.float().cpu(), f"{VECTORS}spread": spread.float().cpu().contiguous()}
        kinds |= {key: kind_of(value) for key, value in extra.items()}

    def tensor(key: str) -> Tensor:
        changed.dense.release()
        if key in extra:
            return extra[key]
        if not key.startswith(FOLD):
            return changed[key]
        name, _, what = key.removeprefix(FOLD).rpartition(".")
        return getattr(changed.fold(name, matrix=what == "matrix"), what)

    header = {**_passed_on(changed.dense, changed.plan), **(graph or {})}
    header["certificate"] = json.dumps(certificate(changed, report, precision))
    if precision == "bf16":
        header.pop("_quantization_metadata", None)
    _write(path, kinds, tensor, changed.plan, report, header, part(progress, 1, 2))
    if isinstance(changed, Rounded):
        changed.forget()


def overhead(dense: Dense, plan: PruningPlan, precision: str = "stored") -> int:
    """About how many bytes a pruned file takes beside the model's own tensors: header, kept indices, what LoRAs need."""
    entries = len(dense.tensors) + 2 * len(plan.ranks) + 2 * len(plan.kept)
    header = sum(map(len, {**dense.metadata, **plan.header()}.values()))
    kept = sum(map(len, plan.kept.values()))
    spread = 1 + DIRECTIONS * max(plan.ranks.values()) if plan.ranks else 0
    header += ENTRIES * len(rounded_layers(dense, precision))
    return header + 110 * entries + 200 * len(plan.kept) + 4 * (kept + spread * dense.layout.hidden)


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
    changed = dict(tensors)
    for key in tensors:
        if (scale := scale_key(found.tensors, key)) is not None:
            rounded, new = stored_like(tensors[key].float(), found.tensors, key)
            changed |= {key: rounded} if new is None else {key: rounded, scale: new}
    save_weights(path, {**found.tensors, **changed}, found.plan, {**found.report, **report}, metadata=found.metadata)


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
    header = {**metadata, **plan.header(), "format": PRUNED_FORMAT, "repair": repaired, LOAD_WITH: LOADED_BY}
    written = itertools.count(1)

    def next_tensor(key: str) -> Tensor:
        value = kept[key] if key in kept else require_finite(tensor(key), key)
        progress(f"writing {key}", next(written), len(kinds) + len(kept))
        return value

    stream_safetensors(path, {**kinds, **{key: kind_of(indices) for key, indices in kept.items()}}, next_tensor, header)


def _require_widths(layout: Layout, plan: PruningPlan, source: str) -> None:
    """Raises `UserError` where the MLPs of a pruned model are not as wide as `plan` leaves them, or its modulation layers of
    another rank."""
    if layout.ranks != plan.ranks:
        raise UserError(
            f"{source} has modulation layers of the ranks {dict(layout.ranks)}, and its plan leaves {dict(plan.ranks)}: they "
            "do not belong together."
        )
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
    pruned = Pruned.open(path) if checkpoint.metadata.get("format") == PRUNED_FORMAT else None
    parameters = sum(torch.Size(shape).numel() for key, shape in checkpoint.shapes.items() if not key.startswith("flux_poke."))
    said = (
        f"{FAMILY_NAMES[layout.family]}{', pruned' if pruned else ''}: {layout.depth} double and {layout.depth_single} single "
        f"blocks, hidden {layout.hidden}, {layout.neurons:,} MLP neurons, {parameters:,} parameters"
    )
    if pruned is not None:
        certified = [certificate_text(pruned.certificate)] if pruned.certificate else []
        return "\n".join([said, *certified, pruned.plan.table(), report_table(pruned.report)])
    widths = sorted({site.width for site in layout.sites}, reverse=True)
    return f"{said}\nMLP widths: {', '.join(f'{width:,}' for width in widths)}"


class WhenAsked(Mapping[str, Value]):
    """Values by name, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Value]):
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Value:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _vectors(checkpoint: Checkpoint) -> Vectors | None:
    mean, spread = (checkpoint.get(f"{VECTORS}{part}") for part in ("mean", "spread"))
    return None if mean is None or spread is None else Vectors(mean.double(), spread.double())


def _passed_on(dense: Dense, plan: PruningPlan) -> dict[str, str]:
    """The dense file's header; names of quantised layers lose the prefix that the keys lose, and truncated layers are not
    quantised any more."""
    header = {key: value for key, value in dense.metadata.items() if key not in ("format", *GRAPH)}
    quantised = header.get("_quantization_metadata")
    if quantised is not None:
        found = from_json(quantised)
        thin = {dense.layout.site(name).modulation for name in plan.ranks}
        layers = {canonical_key(name, dense.layout.prefix): facts for name, facts in found.get("layers", {}).items()}
        found["layers"] = {name: facts for name, facts in layers.items() if name not in thin}
        header["_quantization_metadata"] = json.dumps(found)
    return header
