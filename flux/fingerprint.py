"""Whose numbers are these? A fingerprint tells one model from another without reading it whole.

    fingerprint = Fingerprint.of_checkpoint(Checkpoint(path))
    fingerprint.matches(other)

It holds a digest of all shapes and 256 weights from fixed places. The same model in another precision matches, also where
only some of its layers are: each weight is compared at the coarser of its two precisions, with quantisation scales undone. A
fine-tune does not match.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..parsing import from_json
from .checkpoint import Checkpoint, scale_key

SAMPLES = 256


@dataclass(frozen=True)
class Fingerprint:
    """Digest of the shapes, sampled weights, and the distance to the next number in each weight's precision."""

    shapes: str
    values: tuple[float, ...]
    steps: tuple[float, ...]

    @property
    def digest(self) -> str:
        """Hexadecimal; another one for every precision, where `matches` makes no difference."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def of(
        cls, shapes: Mapping[str, Sequence[int]], row: Callable[[str, int], Tensor], scale: Callable[[str, int], float]
    ) -> Fingerprint:
        """Fingerprint of a model of `shapes` (canonical keys).

        `row(key, i)` gives row i of a weight as stored, `scale(key, i)` what its numbers are to be multiplied by.
        """
        matrices = {key: tuple(shape) for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")}
        digest = hashlib.sha256(json.dumps(sorted(matrices.items())).encode()).hexdigest()
        values, steps = [], []
        keys = sorted(matrices)
        for number in range(SAMPLES):
            key = keys[number * len(keys) // SAMPLES]
            place = int.from_bytes(hashlib.sha256(f"{key} {number}".encode()).digest()[:8], "big")
            index, column = divmod(place % math.prod(matrices[key]), matrices[key][1])
            stored, factor = row(key, index)[column], scale(key, index)
            values.append(stored.item() * factor)
            steps.append(_spacing(stored) * factor)
        return cls(digest, *(tuple(torch.tensor(numbers, dtype=torch.float32).tolist()) for numbers in (values, steps)))

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Fingerprint:
        """Fingerprint of a file; raises `UserError` where its quantisation is not one scale per tensor or row."""

        def scale(key: str, index: int) -> float:
            name = scale_key(checkpoint, key)
            return 1.0 if name is None else row_scale(checkpoint[name], index, key)

        shapes = {key: checkpoint.shape(key) for key in checkpoint}
        return cls.of(shapes, lambda key, index: checkpoint.rows(key, index, index + 1)[0], scale)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Fingerprint:
        """Fingerprint of plain (unquantised) weights in memory, canonical keys."""
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return cls.of(shapes, lambda key, index: tensors[key][index], lambda key, index: 1.0)

    def matches(self, other: Fingerprint) -> bool:
        """Whether both are of one model, perhaps in two precisions."""
        return self.shapes == other.shapes and not self._changed(other)

    def difference(self, other: Fingerprint) -> str:
        """In a few words, why `other` does not match."""
        if self.shapes != other.shapes:
            return "its layers have other shapes"
        return f"its weights differ ({self._changed(other)} of {len(self.values)} sampled ones), as a fine-tune's do"

    def _changed(self, other: Fingerprint) -> int:
        """How many of the sampled weights are not one number in two precisions."""
        if len(self.values) != len(other.values):
            return max(len(self.values), len(other.values))
        pairs = zip(self.values, self.steps, other.values, other.steps, strict=True)
        return sum(not _same(*pair) for pair in pairs)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Raises `ValueError` or `KeyError` where `text` is none."""
        found = from_json(text)
        values, steps = (tuple(map(float, found[part])) for part in ("values", "steps"))
        if len(values) != len(steps):
            raise ValueError(f"a fingerprint of {len(values)} weights and {len(steps)} precisions")
        return cls(str(found["shapes"]), values, steps)


def row_scale(scale: Tensor, index: int, key: str) -> float:
    """The factor of row `index` in a scale that has one number, or one per row; `UserError` for finer ones."""
    if scale.numel() == 1:
        return scale.float().item()
    if scale.squeeze().ndim == 1:
        return scale.float().flatten()[index].item()
    raise UserError(
        f"{key} is quantised in blocks (scale of shape {tuple(scale.shape)}); expected one per tensor or per row. "
        "Use a bf16, fp16 or fp8 file."
    )


def _same(a: float, step_a: float, b: float, step_b: float) -> bool:
    """Whether `a` and `b` may be one number, given the distance to the next one where each is stored."""
    if step_a == step_b:  # multiples of one step: the number was rounded to the same one
        return a == b
    # Each was rounded by at most half a step, and perhaps to bf16 before: half of a sixteenth of float8_e4m3fn's step.
    return abs(a - b) <= 0.54 * (step_a + step_b)


def _spacing(number: Tensor) -> float:
    """Distance from `number` to the next one in its own precision."""
    if not number.is_floating_point():
        return 1.0
    info = torch.finfo(number.dtype)
    size = abs(number.item())
    if not math.isfinite(size):
        return math.nan
    binade = 2.0 ** math.floor(math.log2(size)) if size else 0.0
    return max(binade, info.tiny) * info.eps
