"""Large symmetric matrices, at half the work: only the blocks on and below the diagonal are computed.

    add_product(matrix, left, right, alpha=-1.0)     # matrix -= left^T right
    row(matrix, 17)
    mirror(matrix)                                   # all of it is right again

Between `add_product` and `mirror`, row i of a matrix is right up to the end of its own block of `BLOCK` rows, and what lies
to the right of that is not read. All changes are made in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..progress import Progress, silent

#: Rows that are worked on together.
BLOCK = 1024
#: Rows that `invert` sweeps at once: enough for matrix products to run at full speed.
SWEPT = 256


def blocks(size: int, of: int) -> Iterator[slice]:
    """Neighbouring ranges of at most `of` that cover 0 to size."""
    for start in range(0, size, of):
        yield slice(start, min(start + of, size))


def add_product(matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """matrix += alpha * left^T right, a symmetric product of left and right [k, size], which may be of lower precision."""
    for rows in blocks(len(matrix), BLOCK):
        a, b, lower = left[:, rows].T, right[:, : rows.stop], matrix[rows, : rows.stop]
        if left.dtype == matrix.dtype:
            lower.addmm_(a, b, alpha=alpha)
        else:
            lower.add_(a @ b, alpha=alpha)


def row(matrix: Tensor, index: int) -> Tensor:
    """One row [size], a new tensor."""
    end = (index // BLOCK + 1) * BLOCK
    return torch.cat((matrix[index, :end], matrix[end:, index]))


def mirror(matrix: Tensor) -> Tensor:
    """Copies what is below the diagonal to above it; `matrix`."""
    for rows in blocks(len(matrix), BLOCK):
        matrix[: rows.start, rows] = matrix[rows, : rows.start].T
    return matrix


def select(matrix: Tensor, kept: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows and columns `kept` (ascending) [kept, kept]: a new matrix, or the first rows and columns of `out`, which may be
    `matrix` itself."""
    small = matrix.new_zeros(len(kept), len(kept)) if out is None else out[: len(kept), : len(kept)]
    for rows in blocks(len(kept), BLOCK):
        small[rows, : rows.stop] = matrix[kept[rows]].index_select(1, kept[: rows.stop])
        own = small[rows, rows]  # above its diagonal may be what stood to the right of a block
        own.copy_(own.tril() + own.tril(-1).T)
    return small


def quadratic(rows: Tensor, matrix: Tensor) -> float:
    """tr(R M R^T) of `rows` R [k, size], in whose precision products are taken."""
    total = 0.0
    for block in blocks(len(matrix), BLOCK):
        beside, own = matrix[block, : block.start].to(rows), matrix[block, block].to(rows)
        read = (rows[:, : block.start] @ beside.T).mul_(2).addmm_(rows[:, block], own)
        total += read.mul_(rows[:, block]).sum(dtype=torch.float64).item()
    return total


def invert(matrix: Tensor, progress: Progress = silent) -> None:
    """matrix^-1 of a positive definite one, in place, by sweeping it block by block (Goodnight 1979): size^3 operations.

    Raises `torch.linalg.LinAlgError` where it is not positive definite.
    """
    size = len(matrix)
    for swept in blocks(size, SWEPT):
        begin = swept.start // BLOCK * BLOCK
        end = min(begin + BLOCK, size)
        across = torch.cat((matrix[swept, :end], matrix[end:, swept].T), dim=1)
        pivot = torch.cholesky_inverse(torch.linalg.cholesky(across[:, swept]))
        solved = pivot @ across
        add_product(matrix, across, solved, alpha=-1.0)
        matrix[swept, :end] = solved[:, :end]
        matrix[begin:, swept] = solved[:, begin:].T
        matrix[swept, swept] = -pivot
        progress("inverting", swept.stop, size)
    matrix.neg_()


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products in float32: TF32 (10 bits) is off while this lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
