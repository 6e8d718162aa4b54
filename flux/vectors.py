"""What FLUX.1's modulation layers read, sampled without running a block.

    for sigma, s in modulation_inputs(model, layout, pooled):        # s [guidances * prompts, hidden]
        model.double_blocks[0].img_mod.lin(s)

All modulation layers read one vector, s = silu(vec), and vec is a sum of three embeddings: of the noise level, of the distilled
guidance and of the pooled text. So it can be had for any of them from the embedders alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layout import Layout
from .model import MLPEmbedder, timestep_embedding
from .weights import full_precision

#: The module that reads pooled texts; what they are recorded as is named after it.
VECTOR = "vector_in"
#: Distilled guidance as people use it, from 1 to 10; by most 2.5 to 4.
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0)
#: Noise levels, evenly from the last step of a run of 64 to its first.
SIGMAS = tuple((index + 1) / 64 for index in range(64))


@torch.no_grad()
def modulation_inputs(
    model: Any, layout: Layout, pooled: Tensor, sigmas: Sequence[float] = SIGMAS, guidances: Sequence[float] = GUIDANCES
) -> Iterator[tuple[float, Tensor]]:
    """By noise level, s [combinations, hidden] for all combinations of `pooled` and, where the model takes it, of `guidances`.

    Args:
        model: `Flux`, `Embedders`, or a host's FLUX.1 of `layout`.
        pooled: pooled texts [prompts, vector width], on the model's device and in the precision it computes in.
    """

    def embedded(embedder: Any, values: Sequence[float]) -> Tensor:
        return embedder(timestep_embedding(torch.tensor(values, device=pooled.device), 256).to(pooled.dtype))

    others = model.vector_in(pooled)
    if layout.guidance:
        others = (others + embedded(model.guidance_in, guidances)[:, None]).flatten(0, 1)
    for sigma in sigmas:
        yield sigma, F.silu(embedded(model.time_in, [sigma]) + others)


class Embedders(nn.Module):
    """The embedders of a FLUX.1 alone, in float32."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.time_in = MLPEmbedder(256, layout.hidden, bias=True)
        self.vector_in = MLPEmbedder(layout.vector or 0, layout.hidden, bias=True)
        if layout.guidance:
            self.guidance_in = MLPEmbedder(256, layout.hidden, bias=True)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], layout: Layout, device: torch.device | str = "cpu") -> Embedders:
        """From a checkpoint (canonical keys)."""
        with torch.device("meta"):
            model = cls(layout)
        weights = {
            key: full_precision(tensors, key, device) if key.endswith(".weight") else tensors[key].to(device).float()
            for key in model.state_dict()
        }
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False)
