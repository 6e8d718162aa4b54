"""What ComfyUI's page draws on a node, as data: `web/charts.js` draws it, in the colours of the page, and tells what is under
the pointer. The figures of the same (`report.py` and others) are for files, and for pages that do not.

    line_chart("Noise", range(21), {"sigma": sigmas}, "step", "sigma")
    bar_chart("Kept", names, {"kept": kept, "cut": cut}, "neurons")
    internals_map(internals)

Each is JSON of less than 100 KB for every FLUX there is.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..recording.internals import Internals
from .report import internals_summaries

#: Values of a map, whatever its shape: 4 bytes each, in base64.
MOST_VALUES = 15_000
#: Columns of a map of few rows.
MOST_COLUMNS = 256


def line_chart(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    *,
    labels: Sequence[str] | None = None,
    log: bool = False,
    mark: int | None = None,
    more: Mapping[str, Sequence[Any]] | None = None,
    drag: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Lines over `x`, ascending.

    Args:
        labels: of the points, where `x` is only their order. log: a logarithmic scale of what is drawn.
        mark: which point is marked. more: what else is told of each point, by name.
        drag: what dragging the mark sets: `widget`, the node's number; `unit`, its other widget that says what the number is;
            and `to`, by the value of that one, the number at each point (0: none).
    """
    chart = {"kind": "lines", "title": title, "x": _short(x), "xlabel": xlabel, "ylabel": ylabel, "log": log}
    chart["series"] = [{"name": name, "y": _short(y)} for name, y in series.items()]
    optional = {"labels": labels and list(labels), "mark": mark, "more": more and dict(more), "drag": drag and dict(drag)}
    return {**chart, **{key: value for key, value in optional.items() if value is not None}}


def bar_chart(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]], xlabel: str) -> dict[str, Any]:
    """A row for each name, with the values of all series one after the other."""
    values = [{"name": name, "values": _short(row)} for name, row in series.items()]
    return {"kind": "bars", "title": title, "names": list(names), "series": values, "xlabel": xlabel}


def internals_map(internals: Internals) -> dict[str, Any]:
    """How often neurons fire by MLP, the most active first, with which ones they are, and shares of silent and always-on ones.

    Rows are sampled evenly by rank where an MLP has more neurons than the map has columns.
    """
    summaries = internals_summaries(internals)
    columns = max(1, min(MOST_COLUMNS, MOST_VALUES // len(summaries)))
    values = np.empty((len(summaries), columns), "<u2")
    neurons = np.empty_like(values)
    for row, summary in enumerate(summaries):
        rate = internals.sites[summary.name].rate.numpy()
        order = np.argsort(-rate, kind="stable")[np.linspace(0, len(rate) - 1, columns).round().astype(int)]
        values[row] = (rate[order].clip(0, 1) * 65535).round()
        neurons[row] = order.clip(max=65535)
    return {
        "kind": "map",
        "title": "How often neurons fire",
        "names": [summary.name for summary in summaries],
        "columns": columns,
        "values": base64.b64encode(values.tobytes()).decode(),
        "neurons": base64.b64encode(neurons.tobytes()).decode(),
        "widths": [summary.neurons for summary in summaries],
        "silent": _short([(summary.dead + summary.rare) / summary.neurons for summary in summaries]),
        "always": _short([summary.always / summary.neurons for summary in summaries]),
        "caption": "Bright: often. Beside it: shares of neurons that fire at fewer than 0.1 % of tokens, or at nearly all.",
    }


def _short(values: Sequence[float]) -> list[float]:
    """Numbers to four digits, as charts need them."""
    return [value if isinstance(value, int) else float(f"{value:.4g}") for value in values]
