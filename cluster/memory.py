"""How much main memory ranking, repairing and retraining hold at most: what Ray's scheduler is told.

    ranking_bytes(site, hidden)                      # FLUX.1: 5.8 GB in a double block, 8.6 GB in a single one
    retraining_bytes(dense, group, data)

By how many values the down projection reads (R: neurons, in single blocks attention channels too): each covariance is R x R
numbers in float64, and at the peak there are nearly four in memory. Measured on a CPU: `benchmarks/cluster_memory.py`,
benchmarks/README.md. On a GPU most of it lies there, and main memory holds less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..flux.blocks import sites_at
from ..flux.layout import Layout, Site
from ..pruning.dense import Dense
from ..pruning.surgery import shape_of
from ..recording.store import HiddenStates
from ..retrain.layers import Data

#: Bytes that Python holds with torch and Ray, and for each pair of values that a down projection reads.
PYTHON, PAIR = 0.7e9, 32.0
#: Numbers in float32 that training keeps of each weight: itself, dense, gradient, two moments, the best so far, the update's.
COPIES = 8


def ranking_bytes(site: Site, hidden: int) -> float:
    """Of ranking or repairing an MLP by rows, which hold the same at their peaks."""
    return PYTHON + PAIR * site.regressors**2 + 4 * _weights(site, hidden)


def truncating_bytes(layout: Layout) -> float:
    """Of truncating a modulation layer: its weight in float64, and square matrices of what all of them read."""
    hidden = layout.hidden
    return PYTHON + 8 * 6 * hidden**2 * 3 + 8 * 4 * hidden**2


def retraining_bytes(dense: Dense, group: Iterable[int], data: Data) -> float:
    """Of training a group of blocks: what is kept of every weight, the closed form of an MLP, and of rows all that there are
    of it."""
    layout = dense.layout
    sites = [site for index in group for site in sites_at(layout, index)]
    closed = max(PAIR * site.regressors**2 for site in sites)
    if isinstance(data, HiddenStates):
        rows = max(data.count(site.name) * ((site.up_row and 2) or 1) * layout.hidden * 4 for site in sites)
        return PYTHON + rows + max(closed, max(4 * COPIES * _weights(site, layout.hidden) for site in sites))
    paths = tuple(f"{site.block}." for site in sites)
    weights = sum(math.prod(shape_of(dense.tensors, key)) for key in dense.tensors if key.startswith(paths))
    return PYTHON + max(closed, 4 * COPIES * weights)


def _weights(site: Site, hidden: int) -> int:
    """Numbers of an MLP's two projections."""
    return hidden * (site.width * (3 if site.gated else 2) + site.down_column)
