"""The GPU's way to `statistics.partial_sums`: every activation is read once for all three sums."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # pragma: no cover - platforms without Triton take the eager way
    AVAILABLE = False

log = logging.getLogger("flux-poke")

COLUMNS = 128
ROWS = 32

if AVAILABLE:

    @triton.jit
    def _partial_sums(
        h, gate, keep, fires, total, squares, tokens, width, h_stride, gate_stride,
        gated: tl.constexpr, masked: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * columns + tl.arange(0, columns)
        inside = column < width
        count = tl.zeros((columns,), dtype=tl.float32)
        first = tl.zeros((columns,), dtype=tl.float32)
        second = tl.zeros((columns,), dtype=tl.float32)
        for start in range(0, tile, rows):
            row = tl.program_id(1) * tile + start + tl.arange(0, rows)
            used = row < tokens
            if masked:
                used = used & (tl.load(keep + row, mask=used, other=0) != 0)
            where = used[:, None] & inside[None, :]
            x = tl.load(h + row.to(tl.int64)[:, None] * h_stride + column[None, :], mask=where, other=0.0).to(tl.float32)
            first += tl.sum(x, 0)
            second += tl.sum(x * x, 0)
            if gated:
                x = tl.load(gate + row.to(tl.int64)[:, None] * gate_stride + column[None, :], mask=where, other=0.0).to(
                    tl.float32
                )
            count += tl.sum((x > 0).to(tl.float32), 0)
        out = tl.program_id(1).to(tl.int64) * width + column
        tl.store(fires + out, count, mask=inside)
        tl.store(total + out, first, mask=inside)
        tl.store(squares + out, second, mask=inside)


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles here, tried once: it may be installed without a C compiler, or for newer GPUs than this one."""
    if not AVAILABLE:
        return False
    try:
        partial_sums(torch.zeros(ROWS, COLUMNS, dtype=dtype, device=device))
    except Exception as error:  # of the compiler, the linker or the driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("Triton cannot be used (%s): neurons are counted with torch, which takes longer.", reason)
        return False
    return True


def partial_sums(h: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `statistics.partial_sums`; h and gate [tokens, width] with contiguous rows, on a GPU."""
    from .statistics import TILE

    tokens, width = h.shape
    tiles = triton.cdiv(tokens, TILE)
    partial = torch.empty(3, tiles, width, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):  # Triton launches on the current one
        _partial_sums[(triton.cdiv(width, COLUMNS), tiles)](
            h, h if gate is None else gate, h if keep is None else keep.view(torch.uint8), partial[0], partial[1], partial[2],
            tokens, width, h.stride(0), h.stride(0) if gate is None else gate.stride(0),
            gated=gate is not None, masked=keep is not None, tile=TILE, rows=ROWS, columns=COLUMNS,
        )  # fmt: skip
    return partial[0], partial[1], partial[2]
