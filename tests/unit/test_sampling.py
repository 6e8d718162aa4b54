"""flux/sampling.py against published figures, formulas written another way, and an equation with a known solution."""

import math

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.sampling import FluxTimer, dynamic_mu, euler, flux2_mu

TIMERS = [FluxTimer(n, shift) for n in (1, 4, 28) for shift in (1.0, 3.0, "dynamic", "flux2")]


def shifted(t: float, mu: float) -> float:
    """The shift as black-forest-labs write it; 0 at t = 0 by its limit."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1)) if t else 0.0


@pytest.mark.parametrize("timer", TIMERS, ids=str)
def test_noise_levels_fall_from_exactly_1_to_exactly_0(timer):
    sigmas = timer.sigmas(1024)
    assert (sigmas.shape, sigmas.dtype) == ((timer.steps + 1,), torch.float32)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


def test_without_a_shift_the_levels_are_even():
    torch.testing.assert_close(FluxTimer(5).sigmas(), torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0]))


def test_a_static_shift_maps_half_noise_to_its_share():
    torch.testing.assert_close(FluxTimer(4, 3.0).sigmas(), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    for s in (0.5, 1.15, 3.0):
        expected = [shifted(t, math.log(s)) for t in np.linspace(1, 0, 9)]
        np.testing.assert_allclose(FluxTimer(8, s).sigmas().numpy(), expected, rtol=1e-6)


def test_the_dynamic_shift_grows_with_the_image_through_the_published_points():
    assert [round(dynamic_mu(tokens), 6) for tokens in (256, 1024, 4096)] == [0.5, 0.63, 1.15]
    slope, intercept = np.polyfit([256, 4096], [0.5, 1.15], 1)
    for tokens in (256, 1500, 4096, 9216):
        expected = [shifted(t, slope * tokens + intercept) for t in np.linspace(1, 0, 29)]
        np.testing.assert_allclose(FluxTimer(28, "dynamic").sigmas(tokens).numpy(), expected, rtol=1e-5)


def test_flux2_levels_are_the_published_ones():
    assert FluxTimer(4, "flux2").sigmas(1024).tolist() == pytest.approx([1, 0.958, 0.884, 0.718, 0], abs=6e-4)


def test_flux2_mu_is_a_line_in_the_steps_up_to_4300_tokens_and_without_them_above():
    for tokens in (256, 1024, 4300):
        ends = (8.73809524e-5 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666)
        for steps in (4, 10, 28, 200):
            assert flux2_mu(tokens, steps) == pytest.approx(np.polyval(np.polyfit([10, 200], ends, 1), steps))
    assert flux2_mu(4301, 4) == flux2_mu(4301, 50) == pytest.approx(0.00016927 * 4301 + 0.45666666)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, "dynamic"), (4, 0.0), (4, -1.0)])
def test_a_schedule_that_cannot_be_is_refused(steps, shift):
    with pytest.raises(UserError, match=r"at least 1 step|above 0"):
        FluxTimer(steps, shift)


def test_euler_reaches_the_image_on_a_straight_path_in_any_number_of_steps():
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    for timer in TIMERS:
        torch.testing.assert_close(euler(lambda x, sigma: noise - image, noise, timer.sigmas()), image, rtol=1e-4, atol=1e-5)


def test_euler_converges_at_first_order_to_the_solution_of_a_known_equation():
    """dx/dsigma = x from 1 to 0: the solution is x(0) = x(1) / e."""
    noise = torch.tensor([[1.0], [2.0]], dtype=torch.float64)

    def error(steps: int) -> float:
        found = euler(lambda x, sigma: x, noise, FluxTimer(steps).sigmas())
        return (found - noise / math.e).abs().max().item()

    errors = [error(steps) for steps in (16, 32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_each_step_is_seen_before_it_is_taken():
    seen = []
    sigmas = FluxTimer(3, 2.0).sigmas()
    last = euler(
        lambda x, sigma: torch.stack((x[0] * 0 + sigma[0], x[1] * 0 + sigma[1] + 1)),
        torch.zeros(2, 1),
        sigmas,
        on_step=lambda step, x, v: seen.append((step, x.clone(), v.clone())),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    torch.testing.assert_close(torch.stack([v[0, 0] for _, _, v in seen]), sigmas[:-1])
    states = [x for _, x, _ in seen] + [last]
    for (step, x, v), after in zip(seen, states[1:], strict=True):
        torch.testing.assert_close(after, x + (sigmas[step + 1] - sigmas[step]) * v)
