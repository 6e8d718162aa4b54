"""Optimal Brain Surgeon over whole neurons: which one to cut next, if all that is left makes up for it.

    order, error = eliminate(second + lam * I, down^T down)

Cutting neuron j and re-fitting the others costs |w_j|^2 / [H^-1]_jj; after it, the kept columns are the ridge solution, so
the running sum of costs is the certificate of `repair.py` for every number of cut neurons at once (Hassibi & Stork 1993;
Frantar & Alistarh 2022, arXiv 2208.11580, for rows of weights at a time).

Done one by one, each cut rewrites two width x width matrices. Here cuts are gathered in panels of `PANEL`: within a panel
only the columns that are asked for are brought up to date, and the matrices once at its end, as one product each and below
the diagonal alone. The inverse and all updates together take 2 width^3 operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..progress import Progress, part, silent
from .symmetric import add_product, invert, row, select

#: Cuts between two updates of the whole matrices.
PANEL = 64
#: Share of a matrix's neurons that must be left for it to be kept as it is.
COMPACT = 0.875


def eliminate(hessian: Tensor, gram: Tensor, progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """All neurons in the order in which they are best cut, and the error that has been made after each cut.

    Args:
        hessian: H [width, width], float64: the neurons' second moment plus a ridge, positive definite. It is overwritten.
        gram: W^T W [width, width] of the down projection W [hidden, width], float64. It is overwritten.

    Returns:
        order int64 [width]; error float64 [width + 1], squared error per row after cutting the first k, from 0.
        Of equal costs, the lower index goes first.
    """
    width = len(hessian)
    invert(inverse := hessian, part(progress, 0, 2))  # half of the operations
    names, cut = torch.arange(width, device=hessian.device), torch.zeros(width, dtype=torch.bool, device=hessian.device)
    orders, costs = [], []
    for start in range(0, width, PANEL):
        chosen, cost = _panel(inverse, gram, cut, min(PANEL, width - start))
        orders.append(names[chosen])
        costs.append(cost)
        left = width - start - len(chosen)
        if left < COMPACT * len(names):  # leave out what was cut
            alive = (~cut).nonzero().squeeze(1)
            inverse, gram = select(inverse, alive, out=inverse), select(gram, alive, out=gram)
            names, cut = names[alive], cut[alive]
        progress("ordering neurons", width + start + len(chosen), 2 * width)
    error = torch.cat((torch.zeros(1, dtype=torch.float64, device=hessian.device), torch.cat(costs).cumsum(0)))
    return torch.cat(orders), error


def _panel(inverse: Tensor, gram: Tensor, cut: Tensor, cuts: int) -> tuple[Tensor, Tensor]:
    """Cuts `cuts` more neurons than those in `cut`; their indices and costs. All three arguments are updated in place.

    With c = H^-1[:, j], g = (W^T W)[:, j] and r = c / c_j, cutting j takes c_j r r^T off H^-1 and, as w_i becomes
    w_i - r_i w_j, r q^T + q r^T with q = g - g_j r / 2 off W^T W.
    """
    r = inverse.new_zeros(cuts, len(inverse))
    cr, q = torch.zeros_like(r), torch.zeros_like(r)
    pivots, energies = inverse.diagonal().clone(), gram.diagonal().clone()
    chosen, cost = [], []
    for n in range(cuts):
        costs = (energies.clamp(min=0) / pivots).masked_fill_(cut, torch.inf)
        j = int(costs.argmin())
        chosen.append(j)
        cost.append(costs[j])
        c = row(inverse, j) - r[:n, j] @ cr[:n]
        g = row(gram, j) - r[:n, j] @ q[:n] - q[:n, j] @ r[:n]
        r[n] = c / c[j]
        cr[n] = c
        q[n] = g - g[j] / 2 * r[n]
        pivots -= c * r[n]
        energies -= 2 * r[n] * q[n]
        cut[j] = True
    add_product(inverse, r, cr, alpha=-1.0)
    add_product(gram, torch.cat((r, q)), torch.cat((q, r)), alpha=-1.0)
    return torch.tensor(chosen, device=inverse.device), torch.stack(cost)
