"""Optimal Brain Surgeon over whole neurons: which one to cut next, if all that is left makes up for it.

    order, error = eliminate(second + lam * I, down)

Cutting neuron j and re-fitting the others costs |w_j|^2 / [H^-1]_jj; after it, the kept columns are the ridge solution, so
the running sum of costs is the certificate of `repair.py` for every number of cut neurons at once (Hassibi & Stork 1993;
Frantar & Alistarh 2022, arXiv 2208.11580, for rows of weights at a time).

Done one by one, each cut rewrites a width x width and a hidden x width matrix. Here `PANEL` cuts at a time are chosen among the
`POOL` neurons that are cheapest then, greedily on the small matrices of these; only after them the large ones are brought up
to date, by one product each and below the diagonal alone. Costs are exact, and so is the order unless a neuron becomes one of
the cheapest within a panel that was none before it. With hidden = width / 4, all of it takes 1.6 width^3 operations, width^3
of them to invert, and a GPU is waited for once a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..progress import Progress, part, silent
from .symmetric import add_product, invert, mirror, row, select

#: Cuts between two updates of the large matrices, and how many neurons they are chosen among.
PANEL, POOL = 64, 256
#: Share of a matrix's neurons that must be left for it to be kept as it is.
COMPACT = 0.875


def eliminate(hessian: Tensor, down: Tensor, progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """All neurons in the order in which they are best cut, and the error that has been made after each cut.

    Args:
        hessian: H [width, width], the neurons' second moment plus a ridge, positive definite. It is overwritten. Its precision
            is that of the work; the order hardly depends on it (`scores.obs`).
        down: the down projection W [hidden, width].

    Returns:
        order int64 [width]; error float64 [width + 1], squared error per row after cutting the first k, from 0.
        Of equal costs, the lower index goes first.

    Raises `torch.linalg.LinAlgError` where H is not positive definite, or too nearly so for its precision.
    """
    width = len(hessian)
    invert(inverse := hessian, part(progress, 0, 2))
    rows = down.T.to(inverse, memory_format=torch.contiguous_format, copy=True)
    names, cut = torch.arange(width, device=hessian.device), torch.zeros(width, dtype=torch.bool, device=hessian.device)
    orders, costs = [], []
    for start in range(0, width, PANEL):
        chosen, cost = _panel(inverse, rows, cut, min(PANEL, width - start))
        orders.append(names[chosen])
        costs.append(cost)
        left = width - start - len(chosen)
        if left < COMPACT * len(names):  # leave out what was cut
            alive = (~cut).nonzero().squeeze(1)
            inverse, rows = select(inverse, alive, out=inverse), rows[alive]
            names, cut = names[alive], cut[alive]
        progress("ordering neurons", width + start + len(chosen), 2 * width)
    return torch.cat(orders), torch.cat((torch.zeros(1, dtype=torch.float64), *costs)).cumsum(0).to(hessian.device)


def _panel(inverse: Tensor, rows: Tensor, cut: Tensor, cuts: int) -> tuple[Tensor, Tensor]:
    """Cuts `cuts` more neurons than those in `cut`; their indices, and costs on the CPU. All three are updated in place.

    Cutting the neurons J takes X_:J X_JJ^-1 X_J: off X = H^-1, and X_:J X_JJ^-1 W_J off the rows W of the down projection.
    """
    cost = (torch.linalg.vector_norm(rows, dim=1).square_() / inverse.diagonal()).masked_fill_(cut, torch.inf)
    pool = cost.argsort(stable=True)[: min(POOL, int((~cut).sum()))].sort().values
    chosen, costs = _cheapest(mirror(select(inverse, pool)).double().cpu(), (rows[pool] @ rows[pool].T).double().cpu(), cuts)
    chosen = pool[chosen.to(pool.device)]
    across = torch.stack([row(inverse, int(j)) for j in chosen.tolist()])
    solved = torch.cholesky_solve(across, torch.linalg.cholesky(across[:, chosen]))
    rows.addmm_(solved.T, rows[chosen], alpha=-1.0)
    add_product(inverse, across, solved, alpha=-1.0)
    cut[chosen] = True
    return chosen, costs


def _cheapest(inverse: Tensor, gram: Tensor, cuts: int) -> tuple[Tensor, Tensor]:
    """The textbook on a few neurons: cut the cheapest, correct all others in `inverse` [few, few] and `gram` W^T W; over and
    over. Indices and costs of those that were cut."""
    cut = torch.zeros(len(inverse), dtype=torch.bool)
    chosen, costs = [], []
    for _ in range(cuts):
        pivots = inverse.diagonal()
        cost = (gram.diagonal().clamp(min=0) / pivots).masked_fill_(cut, torch.inf)
        j = int(cost.argmin())
        if not pivots[j] > 0:
            raise torch.linalg.LinAlgError("the neurons' second moment is not positive definite")
        chosen.append(j)
        costs.append(cost[j])
        column, g = inverse[j].clone(), gram[j].clone()
        r = column / column[j]
        inverse.addr_(column, r, alpha=-1.0)
        q = g - g[j] / 2 * r
        gram.addr_(r, q, alpha=-1.0).addr_(q, r, alpha=-1.0)
        cut[j] = True
    return torch.tensor(chosen), torch.stack(costs)
