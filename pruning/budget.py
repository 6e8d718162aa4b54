"""One budget for all MLPs: how much to save, spread so that the model's output suffers least.

    protected = protected_sites(layout, "double-18")
    curve = BudgetCurve.of(layout, rankings, amplifications(store), multiple=64, protected=protected)
    cuts, error = curve.cuts(0.5 * layout.neurons, "neurons")        # by site, how many go; what that costs
    curve.figure(plan)                               # memory saved against predicted error, before anything is cut

Every site's ranking is a curve: predicted error against neurons cut. Times the site's amplification
(recording/amplification.py) it is the error of the velocity. The total is least where all curves have the same slope:
marginal costs are sorted once, and the cheapest steps of `multiple` neurons are taken until enough is saved. Where a curve
is not convex, its convex hull is followed (the Lagrange relaxation of the choice).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Layout, Site
from ..recording.amplification import RELATIVE_NOISE, REMOVED, SHIFTED
from ..recording.store import HiddenStates
from .curves import Ranking
from .plan import PruningPlan


@dataclass(frozen=True)
class Amplification:
    """How much an error at one site moves the velocity, by its kind (`recording/amplification.py`); None = not measured."""

    noise: float
    removed: float | None = None
    shifted: float | None = None

    def velocity_error(self, ranking: Ranking) -> Tensor:
        """Predicted relative squared error of the velocity after cutting the first k, float64 [width + 1].

        What is small moves it as noise does, and what is lost altogether as `removed`; in between, the amplification is
        interpolated on logarithmic scales of the error relative to the output. Both may be apart: the text of a small model
        matters ten times more when it is gone than noise on it does.
        """
        assert ranking.error is not None
        shift = torch.zeros_like(ranking.error) if ranking.shift is None else ranking.shift
        small, own = RELATIVE_NOISE**2, ranking.error - shift
        share = ((own / ranking.energy).clamp(small, 1).log() / math.log(small)).double()  # 1 = as noise, 0 = all
        removed = self.noise if self.removed is None else self.removed
        moved = own * self.noise**share * removed ** (1 - share)
        return (moved + shift * (removed if self.shifted is None else self.shifted)).cummax(0).values


def amplifications(store: HiddenStates) -> dict[str, Amplification]:
    """By site, what was measured of it."""
    found = store.amplification
    return {
        name: Amplification(value, found.get(name + REMOVED), found.get(name + SHIFTED))
        for name, value in found.items()
        if not name.endswith((REMOVED, SHIFTED))
    }


@dataclass(frozen=True)
class Step:
    """Cutting `neurons` more of `site`: how many parameters that saves, the error it adds, and its price per parameter.

    Steps of a site that only pay together share their mean price, so that no step comes before those it builds on.
    """

    site: str
    neurons: int
    parameters: int
    error: float
    price: float


@dataclass(frozen=True)
class BudgetCurve:
    """All steps that can be taken, the cheapest per parameter first; `amplified` tells whether errors are the velocity's."""

    steps: tuple[Step, ...]
    amplified: bool

    @classmethod
    def of(
        cls,
        layout: Layout,
        rankings: Mapping[str, Ranking],
        amplification: Mapping[str, Amplification] | None = None,
        multiple: int = 64,
        protected: Collection[str] = (),
    ) -> BudgetCurve:
        """The curve over all ranked sites that are not protected.

        Widths are multiples of `multiple`, and one multiple at least is kept. Without amplifications, an error counts the same
        wherever it is made. Raises `UserError` where the score predicts no error.
        """
        if multiple < 1:
            raise UserError(f"Widths are rounded to a multiple of at least 1 neuron; found {multiple}.")
        sites = [site for site in layout.sites if site.name in rankings]
        amplified = bool(amplification) and all(site.name in (amplification or {}) for site in sites)
        steps: list[Step] = []
        for site in sites:
            if site.name in protected:
                continue
            error = rankings[site.name].error
            if error is None:
                raise UserError(
                    "A budget weighs predicted errors against each other, and the score frequency predicts none: choose obs "
                    "(with rows), fluctuation or magnitude."
                )
            if amplified and amplification:
                error = amplification[site.name].velocity_error(rankings[site.name])
            steps += _steps(site, layout, error, multiple)
        steps.sort(key=lambda step: step.price)  # stable: of equal ones, the earlier site
        return cls(tuple(steps), amplified)

    def cuts(self, amount: float, of: Literal["neurons", "parameters"]) -> tuple[dict[str, int], float]:
        """By site, how many neurons go until `amount` neurons or parameters are saved, and the predicted error of all of that.

        Raises `UserError` where that is more than may be cut.
        """
        taken = self.steps[: self.until(amount, of)]
        found: dict[str, int] = {}
        for step in taken:
            found[step.site] = found.get(step.site, 0) + step.neurons
        return found, sum(step.error for step in taken)

    def until(self, amount: float, of: Literal["neurons", "parameters"]) -> int:
        """How many steps save `amount` neurons or parameters; raises `UserError` where all of them together do not."""
        saved = 0
        for count, step in enumerate(self.steps):
            if saved >= amount:
                return count
            saved += getattr(step, of)
        if saved < amount:
            raise UserError(
                f"{amount:,.0f} {of} are to be saved, but only {saved:,} may go (one multiple of every MLP is kept, protected "
                "layers whole): ask for less, protect fewer layers, or choose a smaller multiple."
            )
        return len(self.steps)

    def figure(self, plan: PruningPlan | None = None, bytes_per_parameter: int = 2) -> Figure:
        """Memory saved (GB at `bytes_per_parameter`) against predicted error; `plan` is marked on it."""
        saved = torch.tensor([0.0, *(step.parameters for step in self.steps)], dtype=torch.float64).cumsum(0)
        error = torch.tensor([0.0, *(step.error for step in self.steps)], dtype=torch.float64).cumsum(0)
        size, unit = (1e9, "GB") if saved[-1] * bytes_per_parameter >= 1e8 else (1e6, "MB")
        figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        memory = saved * bytes_per_parameter / size
        axes.plot(memory[1:], error[1:], color="tab:blue")
        if plan is not None:
            per_site = {step.site: step.parameters / step.neurons for step in self.steps}
            at = sum(per_site.get(name, 0.0) * cut for name, cut in plan.cut.items())
            place = min(int(torch.searchsorted(saved, torch.tensor(at, dtype=torch.float64))), len(saved) - 1)
            axes.axvline(at * bytes_per_parameter / size, color="tab:orange", linewidth=1)
            axes.plot([at * bytes_per_parameter / size], [error[place]], "o", color="tab:orange", label=f"{error[place]:.3g}")
            axes.legend(title="this plan")
        axes.set_yscale("log")
        axes.set_xlim(0, None)
        axes.set_xlabel(f"{unit} saved at {bytes_per_parameter} bytes a parameter")
        axes.set_ylabel("predicted relative velocity error" if self.amplified else "predicted error (sum over all MLPs)")
        axes.set_title("Memory saved against predicted error")
        axes.grid(alpha=0.3)
        return figure


def protected_sites(layout: Layout, names: str | Sequence[str]) -> frozenset[str]:
    """Site names from a text such as "double-18, single-0, double-txt-3"; a block's name stands for all MLPs in it.

    Raises `UserError` for a name the model does not have.
    """
    parts = names.replace(",", " ").split() if isinstance(names, str) else names
    found: set[str] = set()
    for part in parts:
        kind, _, index = part.partition("-")
        block = (f"double-img-{index}", f"double-txt-{index}") if kind == "double" and index.isdigit() else (part,)
        found |= {layout.site(name).name for name in block}
    return frozenset(found)


def neuron_parameters(layout: Layout, site: Site) -> int:
    """How many parameters one neuron of a site has: its row or rows, their biases, and its column."""
    rows = 2 if site.gated else 1
    return rows * (layout.hidden + int(site.biased)) + layout.hidden


def _steps(site: Site, layout: Layout, error: torch.Tensor, multiple: int) -> list[Step]:
    """From the full width down to one multiple; the first step may be a part of one."""
    widths = [site.width, *range((site.width - 1) // multiple * multiple, 0, -multiple)]
    each = neuron_parameters(layout, site)
    neurons = [wide - narrow for wide, narrow in pairwise(widths)]
    added = [(error[site.width - narrow] - error[site.width - wide]).item() for wide, narrow in pairwise(widths)]
    prices = rising_means(added, [count * each for count in neurons])
    return [
        Step(site.name, count, count * each, more, price) for count, more, price in zip(neurons, added, prices, strict=True)
    ]


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
