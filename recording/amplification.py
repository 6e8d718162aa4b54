"""How much a small error at one MLP's output moves the final velocity.

    probe = AmplificationProbe(layout.sites)
    probe.measure(model, sigma, lambda: point.run(model))    # at any number of points of dense trajectories
    store.add_amplification(probe.results())

A site's amplification is |change of the velocity|^2 / |velocity|^2, divided by the energy (mean |noise|^2 per token) of the
noise that was added at the output of its down projection: times a site's squared error per token, it predicts what that
error does to the velocity, relative and squared. Sites differ a thousandfold, which is what lets one budget be spread over
them; noise levels differ fortyfold at one site, which is what rows are weighted by when a site is ranked and repaired.
Weights are of the velocity alone: times the square of the Euler step's length, which is what one step's error does to the
image, they leave more error in velocity and image alike (benchmarks/README.md, "Rows by importance").

All it needs of a host is to call the model once more for every site, with the hook in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..flux.layout import Site
from .hooks import force_eager

#: Sums of measurements and their numbers, by site and sigma.
Measured = dict[str, dict[float, tuple[float, int]]]

#: Noise, relative to the variation of the output it is added to: small against it, large against the rounding of bf16.
RELATIVE_NOISE = 0.1


class AmplificationProbe:
    """Measures `sites` at any number of points; each measurement counts the same."""

    def __init__(self, sites: Sequence[Site], seed: int = 0):
        self.sites = tuple(sites)
        self._generator = torch.Generator().manual_seed(seed)
        self._measured: Measured = {}

    @torch.no_grad()
    @force_eager()
    def measure(self, model: nn.Module, sigma: float, velocity: Callable[[], Tensor]) -> None:
        """`velocity()` runs `model` at noise level `sigma`: once as it is, once for every site with noise at its output.

        A site that gives no finite number above 0 is left out, as one is that `velocity()` skips (a cache of the host's).
        """
        expected = velocity().float()
        energy = expected.square().sum().item()
        for site in self.sites:
            added: list[Tensor] = []
            handle = model.get_submodule(site.down).register_forward_hook(_noise(self._generator, added))
            try:
                moved = (velocity().float() - expected).square().sum().item()
            finally:
                handle.remove()
            noise = torch.stack(added).mean().item() if added else 0.0
            found = moved / energy / noise if energy > 0 and noise > 0 else 0.0
            if 0 < found < math.inf:  # no number where float16 overflows
                levels = self._measured.setdefault(site.name, {})
                value, times = levels.get(sigma, (0.0, 0))
                levels[sigma] = (value + found, times + 1)

    def results(self) -> Measured:
        """By site and sigma, the sum of all measurements and their number."""
        return self._measured


def probed_steps(steps: int, count: int) -> set[int]:
    """`count` of the steps of a run to measure at, evenly from the first to the last but one.

    At the very last an error may count several times what it does one step before, and its few rows would outweigh all others.
    """
    return {max(0, round(number * (steps - 2) / max(count - 1, 1))) for number in range(count)}


def _noise(generator: torch.Generator, added: list[Tensor]):
    """A hook that adds noise to a module's output, and its mean energy per token to `added`.

    What a cut leaves is not white noise: it lies where the output itself varies. So every token gets the deviation from the
    mean of a token drawn at random, with a random sign: noise with the output's own covariance.
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        tokens = output.float().flatten(0, -2)
        chosen = torch.randint(len(tokens), (len(tokens),), generator=generator)
        sign = torch.randint(0, 2, (len(tokens), 1), generator=generator) * 2.0 - 1.0
        noise = (tokens - tokens.mean(0))[chosen.to(tokens.device)] * (sign.to(tokens.device) * RELATIVE_NOISE)
        disturbed = (output.float() + noise.view_as(output)).to(output.dtype)
        added.append((disturbed.float() - output.float()).square().sum(-1).mean())
        return disturbed

    return hook
