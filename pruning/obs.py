"""Optimal Brain Surgeon over whole neurons: which one to cut next, if all that is left makes up for it.

    order, error = eliminate(second + lam · I, down)

Cutting neuron j and re-fitting the others costs |w_j|² / [H⁻¹]_jj; after it, the kept columns are the ridge solution, so
the running sum of costs is the certificate of `repair.py` for every number of cut neurons at once (Hassibi & Stork 1993;
Frantar & Alistarh 2022, arXiv 2208.11580, for rows of weights at a time).

Done one by one, each cut rewrites a width x width matrix. Here cuts are gathered in panels of `PANEL`: within a panel only
the columns that are asked for are brought up to date, and the matrices once at its end, as one product, without what was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import Check

#: Cuts between two updates of the whole matrices.
PANEL = 64


def eliminate(hessian: Tensor, down: Tensor, check: Check | None = None) -> tuple[Tensor, Tensor]:
    """All neurons in the order in which they are best cut, and the error that has been made after each cut.

    Args:
        hessian: H [width, width], float64: the neurons' second moment plus a ridge, positive definite.
        down: the down projection W [hidden, width].

    Returns:
        order int64 [width]; error float64 [width + 1], squared error per row after cutting the first k, from 0.
        Of equal costs, the lower index goes first.
    """
    width = len(hessian)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    gram = down.to(hessian).T @ down.to(hessian)
    alive = torch.arange(width, device=hessian.device)
    orders, costs = [], []
    while len(alive):
        chosen, cost, inverse, gram, alive = _panel(inverse, gram, alive, min(PANEL, len(alive)))
        orders.append(chosen)
        costs.append(cost)
        if check is not None:
            check()
    error = torch.cat((torch.zeros(1, dtype=torch.float64, device=hessian.device), torch.cat(costs).cumsum(0)))
    return torch.cat(orders), error


def _panel(inverse: Tensor, gram: Tensor, alive: Tensor, cuts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cuts `cuts` neurons; what is left of H⁻¹, WᵀW and the list of neurons.

    With c = H⁻¹[:, j], g = (WᵀW)[:, j] and r = c / c_j, cutting j takes c_j r rᵀ off H⁻¹ and, as w_i becomes w_i - r_i w_j,
    r qᵀ + q rᵀ with q = g - g_j r / 2 off WᵀW.
    """
    size = len(alive)
    r = inverse.new_zeros(cuts, size)
    cr, q = torch.zeros_like(r), torch.zeros_like(r)
    pivots, energies = inverse.diagonal().clone(), gram.diagonal().clone()
    cut = torch.zeros(size, dtype=torch.bool, device=inverse.device)
    chosen = torch.empty(cuts, dtype=torch.int64, device=inverse.device)
    cost = inverse.new_empty(cuts)
    for n in range(cuts):
        costs = (energies / pivots).masked_fill_(cut, torch.inf)
        j = costs.argmin()
        chosen[n], cost[n] = j, costs[j]
        column = inverse[j] - r[:n, j] @ cr[:n]
        row = gram[j] - r[:n, j] @ q[:n] - q[:n, j] @ r[:n]
        pivot = column[j]
        r[n] = column / pivot
        cr[n] = column
        q[n] = row - row[j] / 2 * r[n]
        pivots -= column * r[n]
        energies -= 2 * r[n] * q[n]
        energies.clamp_(min=0)
        cut[j] = True
        pivots[j] = 1.0
    left = (~cut).nonzero().squeeze(1)
    r, cr, q = r[:, left], cr[:, left], q[:, left]
    inverse = inverse[left][:, left].addmm_(r.T, cr, alpha=-1.0)
    gram = gram[left][:, left].addmm_(r.T, q, alpha=-1.0).addmm_(q.T, r, alpha=-1.0)
    return alive[chosen], cost, inverse, gram, alive[left]
