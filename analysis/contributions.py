"""What each block contributes, in numbers and as a chart.

rows = block_contributions(taps)
contributions_figure(rows).savefig("contributions.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn import functional as F

from .lens import Lens
from .taps import BlockTaps, Tap

#: A block after which the lens's error is lower by less than this adds next to nothing.
REPLACEABLE = 0.01


@dataclass(frozen=True)
class Contribution:
    """One tap in numbers, means over the batch.

    Attributes:
        change: |tokens after the block - before| / |before|.
        cosine: between its velocity and that of the step's last tapped block.
        error: squared error of its x0 against the final x0 (the last tap's), relative to the final x0's square.
    """

    tap: Tap
    change: float
    cosine: float
    error: float


def block_contributions(taps: BlockTaps, number: int | None = None) -> list[Contribution]:
    """Every tap in numbers, in order; of image `number` of the batch, or of all of them. `UserError` where there is none."""
    taps.check_not_empty()
    rows = slice(None) if number is None else slice(number, number + 1)
    ordered = list(taps)
    final = taps.latent(ordered[-1])[rows].flatten(1)
    found = []
    for _, of_step in groupby(ordered, lambda tap: tap.step):
        tapped = list(of_step)
        goal = taps.velocity(tapped[-1])[rows].flatten(1)
        for tap in tapped:
            cosine = F.cosine_similarity(taps.velocity(tap)[rows].flatten(1), goal)
            error = (taps.latent(tap)[rows].flatten(1) - final).square().sum(1) / final.square().sum(1)
            found.append(Contribution(tap, taps.change(tap)[rows].mean().item(), cosine.mean().item(), error.mean().item()))
    return found


def contributions_figure(rows: Sequence[Contribution]) -> Figure:
    """Change, cosine and error along the blocks, one line a step."""
    blocks = sorted({row.tap.block for row in rows})
    steps = sorted({row.tap.step for row in rows})
    place = {block: index for index, block in enumerate(blocks)}
    figure = _figure(len(blocks), 8.5)
    axes = figure.subplots(3, 1, sharex=True)
    scale = ScalarMappable(Normalize(steps[0], max(steps[-1], steps[0] + 1)), "viridis")
    colors = dict(zip(steps, scale.to_rgba(np.array(steps)), strict=True))
    panels = (
        ("change", "how much the block changes its tokens", "|after - before| / |before|", "linear"),
        ("cosine", "how far its velocity points where the step's last block's does", "cosine", "linear"),
        ("error", "how far its x0 is from the final one", "squared error / square of the final x0", "log"),
    )
    for axis, (name, title, label, yscale) in zip(axes, panels, strict=True):
        for step in steps:
            of_step = [row for row in rows if row.tap.step == step]
            values = np.array([getattr(row, name) for row in of_step])
            # An error of exactly 0 (the final block's) has no place on a logarithmic axis.
            values = np.where(values > 0, values, np.nan) if yscale == "log" else values
            axis.plot([place[row.tap.block] for row in of_step], values, ".-", color=colors[step], linewidth=1.2)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel(label, fontsize=8)
        axis.set_yscale(yscale)
        axis.grid(color="0.5", alpha=0.25, linewidth=0.6)
    _name_blocks(axes, [block.name for block in blocks])
    if len(steps) > 1:
        figure.colorbar(scale, ax=axes, label="step", fraction=0.03, pad=0.01, ticks=MaxNLocator(integer=True))
    return figure


def lens_figure(lens: Lens) -> Figure:
    """How replaceable each block is: the part of the last block's tokens that no affine map of a block's own explains."""
    blocks = sorted(lens.errors)
    tuned = np.array([lens.errors[block] for block in blocks])
    raw = np.array([lens.raw_errors[block] for block in blocks])
    figure = _figure(len(blocks) + 1, 6.5)
    figure.suptitle(
        f"Lens fitted on {lens.rows:,} tokens of {lens.images:,} images, errors on images it was not fitted on", fontsize=11
    )
    errors, falls = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    errors.plot(raw, ".-", color="0.6", label="its tokens as they are")
    errors.plot(tuned, ".-", color="#4c5b8c", label="through the lens")
    errors.set_yscale("log")
    errors.set_ylabel("unexplained part", fontsize=8)
    errors.set_title("how far each block's tokens predict the last block's", fontsize=10, loc="left")
    errors.legend(fontsize=8)
    # What a block adds is the error before it less the error after it; after the last one there is none.
    added = tuned - np.append(tuned[1:], 0.0)
    falls.bar(np.arange(1, len(blocks) + 1), added, color=np.where(added < REPLACEABLE, "#d98032", "#4c5b8c"))
    falls.set_ylabel("fall of the error", fontsize=8)
    falls.set_title(
        f"what each block adds that no affine map can (orange: under {REPLACEABLE:.0%}, replaceable)", fontsize=10, loc="left"
    )
    for axis in (errors, falls):
        axis.grid(color="0.5", alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    _name_blocks((errors, falls), [*(block.name for block in blocks), "last block"])
    return figure


def _figure(blocks: int, height: float) -> Figure:
    return Figure(figsize=(max(7.0, min(16.0, 3 + 0.22 * blocks)), height), layout="constrained", facecolor="white")


def _name_blocks(axes: Sequence[Any], names: Sequence[str]) -> None:
    """Ticks for blocks, the single ones on a grey ground."""
    doubles = sum(name.startswith("double") for name in names)
    for axis in axes:
        axis.set_xlim(-0.5, len(names) - 0.5)
        if doubles < len(names):
            axis.axvspan(doubles - 0.5, len(names) - 0.5, color="0.5", alpha=0.1, zorder=0)
    axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=max(5, min(9, 500 / len(names))))
