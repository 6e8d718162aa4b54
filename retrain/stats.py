"""What became of retrained layers: numbers, as a table and as a picture.

stats = retrain_layers(...)                      # a LayerStats each
print(stats_table(stats))
stats_figure(stats).savefig("layer_stats.png")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..flux.blocks import blocks_of, sites_at
from ..flux.layout import Layout
from ..pruning.plan import PruningPlan


@dataclass(frozen=True)
class LayerStats:
    """What became of one layer. Losses ending in `_loss` are plain squared errors, as the original's; `relative_` ones are
    divided by the mean square of what is to be predicted: as cut, as training began (after the closed form), at the end.

    `lines` are neurons kept, by stream; thresholds are those of the plan, if it was made by any.
    """

    layer: int
    name: str
    img_lines: int | None
    txt_lines: int | None
    single_lines: int | None
    img_threshold: float | None
    txt_threshold: float | None
    initial_loss: float
    final_loss: float
    train_loss: float | None
    relative_cut: float
    relative_start: float
    relative_final: float
    method: str
    data: str
    steps: int
    seconds: float
    held_out_images: list[int]
    save_dtype: str


def cut_places(layout: Layout, plan: PruningPlan) -> set[int]:
    """The blocks that the plan cuts something of."""
    return {place for place in range(len(blocks_of(layout))) if any(site.name in plan.kept for site in sites_at(layout, place))}


def plan_stats(layout: Layout, plan: PruningPlan, place: int) -> dict[str, Any]:
    """What the plan says of a block, as fields of `LayerStats`."""
    lines = {site.stream: len(plan.kept.get(site.name, range(site.width))) for site in sites_at(layout, place)}
    limits = re.search(r"by threshold on \w+, img (\S+) txt (\S+)", plan.made)
    return {
        "img_lines": lines.get("img"),
        "txt_lines": lines.get("txt"),
        "single_lines": lines.get("single"),
        "img_threshold": float(limits[1]) if limits else None,
        "txt_threshold": float(limits[2]) if limits else None,
    }


def stats_table(stats: Sequence[LayerStats]) -> str:
    """Text, one line per layer: neurons kept, and the relative held-out losses as cut, as training began, at the end."""
    lines = [f"{'layer':<12}{'kept':>16}{'cut only':>11}{'start':>11}{'retrained':>11}{'steps':>7}{'seconds':>9}"]
    for layer in stats:
        kept = " + ".join(str(n) for n in (layer.img_lines, layer.txt_lines, layer.single_lines) if n is not None)
        losses = (layer.relative_cut, layer.relative_start, layer.relative_final)
        lines.append(
            f"{layer.name:<12}{kept:>16}"
            + "".join(f"{loss:>11.3g}" for loss in losses)
            + f"{layer.steps:>7}{layer.seconds:>9.1f}"
        )
    return "\n".join(lines)


def stats_figure(stats: Sequence[LayerStats]) -> Figure:
    """Held-out error of every layer: as it was cut, after the closed form, after training."""
    figure = Figure(figsize=(max(6.0, 0.45 * len(stats) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(stats))
    for name, label, color in (
        ("relative_cut", "as cut", "tab:gray"),
        ("relative_start", "as training began", "tab:orange"),
        ("relative_final", "retrained", "tab:blue"),
    ):
        axes.plot(places, [getattr(layer, name) for layer in stats], "o-", color=color, label=label)
    axes.set_yscale("log")
    axes.set_xticks(list(places), [layer.name for layer in stats], rotation=90)
    axes.set_ylabel("relative squared error, held-out images")
    axes.set_title("Before and after retraining, layer by layer")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
