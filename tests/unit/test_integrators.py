"""flux/integrators.py against equations with known solutions, and on the tiny FLUX."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from flux_poke.flux.integrators import NAMES, Stochastic, dpmpp_2m, euler, heun, integrator
from flux_poke.flux.sampling import FluxTimer
from flux_poke.tiny.model import TinyFlux
from torch import Tensor

MEAN, SPREAD = 2.0, 0.5
TIMERS = [FluxTimer(n, shift) for n in (1, 4, 28) for shift in (1.0, 3.0, "dynamic", "flux2")]


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """Of images that are normal with `MEAN` and `SPREAD`: E[noise - image | x], by the formula for jointly normal variables."""
    level = sigma.view(-1, *(1,) * (x.ndim - 1))
    variance = (1 - level) ** 2 * SPREAD**2 + level**2
    return -MEAN + (level - (1 - level) * SPREAD**2) / variance * (x - (1 - level) * MEAN)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solution(noise: Tensor, sigma: float) -> Tensor:
    """Where the equation leads for the Gaussian from `noise` at sigma 1: each x keeps its place in the distribution."""
    return (1 - sigma) * MEAN + math.hypot((1 - sigma) * SPREAD, sigma) * noise


def errors(integrate, first: float = 1.0, last: float = 0.0) -> list[float]:
    """How far the integrator is from the solution in 20, 40, 80 and 160 steps."""
    noise = normal(4, 3)
    levels = [torch.linspace(first, last, count + 1, dtype=torch.float64) for count in (20, 40, 80, 160)]
    found = [integrate(gaussian_velocity, solution(noise, first), sigmas) for sigmas in levels]
    return [(x - solution(noise, last)).abs().max().item() for x in found]


def orders(found: list[float]) -> list[float]:
    return [math.log2(before / after) for before, after in pairwise(found)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timer", TIMERS, ids=str)
def test_all_reach_the_image_on_a_straight_path_in_any_number_of_steps(name, timer):
    image, noise = normal(3, 4, 4, 4), normal(3, 4, 4, 4, seed=1)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:  # of one image alone, wherever x is
        return (x - image) / sigma.view(-1, 1, 1, 1)

    torch.testing.assert_close(integrator(name)(velocity, noise, timer.sigmas()), image, rtol=1e-5, atol=1e-5)


def test_euler_is_of_first_order_and_heun_and_dpmpp_2m_are_of_second():
    assert orders(errors(euler, 0.9, 0.1)) == pytest.approx([1, 1, 1], abs=0.1)
    assert orders(errors(heun, 0.9, 0.1)) == pytest.approx([2, 2, 2], abs=0.1)
    assert orders(errors(dpmpp_2m, 0.9, 0.1)) == pytest.approx([2, 2, 2], abs=0.25)


def test_from_noise_to_the_image_second_order_is_several_times_nearer_in_as_many_steps():
    found = {integrate.__name__: errors(integrate) for integrate in (euler, heun, dpmpp_2m)}
    assert orders(found["euler"]) == pytest.approx([1, 1, 1], abs=0.1)
    assert orders(found["heun"]) == pytest.approx([2, 2, 2], abs=0.1)
    assert all(error < other / 10 for error, other in zip(found["heun"], found["euler"], strict=True))
    assert all(error < other / 5 for error, other in zip(found["dpmpp_2m"], found["euler"], strict=True))


@pytest.mark.parametrize("churn", [0.0, 10.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_stochastic_steps_lead_to_the_distribution_of_the_images_at_first_order(eta, churn):
    noise = normal(20, 8_000)
    lost = []
    for steps in (50, 200):
        images = Stochastic(eta, churn, seed=3)(gaussian_velocity, noise, torch.linspace(1, 0, steps + 1).double())
        assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
        lost.append(SPREAD - images.std().item())
    assert lost[1] < 0.025
    assert lost[0] > 2.5 * lost[1] > 0


def test_without_eta_and_churn_stochastic_steps_are_eulers():
    noise, sigmas = normal(4, 3), FluxTimer(12, 3.0).sigmas().double()
    torch.testing.assert_close(Stochastic(eta=0)(gaussian_velocity, noise, sigmas), euler(gaussian_velocity, noise, sigmas))


def test_churn_evaluates_at_raised_levels_of_noise():
    seen: list[float] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma[0].item())
        return gaussian_velocity(x, sigma)

    Stochastic(0.0, churn=2.0)(velocity, normal(1, 3), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    raised = [1.0, *((1 + math.sqrt(2) - 1) * level / (1 - level) for level in (0.75, 0.5, 0.25))]  # 2 / 4 is above the limit
    assert seen == pytest.approx([1.0, *(level / (1 + level) for level in raised[1:])])


def test_fresh_noise_is_each_images_own_and_none_of_it_is_the_noise_that_it_began_with():
    sigmas = FluxTimer(6).sigmas()
    tiny = TinyFlux.load()

    def drawn(seed: int, count: int) -> Tensor:
        return Stochastic(seed=seed)(gaussian_velocity, tiny.noise(count, seed), sigmas)

    together = drawn(5, 3)
    for number in range(3):
        torch.testing.assert_close(drawn(5 + number, 1)[0], together[number])
    added: list[Tensor] = []
    nothing = torch.zeros(1, 16, 8, 8)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        added.append(x.clone())
        return nothing

    Stochastic(seed=5)(velocity, nothing, torch.tensor([1, 0.5, 0]))
    assert abs(torch.corrcoef(torch.stack((added[1].flatten(), tiny.noise(1, 5).flatten())))[0, 1]) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_seen_once_before_it_is_taken(name):
    seen: list[tuple[int, Tensor, Tensor]] = []
    noise, sigmas = normal(2, 3), FluxTimer(3, 2.0).sigmas().double()
    integrator(name)(gaussian_velocity, noise, sigmas, lambda step, x, v: seen.append((step, x.clone(), v.clone())))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    for (_, x, v), sigma in zip(seen, sigmas[:-1], strict=True):
        torch.testing.assert_close(v, gaussian_velocity(x, sigma.expand(2)))
    assert torch.equal(seen[0][1], noise)


def test_on_the_tiny_flux_second_order_is_nearer_to_the_limit_in_as_many_steps():
    tiny = TinyFlux.load()
    prompts = ["three", "a 7"]
    context, vector = tiny.words(prompts)
    noise = tiny.noise(2, 11)

    @torch.no_grad()
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return tiny.flux(x, sigma, context, vector)

    limit = heun(velocity, noise, FluxTimer(80).sigmas())

    def error(integrate) -> float:
        return (integrate(velocity, noise, FluxTimer(40).sigmas()) - limit).square().mean().item()

    assert error(heun) < 0.6 * error(euler)
    assert error(dpmpp_2m) < error(euler)
