"""The model before any cut: its tensors, read when they are asked for, its layout and its fingerprint.

dense = Dense.open(path)                         # a checkpoint file
dense = Dense.of(model.state_dict())             # tensors in memory
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import UserError
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Layout, canonical_key, read_layout

#: What the kept neuron indices of site S are called in a pruned checkpoint: `flux_poke.kept.S`.
KEPT = "flux_poke.kept."
#: The format in a pruned checkpoint's header.
PRUNED_FORMAT = "flux-poke pruned 1"


@dataclass(frozen=True)
class Dense:
    """A FLUX to cut.

    `tensors` have canonical keys, `source` is what to call it in a message, `metadata` its file's header, `path` its file's
    absolute path (empty where it is in memory).
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    fingerprint: Fingerprint
    source: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: str = ""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Dense:
        """A checkpoint file; raises `UserError` where it is none of a FLUX, or is pruned already."""
        checkpoint = Checkpoint(path)
        _require_dense(checkpoint.shapes, str(path), checkpoint.metadata)
        fingerprint = Fingerprint.of_checkpoint(checkpoint)
        return cls(checkpoint, checkpoint.layout, fingerprint, str(path), checkpoint.metadata, os.path.abspath(path))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str = "the state dict") -> Dense:
        """Tensors in memory, not quantised; raises `UserError` as `open` does."""
        _require_dense(tensors, source)
        layout = read_layout({key: tensor.shape for key, tensor in tensors.items()}, source)
        own = {canonical_key(k, layout.prefix): tensor for k, tensor in tensors.items() if k.startswith(layout.prefix)}
        return cls(own, layout, Fingerprint.of_tensors(own), source)

    def release(self) -> None:
        """Gives back what was read of the file and is no longer in use: to be called on the way through a whole model."""
        if isinstance(self.tensors, Checkpoint):
            self.tensors.release()


def _require_dense(keys: Iterable[str], source: str, header: Mapping[str, str] | None = None) -> None:
    if (header or {}).get("format") == PRUNED_FORMAT or any(key.startswith(KEPT) for key in keys):
        raise UserError(f"{source} is pruned already: plans, repairs and cuts start from the dense model.")
