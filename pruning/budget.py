"""One budget for all that can be cut: how much to save, spread so that the model's output suffers least.

    curve = BudgetCurve([*neuron_steps(site, ranking, error, multiple, size), *rank_steps(site, errors, multiple, size), ...])
    taken = curve.until(6e9, "bytes")                # so many steps
    curve.cuts(taken), curve.ranks(taken)            # by site, how many neurons go, and the rank its modulation is left with
    curve.error(taken)                               # what that costs
    curve.figure(taken)                              # memory saved against predicted error, before anything is cut

Neurons of an MLP and ranks of a modulation layer (`modulation.py`) are both a curve: predicted error against what is left.
Times the amplification (recording/amplification.py) it is the error of the velocity. The total is least where all curves have
the same slope: costs per byte are sorted once, and the cheapest steps are taken until enough is saved. Where a curve is not
convex, its convex hull is followed (the Lagrange relaxation of the choice).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..analysis.charts import line_chart
from ..errors import UserError
from ..files import size_text
from ..flux.layout import Layout, Site
from ..recording.amplification import RELATIVE_NOISE, REMOVED
from .curves import Ranking

Kind = Literal["neurons", "ranks"]

#: By the words for a kind of budget, what to ask for to save so many bytes, neurons and parameters.
Amounts = dict[str, Callable[[float, float, float], float]]

#: Points of a curve that a page draws.
MOST_POINTS = 250


@dataclass(frozen=True)
class Step:
    """Leaving a site `left` neurons, or its modulation layer that rank: what this saves on top of the step before, the error it
    adds, and its price per byte.

    Steps that only pay together share their mean price, so that no step comes before those it builds on.
    """

    site: str
    kind: Kind
    left: int
    neurons: int
    parameters: int
    bytes: int
    error: float
    price: float


class BudgetCurve:
    """All steps that can be taken, the cheapest per byte first; `amplified` tells whether errors are the velocity's."""

    def __init__(self, steps: Iterable[Step], amplified: bool = True):
        self.steps = sorted(steps, key=lambda step: step.price)  # stable: of equal ones, the earlier site
        self.amplified = amplified

    def until(self, amount: float, of: Literal["neurons", "parameters", "bytes"]) -> int:
        """How many steps save `amount` neurons, parameters or bytes; raises `UserError` where all of them together do not."""
        saved = np.cumsum([0, *(getattr(step, of) for step in self.steps)])
        if saved[-1] < amount:
            goal, most = (size_text(some) if of == "bytes" else f"{some:,.0f} {of}" for some in (amount, saved[-1]))
            raise UserError(
                f"{goal} are to be saved, but no more than {most} may go (one multiple of every MLP is kept, "
                "protected layers whole): ask for less, protect fewer layers, or choose a smaller multiple."
            )
        return int(np.searchsorted(saved, amount))

    def cuts(self, taken: int) -> dict[str, int]:
        """By site, how many neurons go in the first `taken` steps."""
        found: Counter[str] = Counter()
        for step in self.steps[:taken]:
            found[step.site] += step.neurons
        return {site: neurons for site, neurons in found.items() if neurons}

    def ranks(self, taken: int) -> dict[str, int]:
        """By site, the rank its modulation layer is left with after the first `taken` steps, where that is less than all."""
        return {step.site: step.left for step in self.steps[:taken] if step.kind == "ranks"}

    def saved(self, taken: int) -> dict[Kind, int]:
        """Bytes that the first `taken` steps save, by what was cut."""
        kinds: tuple[Kind, ...] = ("neurons", "ranks")
        return {kind: sum(step.bytes for step in self.steps[:taken] if step.kind == kind) for kind in kinds}

    def error(self, taken: int) -> float:
        """Predicted error of the first `taken` steps together."""
        return sum(step.error for step in self.steps[:taken])

    def figure(self, taken: int) -> Figure:
        """Memory saved against predicted error, with a mark where the first `taken` steps lead, and what of it are neurons."""
        kinds: dict[Kind, str] = {"neurons": "MLP neurons", "ranks": "ranks of modulation layers"}
        saved = {kind: np.cumsum([0, *(step.bytes * (step.kind == kind) for step in self.steps)]) for kind in kinds}
        memory = sum(saved.values(), start=np.zeros(1))
        size, unit = (1e9, "GB") if memory[-1] >= 1e8 else (1e6, "MB")
        error = np.cumsum([0, *(step.error for step in self.steps)])
        figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.plot(memory[1:] / size, error[1:], color="tab:blue")
        axes.axvline(memory[taken] / size, color="tab:orange", linewidth=1)
        parts = [f"{saved[kind][taken] / size:.3g} {unit}: {name}" for kind, name in kinds.items() if saved[kind][-1]]
        label = "\n".join([f"predicted error {error[taken]:.3g}", *parts])
        axes.plot([memory[taken] / size], [error[taken]], "o", color="tab:orange", label=label)
        axes.legend(title="this plan")
        what = "predicted relative velocity error" if self.amplified else "predicted error (sum over all MLPs)"
        axes.set(
            title="Memory saved against predicted error", xlim=(0, None), yscale="log", xlabel=f"{unit} saved", ylabel=what
        )
        axes.grid(alpha=0.3)
        return figure

    def chart(self, taken: int, amounts: Amounts) -> dict[str, Any]:
        """The same for a page (`analysis/charts.py`), where the mark can be dragged to another amount."""
        totals = [np.cumsum([0, *(getattr(step, of) for step in self.steps)]) for of in ("bytes", "neurons", "parameters")]
        memory, neurons, _ = totals
        error = np.cumsum([0, *(step.error for step in self.steps)])
        evenly = np.searchsorted(memory[1:], np.linspace(memory[1], memory[-1], MOST_POINTS)) + 1
        points = sorted({*evenly.tolist(), taken} - {0})
        size, unit = (1e9, "GB") if memory[-1] >= 1e8 else (1e6, "MB")
        return line_chart(
            "Memory saved against predicted error",
            (memory[points] / size).tolist(),
            {"": error[points].tolist()},
            f"{unit} saved",
            "predicted relative velocity error" if self.amplified else "predicted error (sum over all MLPs)",
            log=True,
            mark=points.index(taken) if taken else None,
            more={"neurons cut": neurons[points].tolist(), "last cut": [self.steps[point - 1].site for point in points]},
            drag={
                "widget": "amount",
                "unit": "budget",
                "to": {  # between this step and the one before: what is asked for needs no more digits than it has
                    words: [_digits(amount(*((total[point - 1] + total[point]) / 2 for total in totals))) for point in points]
                    for words, amount in amounts.items()
                },
            },
        )


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def neuron_steps(site: Site, parameters: int, error: Sequence[float], multiple: int, number: int) -> list[Step]:
    """Narrowing an MLP to multiples of `multiple`, one multiple at least.

    Args:
        parameters: of one neuron (`neuron_parameters`). number: bytes of each.
        error: after cutting the first k neurons of the ranking, [width + 1].
    """
    # from the full width down to one multiple; the first step may be a part of one
    lefts = [site.width, *range((site.width - 1) // multiple * multiple, 0, -multiple)]
    cuts = [site.width - left for left in lefts]
    saved = [cut * parameters for cut in cuts]
    return _steps(site.name, "neurons", lefts, cuts, saved, [each * number for each in saved], [error[cut] for cut in cuts])


def rank_steps(site: Site, shape: Sequence[int], error: Sequence[float], multiple: int, number: int, thin: int) -> list[Step]:
    """Truncating a modulation layer to ranks that are multiples of `multiple`, one multiple at least.

    Args:
        shape: [out, hidden] of its weight. number: bytes of each of its numbers. thin: of each one of the two factors.
        error: at rank r [ranks + 1]; none beyond.
    """
    outputs, inputs = shape
    most = (outputs * inputs * number - 1) // ((outputs + inputs) * thin) // multiple * multiple  # what still saves something
    lefts = [0, *range(most, 0, -multiple)]  # the layer as it is first
    saved = [0, *(outputs * inputs - rank * (outputs + inputs) for rank in lefts[1:])]
    sizes = [0, *(outputs * inputs * number - rank * (outputs + inputs) * thin for rank in lefts[1:])]
    errors = [0.0, *(error[rank] if rank < len(error) else 0.0 for rank in lefts[1:])]
    return _steps(site.name, "ranks", lefts, [0] * len(lefts), saved, sizes, errors)


def velocity_error(ranking: Ranking, amplification: Mapping[str, float], site: str) -> Tensor:
    """Predicted relative squared error of the velocity after cutting the first k neurons of `site`, float64 [width + 1].

    What is small moves it as noise does, and what is lost altogether as `removed` (recording/amplification.py); in between, the
    amplification is interpolated on logarithmic scales of the error relative to the output. Both may be apart: the text of a
    small model matters ten times more when it is gone than noise on it does. Without amplifications, the error of the output.
    """
    assert ranking.error is not None
    if not amplification:
        return ranking.error
    noise = amplification[site]
    removed = amplification.get(f"{site}{REMOVED}", noise)
    small = RELATIVE_NOISE**2
    share = (ranking.error / ranking.energy).clamp(small, 1).log() / math.log(small)  # 1 = as noise, 0 = all
    return (ranking.error * noise**share * removed ** (1 - share)).cummax(0).values


def protected_sites(layout: Layout, names: str) -> set[str]:
    """Site names from a text such as "double-18, single-0, double-txt-3"; a block's name stands for all MLPs in it.

    Raises `UserError` for a name the model does not have.
    """
    found: set[str] = set()
    for part in names.replace(",", " ").split():
        kind, _, index = part.partition("-")
        block = (f"double-img-{index}", f"double-txt-{index}") if kind == "double" and index.isdigit() else (part,)
        found |= {layout.site(name).name for name in block}
    return found


def neuron_parameters(layout: Layout, site: Site) -> int:
    """How many parameters one neuron of a site has: its row or rows, their biases, and its column."""
    rows = 2 if site.gated else 1
    return rows * (layout.hidden + int(site.biased)) + layout.hidden


def _steps(
    name: str, kind: Kind, lefts: Sequence[int], cuts: Sequence[int], saved: Sequence[int], sizes: Sequence[int],
    errors: Sequence[float],
) -> list[Step]:  # fmt: skip
    """From each of `lefts` to the next one, with the neurons cut, the parameters and bytes saved and the error at each."""
    neurons, parameters, memory = ([more - less for less, more in pairwise(totals)] for totals in (cuts, saved, sizes))
    added = [more - less for less, more in pairwise(errors)]
    prices = rising_means(added, memory)
    steps = zip(lefts[1:], neurons, parameters, memory, added, prices, strict=True)
    return [Step(name, kind, *step) for step in steps]


def rising_means(costs: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Cost per weight of every step, those that fall pooled with what is before them into their mean (pool adjacent
    violators, Ayer et al. 1955): slopes of the convex hull of the running sums."""
    pools: list[tuple[float, float, int]] = []
    for cost, weight in zip(costs, weights, strict=True):
        pool = (cost, weight, 1)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return [cost / weight for cost, weight, count in pools for _ in range(count)]
