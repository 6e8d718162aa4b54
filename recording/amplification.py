"""How much an error at the output of one MLP, or of one modulation layer, moves the final velocity.

    probe = AmplificationProbe(layout)
    probe.measure(model, sigma, lambda: point.run(model))    # at any number of points of dense trajectories
    store.add_amplification(probe.results())

A site's amplification is |change of the velocity|^2 / |velocity|^2, divided by the energy (mean |error|^2 per token) of an
error that was made at the output of its down projection: times a site's squared error per token, it predicts what that
error does to the velocity, relative and squared. Sites differ a thousandfold, which is what lets one budget be spread over
them; noise levels differ fortyfold at one site, which is what rows are weighted by when a site is ranked and repaired.
Weights are of the velocity alone: times the square of the Euler step's length, which is what one step's error does to the
image, they leave more error in velocity and image alike (benchmarks/README.md, "Rows by importance").

Of an MLP it is measured with two kinds of error, since what is left of a cut lies between them (`pruning/budget.py`); of a
modulation layer (FLUX.1), with the error that truncation to a low rank leaves (`pruning/modulation.py`):

| key | error | stands for |
|---|---|---|
| `S` | noise on every neuron, another one at every token | a small error; what affine repair leaves |
| `S.removed` | the neurons' part of the output becomes its mean | all that a cut can lose |
| `S.modulation` | of the layer's output, all but its `RANK` main directions | a modulation layer of any low rank |

All it needs of a host is to call the model again, with a hook in place: two or three times for every site. (Recordings of
earlier versions may hold `S.shifted` as well, which nothing reads.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..flux.layout import Layout, Site
from ..flux.vectors import VECTOR, modulation_inputs
from .hooks import force_eager

#: (module, what it reads, its output) to the output that is put in its place.
Error = Callable[[nn.Module, Tensor, Tensor], Tensor]

#: Sums of measurements and their numbers, by site and sigma.
Measured = dict[str, dict[float, tuple[float, int]]]

#: Noise, relative to the variation of the neurons it is added to: small against it, large against the rounding of bf16.
RELATIVE_NOISE = 0.1
#: What follows a site's name in the key of what is measured where its neurons become their mean.
REMOVED = ".removed"
#: What follows it in the key of what is measured at the modulation layer of its stream, and the rank that is left there: the
#: amplification at one noise level hardly changes from rank 2 to 6.
MODULATION, RANK = ".modulation", 3
#: Texts of a batch that directions are taken from.
TEXTS = 4


class AmplificationProbe:
    """Measures what is not among the keys `known` yet, at any number of points; each measurement counts the same."""

    def __init__(self, layout: Layout, known: Collection[str] = (), seed: int = 0):
        self.layout = layout
        self.sites = [site for site in layout.sites if site.name not in known]
        self.modulated = [site for site in layout.modulated if f"{site.name}{MODULATION}" not in known]
        self._generator = torch.Generator().manual_seed(seed)
        self._measured: Measured = {}

    @property
    def calls(self) -> int:
        """How many model calls one measurement takes."""
        return 1 + 2 * len(self.sites) + len(self.modulated) if self.sites or self.modulated else 0

    @torch.no_grad()
    @force_eager()
    def measure(self, model: nn.Module, sigma: float, velocity: Callable[[], Tensor]) -> None:
        """`velocity()` runs `model` at noise level `sigma`: once as it is, and then with one error at one site.

        What gives no finite number above 0 is left out, as a site is that `velocity()` skips (a cache of the host's).
        """
        with ExitStack() as hooks:
            texts: list[Tensor] = []
            if self.modulated:
                heard = model.get_submodule(VECTOR).register_forward_pre_hook(lambda _, inputs: texts.append(inputs[0][:TEXTS]))
                hooks.enter_context(heard)
            expected = velocity().float()
        energy = expected.square().sum().item()

        def moved_by(key: str, path: str, error: Error) -> None:
            made: list[Tensor] = []
            with model.get_submodule(path).register_forward_hook(_making(error, made)):
                moved = (velocity().float() - expected).square().sum().item()
            size = torch.stack(made).mean().item() if made else 0.0
            found = moved / energy / size if energy > 0 and size > 0 else 0.0
            if 0 < found < math.inf:  # no number where float16 overflows
                levels = self._measured.setdefault(key, {})
                value, times = levels.get(sigma, (0.0, 0))
                levels[sigma] = (value + found, times + 1)

        for site in self.sites:
            moved_by(site.name, site.down, _reading(site, self._noise))
            moved_by(f"{site.name}{REMOVED}", site.down, _reading(site, _mean))
        if self.modulated and texts:
            vectors = torch.cat([s for _, s in modulation_inputs(model, self.layout, texts[0])])
            for site in self.modulated:
                layer = model.get_submodule(site.modulation)
                moved_by(f"{site.name}{MODULATION}", site.modulation, _truncated(layer(vectors).float()))

    def results(self) -> Measured:
        """By site and sigma, the sum of all measurements and their number."""
        return self._measured

    def _noise(self, neurons: Tensor) -> Tensor:
        """With independent noise on every neuron, in proportion to how it varies.

        What affine repair leaves is like that: of each cut neuron, what the kept ones do not tell. It varies less in the
        output's main directions than the output itself, and so moves the velocity less: noise with the output's covariance says
        up to five times too much.
        """
        deviation = neurons.flatten(0, -2).std(0, correction=0) * RELATIVE_NOISE
        return neurons + torch.randn(neurons.shape, generator=self._generator).to(deviation) * deviation


def _mean(neurons: Tensor) -> Tensor:
    return neurons.flatten(0, -2).mean(0).expand_as(neurons)


def probed_steps(steps: int, count: int) -> set[int]:
    """`count` of the steps of a run to measure at, evenly from the first to the last but one, and the last.

    There an error may count several times what it does one step before: predictions need it.
    """
    spread = {max(0, round(number * (steps - 2) / max(count - 1, 1))) for number in range(count)}
    return spread | {steps - 1} if count else spread


def _making(error: Error, made: list[Tensor]):
    """A hook that puts `error(module, input, output)` in the place of a module's output, and adds the mean energy per token of
    what that changes to `made`."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        disturbed = error(module, inputs[0], output).to(output.dtype)
        made.append((disturbed.float() - output.float()).square().sum(-1).mean())
        return disturbed

    return hook


def _reading(site: Site, put_in: Callable[[Tensor], Tensor]) -> Error:
    """What the site's down projection gives if it reads `put_in(neurons)`."""

    def error(module: nn.Module, read: Tensor, output: Tensor) -> Tensor:
        attention, neurons = read[..., : site.down_column], read[..., site.down_column :]
        return module.forward(torch.cat((attention, put_in(neurons.float()).to(neurons.dtype)), dim=-1))

    return error


def _truncated(outputs: Tensor) -> Error:
    """Of an output, its part in the `RANK` directions in which `outputs` [samples, channels] vary most."""
    mean = outputs.mean(0)
    away = outputs - mean
    strength, turned = torch.linalg.eigh(away @ away.T)
    directions = away.T @ turned[:, -RANK:] / strength[-RANK:].sqrt()

    def error(module: nn.Module, read: Tensor, output: Tensor) -> Tensor:
        return mean + (output.float() - mean) @ directions @ directions.T

    return error
