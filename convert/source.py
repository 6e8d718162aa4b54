"""A FLUX on disk, in whatever layout, as tensors under the checkpoint's own names, each read when it is asked for.

    source.kinds                                     # {"img_in.weight": ("BF16", (3072, 64)), ...}
    source.tensor("img_in.weight")
    require_whole(source)                            # all tensors of the model and no others
    plain(source)                                    # the same without quantisation

Every layout is read into this (canonical keys), and written from it; so a layout is known to its own module alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.checkpoint import Checkpoint, require_finite, scale_key
from ..flux.fingerprint import Fingerprint, row_scale
from ..flux.layout import FAMILY_NAMES, Layout
from ..flux.model import Flux
from ..flux.weights import BESIDE_WEIGHT, full_precision, require_plain
from ..pruning.checkpoint import WhenAsked

Form = Literal["ComfyUI", "diffusers", "GGUF", "orbax"]
#: A tensor's type in the words of the safetensors format, and its shape.
Kind = tuple[str, tuple[int, ...]]
#: What beside the model's own tensors a file of ours holds: kept neurons, what LoRAs need.
OURS = "flux_poke."
#: What was done, to how many tensors, and one of them: rows of the table that is printed.
Change = tuple[str, int, str]


@dataclass(frozen=True)
class Source:
    """A FLUX on disk.

    Attributes:
        kinds: type and shape by canonical key, of the model's tensors and of ours.
        read: gives a tensor of `kinds`; row: one row of a matrix, as stored, without reading the others.
        metadata: what the header of a ComfyUI file holds.
        changes: what reading does to the tensors. stored: how many there are on disk, of `size` bytes in so many `files`.
        rounding: relative squared error of quantised weights, where the file tells.
    """

    path: Path
    form: Form
    layout: Layout
    kinds: Mapping[str, Kind]
    read: Callable[[str], Tensor]
    row: Callable[[str, int], Tensor]
    metadata: Mapping[str, str]
    changes: tuple[Change, ...]
    stored: int
    size: int
    files: int = 1
    rounding: float | None = None

    def tensor(self, key: str) -> Tensor:
        """A tensor; raises `UserError` where it holds numbers that are not finite."""
        return require_finite(self.read(key), f"{self.path}: {key}")

    @property
    def own(self) -> dict[str, Kind]:
        """The model's own tensors."""
        return {key: kind for key, kind in self.kinds.items() if not key.startswith(OURS)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.own.values())

    def fingerprint(self) -> Fingerprint:
        """Of the model, the same in every layout."""
        shapes = {key: shape for key, (_, shape) in self.own.items()}
        return Fingerprint.of(shapes, self.row, lambda key, index: _scale(self, key, index))


def of_checkpoint(path: Path) -> Source:
    """A file in ComfyUI's layout, dense or pruned; raises `UserError` where it is no FLUX or lacks tensors of one."""
    checkpoint = Checkpoint(path)
    kinds = {key: (checkpoint.dtype(key), checkpoint.shape(key)) for key in checkpoint}
    others = [key for key in checkpoint.shapes if not key.startswith(checkpoint.layout.prefix)]

    def read(key: str) -> Tensor:
        checkpoint.release()
        return checkpoint[key]

    return Source(
        path, "ComfyUI", checkpoint.layout, kinds, read, lambda key, index: checkpoint.rows(key, index, index + 1)[0],
        checkpoint.metadata, (("left out, not of the transformer", len(others), others[0]),) if others else (),
        len(checkpoint.shapes), path.stat().st_size,
    )  # fmt: skip


def plain(source: Source) -> Source:
    """The same with weights as numbers that stand for themselves: those with a scale become bf16.

    Raises `UserError` where a weight is quantised in blocks.
    """
    kinds = source.kinds
    scaled = dict.fromkeys(key for key in kinds if key.endswith(".weight") and scale_key(kinds, key))
    beside = {key for key in kinds if key == "scaled_fp8" or key.rpartition(".")[2] in BESIDE_WEIGHT}
    if not beside:
        return source
    tensors = WhenAsked(kinds, source.read)
    for key in kinds:
        if key.endswith(".weight"):
            require_plain(tensors, key)
    metadata = {key: value for key, value in source.metadata.items() if key != "_quantization_metadata"}
    return replace(
        source,
        kinds={key: ("BF16", kind[1]) if key in scaled else kind for key, kind in kinds.items() if key not in beside},
        read=lambda key: full_precision(tensors, key).bfloat16() if key in scaled else source.read(key),
        row=lambda key, index: (source.row(key, index).float() * _scale(source, key, index)).bfloat16(),
        metadata=metadata,
        changes=(*source.changes, ("scales undone, in bf16", len(scaled), next(iter(scaled), ""))),
    )


def _scale(source: Source, key: str, index: int) -> float:
    """What row `index` of a weight is to be multiplied by."""
    name = scale_key(source.kinds, key)
    return 1.0 if name is None else row_scale(source.read(name), index, key)


def require_whole(source: Source) -> None:
    """Raises `UserError` where tensors of the model are missing, of another shape, or not known here; of Chroma nothing is
    asked."""
    if source.layout.family == "chroma":
        return
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in Flux(source.layout).state_dict().items()}
    found = {key: shape for key, (_, shape) in plain(source).own.items()}
    what = f"a {FAMILY_NAMES[source.layout.family]} transformer"
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(
            f"{source.path} is incomplete: it lacks {len(missing)} tensors of {what}, first {missing[0]}. Copy or "
            "download it again."
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{source.path} has {len(unknown)} tensors that {what} does not have, first {', '.join(unknown[:3])}: what they do "
            "would be lost, so nothing is converted."
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise UserError(f"{source.path} has {key} of the shape {found[key]}, expected {shape}: the file is damaged.")
