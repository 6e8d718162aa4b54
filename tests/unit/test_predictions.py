"""flux/predictions.py against what the quantities are defined as."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.predictions import convert
from torch import Tensor

LEVELS = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


def known() -> tuple[Tensor, dict[str, Tensor]]:
    """Latents at `LEVELS`, and what they were made of."""
    image, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = LEVELS.view(-1, 1, 1, 1)
    x = (1 - level) * image + level * noise
    return x, {"velocity": noise - image, "x0": image, "noise": noise, "score": -noise / level}


@pytest.mark.parametrize(("source", "to"), [*permutations(["velocity", "x0", "noise", "score"], 2)])
def test_each_prediction_becomes_each_other(source, to):
    x, values = known()
    torch.testing.assert_close(convert(values[source], x, LEVELS, source, to), values[to])
    one = convert(values[source][1:2], x[1:2], 0.5, source, to)
    torch.testing.assert_close(one, values[to][1:2])


def test_the_score_is_the_gradient_of_the_log_density_of_a_gaussian():
    mean, spread, level = 2.0, 0.5, 0.3
    x = torch.linspace(-2, 4, 7, dtype=torch.float64).requires_grad_()
    variance = ((1 - level) * spread) ** 2 + level**2
    density = torch.distributions.Normal((1 - level) * mean, variance**0.5)
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    x0 = mean + (1 - level) * spread**2 / variance * (x - (1 - level) * mean)  # the posterior mean
    torch.testing.assert_close(convert(x0, x, level, "x0", "score"), gradient)


@pytest.mark.parametrize(
    ("level", "source", "to"),
    [(0.0, "x0", "velocity"), (0.0, "noise", "score"), (1.0, "noise", "x0"), (1.0, "score", "velocity")],
)
def test_where_one_does_not_say_what_the_other_is_it_is_refused(level, source, to):
    x = torch.zeros(2, 3)
    with pytest.raises(UserError, match=f"noise level {level:.0f}, {source} does not say what the {to} is"):
        convert(x, x, torch.tensor([0.5, level]), source, to)


def test_at_the_ends_velocity_says_what_the_image_and_the_noise_are():
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(convert(v, x, 0.0, "velocity", "x0"), x)
    assert torch.equal(convert(v, x, 1.0, "velocity", "noise"), x)
