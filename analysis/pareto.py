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
    one beats. What lies at about one place shares a word."""
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
        words: dict[tuple[str, str], list[Point]] = {}
        for point in points:  # one word for those that look alike
            words.setdefault((f"{point[0]:.2g}", f"{point[1]:.2g}"), []).append(point)
        for alike in words.values():
            bold = "bold" if any(point[:2] in best for point in alike) else "normal"
            right = alike[0][0] > every[0][0] + 0.75 * (every[-1][0] - every[0][0])
            axes.annotate(
                _joined([point[2] for point in alike]), alike[0][:2], (-6, 5) if right else (6, 5),
                textcoords="offset points", ha="right" if right else "left", fontsize=8, fontweight=bold,
            )  # fmt: skip
    axes.set(yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.05)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(shown) + 1, 5), fontsize=9)
    return figure


def _joined(words: Sequence[str]) -> str:
    """Such as 50 % bf16, fp8 of 50 % bf16 and 50 % fp8."""
    heads: dict[str, list[str]] = {}
    for word in dict.fromkeys(words):
        head, _, last = word.rpartition(" ")
        heads.setdefault(head, []).append(last)
    return "; ".join(f"{head} {', '.join(sorted(lasts))}".strip() for head, lasts in heads.items())
