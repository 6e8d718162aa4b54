"""flux/sampling.py against published figures, and formulas written another way."""

import math

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.sampling import FluxTimer, dynamic_mu, flux2_mu

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


@pytest.mark.parametrize("shift", [1.0, 3.0, "dynamic"])
def test_denoise_takes_the_last_steps_of_a_longer_schedule(shift):
    half = FluxTimer(10, shift, denoise=0.5).sigmas(1024)
    assert torch.equal(half, FluxTimer(20, shift).sigmas(1024)[10:])
    third = FluxTimer(7, shift, denoise=0.3).sigmas(1024)  # of int(7 / 0.3) = 23 steps
    assert torch.equal(third, FluxTimer(23, shift).sigmas(1024)[16:])
    assert half[-1] == third[-1] == 0


def test_flux2_with_denoise_has_the_shift_of_the_whole_schedule():
    assert torch.equal(FluxTimer(4, "flux2", denoise=0.5).sigmas(1024), FluxTimer(8, "flux2").sigmas(1024)[4:])


@pytest.mark.parametrize(
    ("steps", "shift", "denoise"),
    [
        (0, 1.0, 1),
        (-3, "dynamic", 1),
        (4, 0.0, 1),
        (4, -1.0, 1),
        (4, math.nan, 1),
        (4, math.inf, 1),
        (4, 1.0, 0),
        (4, 1.0, 1.5),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(steps, shift, denoise):
    with pytest.raises(UserError, match=r"at least 1 step|above 0"):
        FluxTimer(steps, shift, denoise)
