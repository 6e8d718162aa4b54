"""The noise levels of a run as a small picture, sigmas_figure(FluxTimer(20).sigmas().tolist()), or for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .charts import line_chart


def sigmas_chart(sigmas: Sequence[float]) -> dict[str, Any]:
    """Noise levels by step, for a page (`charts.py`)."""
    return line_chart(f"Noise in {len(sigmas) - 1} steps", range(len(sigmas)), {"sigma": sigmas}, "step", "sigma")


def sigmas_figure(sigmas: Sequence[float]) -> Figure:
    """Noise levels by step; the dashed line is what even steps would be."""
    steps = range(len(sigmas))
    figure = Figure(figsize=(4.6, 2.8), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.plot([0, steps[-1]], [sigmas[0], 0], color="0.7", linestyle="--", linewidth=1)
    axis.plot(steps, sigmas, color="#d98032", marker="o", markersize=4 if len(sigmas) <= 60 else 0)
    axis.set(title=f"noise in {steps[-1]} steps", xlabel="step", ylabel="sigma", ylim=(-0.03, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    return figure
