"""How much an error at one MLP's output moves the final velocity.

    probe = AmplificationProbe(layout.sites)
    probe.measure(model, sigma, lambda: point.run(model))    # at any number of points of dense trajectories
    store.add_amplification(probe.results())

A site's amplification is |change of the velocity|^2 / |velocity|^2, divided by the energy (mean |error|^2 per token) of an
error that was made at the output of its down projection: times a site's squared error per token, it predicts what that
error does to the velocity, relative and squared. Sites differ a thousandfold, which is what lets one budget be spread over
them; noise levels differ fortyfold at one site, which is what rows are weighted by when a site is ranked and repaired.
Weights are of the velocity alone: times the square of the Euler step's length, which is what one step's error does to the
image, they leave more error in velocity and image alike (benchmarks/README.md, "Rows by importance").

It is measured with three kinds of error, since no cut leaves one kind alone (`pruning/budget.py` reads between them):

| key | error | stands for |
|---|---|---|
| `S` | noise on every neuron, another one at every token | a small error; what affine repair leaves |
| `S.removed` | the neurons' part of the output becomes its mean | all that a cut can lose where the bias is repaired |
| `S.shifted` | the neurons' part of the output loses its mean | what is lost besides where the bias is not repaired |

All it needs of a host is to call the model again, with a hook in place: three times for every site.
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

#: Noise, relative to the variation of the neurons it is added to: small against it, large against the rounding of bf16.
RELATIVE_NOISE = 0.1


#: What follows a site's name in the keys of what is measured with other errors than noise.
REMOVED, SHIFTED = ".removed", ".shifted"


class AmplificationProbe:
    """Measures `sites` at any number of points, with every kind of error; each measurement counts the same."""

    def __init__(self, sites: Sequence[Site], seed: int = 0):
        self.sites = tuple(sites)
        self._generator = torch.Generator().manual_seed(seed)
        self._measured: Measured = {}

    @property
    def calls(self) -> int:
        """How many model calls one measurement takes."""
        return 1 + 3 * len(self.sites)

    @torch.no_grad()
    @force_eager()
    def measure(self, model: nn.Module, sigma: float, velocity: Callable[[], Tensor]) -> None:
        """`velocity()` runs `model` at noise level `sigma`: once as it is, and then with one error at one site.

        A site that gives no finite number above 0 is left out, as one is that `velocity()` skips (a cache of the host's).
        """
        expected = velocity().float()
        energy = expected.square().sum().item()
        for site in self.sites:
            for kind in ("", REMOVED, SHIFTED):
                added: list[Tensor] = []
                error = _noise(site, self._generator) if not kind else _lost(site, kind)
                handle = model.get_submodule(site.down).register_forward_hook(_adding(error, added))
                try:
                    moved = (velocity().float() - expected).square().sum().item()
                finally:
                    handle.remove()
                size = torch.stack(added).mean().item() if added else 0.0
                found = moved / energy / size if energy > 0 and size > 0 else 0.0
                if 0 < found < math.inf:  # no number where float16 overflows
                    levels = self._measured.setdefault(f"{site.name}{kind}", {})
                    value, times = levels.get(sigma, (0.0, 0))
                    levels[sigma] = (value + found, times + 1)

    def results(self) -> Measured:
        """By site and sigma, the sum of all measurements and their number."""
        return self._measured


def probed_steps(steps: int, count: int) -> set[int]:
    """`count` of the steps of a run to measure at, evenly from the first to the last but one, and the last.

    There an error may count several times what it does one step before: predictions need it.
    """
    spread = {max(0, round(number * (steps - 2) / max(count - 1, 1))) for number in range(count)}
    return spread | {steps - 1} if count else spread


def _adding(error: Callable[[nn.Module, Tensor, Tensor], Tensor], added: list[Tensor]):
    """A hook that adds `error(module, input, output)` to a module's output, and its mean energy per token to `added`."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        disturbed = (output.float() + error(module, inputs[0], output)).to(output.dtype)
        added.append((disturbed.float() - output.float()).square().sum(-1).mean())
        return disturbed

    return hook


def _noise(site: Site, generator: torch.Generator):
    """What independent noise on every neuron, in proportion to how it varies, does to the output. What affine repair leaves is
    like that: of each cut neuron, what the kept ones do not tell. It varies less in the output's main directions than the
    output itself, and so moves the velocity less: noise with the output's covariance says up to five times too much."""

    def error(module: nn.Module, read: Tensor, output: Tensor) -> Tensor:
        attention, neurons = read[..., : site.down_column], read[..., site.down_column :]
        deviation = neurons.float().flatten(0, -2).std(0, correction=0) * RELATIVE_NOISE
        noise = torch.randn(neurons.shape, generator=generator).to(deviation) * deviation
        disturbed = (neurons.float() + noise).to(neurons.dtype)
        return module.forward(torch.cat((attention, disturbed), dim=-1)).float() - output.float()

    return error


def _lost(site: Site, kind: str):
    """What the output loses where the neurons that it reads all become their mean (`REMOVED`), or lose it (`SHIFTED`)."""

    def error(module: nn.Module, read: Tensor, output: Tensor) -> Tensor:
        attention, neurons = read[..., : site.down_column], read[..., site.down_column :]
        mean = neurons.float().flatten(0, -2).mean(0).to(neurons.dtype)
        left = mean.expand_as(neurons) if kind == REMOVED else neurons - mean
        return module.forward(torch.cat((attention, left), dim=-1)).float() - output.float()

    return error
