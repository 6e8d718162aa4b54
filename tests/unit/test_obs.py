"""pruning/obs.py against the plain loop, and against ridge regression on the sets it chooses."""

import numpy as np
import pytest
import torch
from flux_poke.pruning import obs, symmetric
from flux_poke.pruning.moments import Moments
from flux_poke.pruning.obs import PANEL, eliminate
from flux_poke.pruning.scores import obs as rank_by_obs


def problem(width: int, hidden: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A correlated second moment with a ridge [width, width], and a down projection [hidden, width], float64."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    h = h @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return h.T @ h / len(h) + 0.1 * torch.eye(width, dtype=torch.float64), torch.randn(
        hidden, width, generator=generator, dtype=torch.float64
    )


def plain_loop(hessian: np.ndarray, down: np.ndarray) -> tuple[list[int], list[float]]:
    """The textbook: invert, cut the cheapest, correct all others, downdate the inverse by rank one; over and over."""
    inverse, w = np.linalg.inv(hessian), down.copy()
    alive, order, costs = list(range(len(hessian))), [], []
    while alive:
        cost = [(w[:, j] ** 2).sum() / inverse[j, j] for j in alive]
        j = alive[int(np.argmin(cost))]
        order.append(j)
        costs.append(min(cost))
        column = inverse[:, j].copy()
        w -= np.outer(w[:, j], column) / column[j]
        inverse -= np.outer(column, column) / column[j]
        alive.remove(j)
    return order, costs


def eliminated(hessian: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return eliminate(hessian.clone(), down)


@pytest.mark.parametrize("block", [symmetric.BLOCK, 48])
@pytest.mark.parametrize("width", [5, PANEL, 2 * PANEL + 13])
def test_panels_cut_in_the_order_and_at_the_costs_of_the_plain_loop(width, block, monkeypatch):
    monkeypatch.setattr(symmetric, "BLOCK", block)
    monkeypatch.setattr(symmetric, "SWEPT", 20)
    hessian, down = problem(width)
    order, error = eliminated(hessian, down)
    expected_order, costs = plain_loop(hessian.numpy(), down.numpy())
    assert order.tolist() == expected_order
    np.testing.assert_allclose(error[1:].numpy(), np.cumsum(costs), rtol=1e-8)


@pytest.mark.parametrize("pool", [6, obs.POOL])
def test_the_error_is_that_of_ridge_regression_on_what_is_kept(pool, monkeypatch):
    monkeypatch.setattr(obs, "PANEL", 4)
    monkeypatch.setattr(obs, "POOL", pool)
    hessian, down = problem(60)
    order, error = eliminated(hessian, down)
    h, w = hessian.numpy(), down.numpy()
    for cut in (1, 10, 30, 59):
        gone, kept = order[:cut].numpy(), np.sort(order[cut:].numpy())
        b = np.linalg.solve(h[np.ix_(kept, kept)], h[np.ix_(kept, gone)]).T
        left = h[np.ix_(gone, gone)] - b @ h[np.ix_(kept, gone)]
        assert error[cut].item() == pytest.approx(np.trace(w[:, gone] @ left @ w[:, gone].T), rel=1e-8)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_float32_orders_as_well_as_float64(ridge):
    """Of neurons that a third as many directions nearly determine; beyond, where most of them are gone, orders differ."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(2000, 100, generator=generator) @ torch.randn(100, 300, generator=generator)
    h = (h + 0.1 * torch.randn(2000, 300, generator=generator)).relu().double()
    hessian, down = h.T @ h / len(h), torch.randn(20, 300, generator=generator)
    hessian.diagonal().add_(ridge * hessian.diagonal().mean())
    (_, expected), (_, found) = eliminate(hessian.clone(), down), eliminate(hessian.float(), down)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-3)


def test_what_is_too_nearly_singular_for_float32_is_refused_and_ordered_in_float64():
    """Each neuron is there twice: half of them cost nothing."""
    hessian, down = problem(40)
    twice, wide = hessian.repeat(2, 2) + 1e-9 * torch.eye(80, dtype=torch.float64), torch.cat((down, down), dim=1)
    with pytest.raises(torch.linalg.LinAlgError):
        eliminate(twice.float(), wide)
    moments = Moments(1e12, 1e12, 0, True, torch.zeros(80, dtype=torch.float64), twice)
    ranking = rank_by_obs(moments, wide)
    assert sorted((ranking.order[:40] % 40).tolist()) == list(range(40))
    assert ranking.error is not None
    assert ranking.error[40] < 1e-6 * ranking.energy


def test_cutting_everything_costs_all_of_the_output():
    hessian, down = problem(20)
    _, error = eliminated(hessian, down)
    assert error[-1].item() == pytest.approx(torch.trace(down @ hessian @ down.T).item(), rel=1e-10)


def test_of_equal_neurons_the_lower_index_goes_first():
    order, _ = eliminate(torch.eye(200, dtype=torch.float64), torch.full((3, 200), 3.0))
    assert order.tolist() == list(range(200))


def test_an_exception_from_progress_stops_it():
    def cancel(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eliminate(torch.eye(10, dtype=torch.float64), torch.eye(10, dtype=torch.float64), progress=cancel)
