"""What was recorded, as a table and as one picture.

    print(internals_table(internals))
    internals_figure(internals).savefig("internals.png")

Figures are made without pyplot, so nothing is registered anywhere and threads do not meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from ..flux.layout import FAMILY_NAMES
from ..recording.internals import Internals
from ..recording.statistics import SiteInternals
from .sheets import GROUND, INK, PALE

#: A neuron that fires at fewer than one token in a thousand counts as nearly dead, at more than 999 as nearly always on.
RARE = 1e-3


@dataclass(frozen=True)
class SiteSummary:
    """One line of the table. Rates are shares of tokens; `variance` is the mean over neurons."""

    name: str
    neurons: int
    tokens: int
    rate: float
    dead: int
    rare: int
    always: int
    variance: float

    @classmethod
    def of(cls, name: str, site: SiteInternals) -> SiteSummary:
        rate = site.rate
        return cls(
            name=name,
            neurons=len(rate),
            tokens=site.tokens,
            rate=rate.mean().item(),
            dead=int((site.fires == 0).sum()),
            rare=int(((site.fires > 0) & (rate < RARE)).sum()),
            always=int((rate > 1 - RARE).sum()),
            variance=site.variance.mean().item(),
        )


def internals_summaries(internals: Internals) -> list[SiteSummary]:
    return [SiteSummary.of(name, site) for name, site in internals.sites.items()]


def internals_title(internals: Internals) -> str:
    """One line: family, neurons, runs, steps."""
    what = f"{sum(len(site.fires) for site in internals.sites.values()):,} neurons in {len(internals.sites)} MLPs"
    if internals.fingerprint is None:
        unknown = "model and tokens are not known, rates are relative to the busiest neuron"
        return f"Counts of the original flux-poke: {what}; {unknown}"
    runs = f"{internals.runs:,} run{'' if internals.runs == 1 else 's'}, {internals.steps:,} model calls"
    return f"{FAMILY_NAMES[internals.family]}: {what}, {runs}, last {internals.updated}"


def internals_table(internals: Internals) -> str:
    """The title and one line per MLP, for people; fixed-width text."""
    header = f"{'site':<15}{'neurons':>9}{'tokens':>13}{'fires':>8}{'dead':>7}{'rare':>7}{'always':>8}{'variance':>11}"
    lines = [
        f"{s.name:<15}{s.neurons:>9,}{s.tokens:>13,}{s.rate:>8.1%}{s.dead:>7,}{s.rare:>7,}{s.always:>8,}{s.variance:>11.3g}"
        for s in internals_summaries(internals)
    ]
    legend = f"fires: mean share of tokens · dead: never · rare: under {RARE:.1%} · always: over {1 - RARE:.1%}"
    return "\n".join([internals_title(internals), header, *lines, legend, *filter(None, [padding_note(internals)])])


def padding_note(internals: Internals) -> str:
    """What is to be known of words that only fill a text up; empty where none of them counts."""
    if internals.fingerprint is None or not (internals.padded or (internals.padded is None and internals.family == "flux1")):
        return ""
    return (
        "What short texts are filled up with counts as words in txt and single MLPs, where the text encoder does so (FLUX.1's, "
        "up to 256 words): ComfyUI's conditioning does not tell. Calibrate leaves it out."
    )


def internals_figure(internals: Internals) -> Figure:
    """Firing rate of every neuron by site and rank, its distribution per site, and the dead and always-on shares."""
    names = list(internals.sites)
    summaries = internals_summaries(internals)
    height = max(4.5, 0.16 * len(names) + 2.2)
    figure = Figure(figsize=(13, height), layout="constrained", facecolor="white")
    figure.suptitle(internals_title(internals), fontsize=11)
    ranked, histogram, ends = figure.subplots(1, 3, width_ratios=(5, 4, 2), sharey=True)

    ranks = np.linspace(0, 1, 400)
    rates = [np.sort(internals.sites[name].rate.numpy())[::-1] for name in names]
    by_rank = np.stack([np.interp(ranks, np.linspace(0, 1, len(rate)), rate) for rate in rates])
    extent = (0, 100, len(names) - 0.5, -0.5)
    shown = ranked.imshow(by_rank, aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    ranked.set(title="firing rate", xlabel="neurons, most active first (%)")
    ranked.set_yticks(range(len(names)), names, fontsize=max(5, min(9, 400 / len(names))))
    figure.colorbar(shown, ax=ranked, fraction=0.04, pad=0.01)

    edges = np.linspace(0, 1, 51)
    shares = np.stack([np.histogram(rate, edges)[0] / len(rate) for rate in rates])
    shown = histogram.imshow(
        np.where(shares > 0, shares, np.nan), aspect="auto", extent=extent, cmap="viridis", norm=LogNorm(1e-4, 1),
        interpolation="nearest",
    )  # fmt: skip
    histogram.set(title="how many neurons fire how often", xlabel="share of tokens at which they fire (%)")
    histogram.set_facecolor("0.93")
    figure.colorbar(shown, ax=histogram, fraction=0.05, pad=0.01, label="share of neurons")

    y = np.arange(len(names))
    silent = np.array([100 * (s.dead + s.rare) / s.neurons for s in summaries])
    always = np.array([100 * s.always / s.neurons for s in summaries])
    ends.barh(y, -silent, color="#4c5b8c", label=f"fire under {RARE:.1%}")
    ends.barh(y, always, color="#d98032", label=f"fire over {1 - RARE:.1%}")
    reach = max(5.0, silent.max(), always.max()) * 1.1
    ends.set(title="silent | always on", xlabel="neurons (%)", xlim=(-reach, reach))
    ends.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ends.axvline(0, color="0.3", linewidth=0.8)
    ends.legend(fontsize=7, loc="lower right")
    for axis in (histogram, ends):
        axis.tick_params(left=False)
    return figure


def darkened(figure: Figure) -> Figure:
    """The figure with pale letters on the dark ground of sheets, for nodes."""
    ground, ink, pale = ("#" + bytes(color).hex() for color in (GROUND, INK, PALE))
    figure.set_facecolor(ground)
    for axes in figure.axes:
        axes.set_facecolor(ground)
        axes.tick_params(which="both", colors=ink)
        axes.spines[:].set_color(pale)
    for text in figure.findobj(Text):
        text.set_color(ink)
    for legend in figure.findobj(Legend):
        legend.get_frame().set(facecolor=ground, edgecolor=pale)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """The figure as pixels [height, width, 3], uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
