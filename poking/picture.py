"""Chosen neurons as a picture: where their effect lies, and the strongest by name.

neurons_figure(neurons).savefig("three.png")
"""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from ..recording.internals import site_order
from .neurons import Neurons

#: How many neurons are named.
NAMED = 15


def neurons_figure(neurons: Neurons) -> Figure:
    """Effect by MLP, and the strongest neurons with how many spreads they are from the others."""
    names = sorted(neurons.widths, key=site_order)
    effects = [_effect(neurons, name) for name in names]
    strongest = neurons.strongest(NAMED)
    height = max(3.6, 0.16 * len(names) + 1.4, 0.24 * len(strongest) + 1.4)
    figure = Figure(figsize=(11, height), layout="constrained", facecolor="white")
    figure.suptitle("\n".join(textwrap.wrap(neurons.totals(), 120)), fontsize=9)
    by_site, by_neuron = figure.subplots(1, 2)
    bars = by_site.barh(names, effects, color="#4c5b8c")
    counts = [len(neurons.sites[name].indices) if name in neurons.sites else 0 for name in names]
    by_site.bar_label(bars, [f"{count}" if count else "" for count in counts], fontsize=7, padding=2)
    by_site.set(title="effect by MLP, and how many neurons", xlabel="|m - m'| |W2[:, j]|, root of the sum of squares")
    by_site.invert_yaxis()
    by_site.tick_params(axis="y", labelsize=max(5, min(9, 400 / len(names))))
    by_site.margins(x=0.12)
    titles = [f"{name}:{index}" for name, index, _ in strongest]
    colors = ["#d98032" if known.difference.item() > 0 else "#4c5b8c" for _, _, known in strongest]
    by_neuron.barh(titles, [known.effect.item() for _, _, known in strongest], color=colors)
    by_neuron.set(title="strongest neurons (orange: higher with it)", xlabel="|m - m'| |W2[:, j]|")
    by_neuron.invert_yaxis()
    by_neuron.tick_params(axis="y", labelsize=8)
    return figure


def _effect(neurons: Neurons, name: str) -> float:
    if name not in neurons.sites:
        return 0.0
    return neurons.sites[name].measured.effect.square().sum().sqrt().item()
