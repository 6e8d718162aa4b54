"""Which of several models are worth having: those that no other one beats in everything.

best = pareto([(2.4, 0.01), (1.2, 0.05), (1.3, 0.06)])           # [True, True, False]; less is better
figure = pareto_figure({"obs": [(1.2, 0.05, "50 %")], ...}, "half of it", "GB", "velocity error")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

#: x, y, and a word beside the point.
Point = tuple[float, float, str]
_MARKERS = "osD^vP*X"


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Of each point, whether no other one is at most as large in everything and smaller in something."""
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def pareto_figure(series: Mapping[str, Sequence[Point]], title: str, xlabel: str, ylabel: str) -> Figure:
    """Points of every series, `y` on a logarithmic scale (those at 0 are left out), with a line through those that no other
    one beats."""
    figure = Figure(figsize=(8.5, 5.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    shown = {name: [point for point in points if point[1] > 0] for name, points in series.items()}
    every = sorted({point[:2] for points in shown.values() for point in points})
    best = [point for point, kept in zip(every, pareto(every), strict=True) if kept]
    if best:
        axes.step(*zip(*best, strict=True), where="post", color="0.6", linewidth=1.5, zorder=1, label="none is better")
    for number, (name, points) in enumerate(shown.items()):
        if points:
            x, y, _ = zip(*points, strict=True)
            axes.scatter(x, y, 55, marker=_MARKERS[number % len(_MARKERS)], color=f"C{number % 10}", label=name, zorder=2)
        for x_at, y_at, word in points:
            bold = "bold" if (x_at, y_at) in best else "normal"
            axes.annotate(word, (x_at, y_at), (6, 5), textcoords="offset points", fontsize=8, fontweight=bold)
    axes.set(yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
