"""Choosing what goes, and cutting it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .terminal import drawable, progress_bar, spread

if TYPE_CHECKING:
    from ..pruning.budget import BudgetCurve
    from ..pruning.dense import Dense
    from ..pruning.plan import PruningPlan
    from ..recording.internals import Internals
    from ..recording.store import HiddenStates


@dataclass(frozen=True)
class Cuts:
    """What goes: so many neurons of every MLP, those that fired too seldom, or as many as a budget says."""

    score: Annotated[str, typer.Option(help="frequency, magnitude, fluctuation, or obs (needs recorded rows).")] = "fluctuation"
    img_cut: Annotated[int, typer.Option(help="Neurons to cut from every img MLP.")] = 0
    txt_cut: Annotated[int, typer.Option(help="… every txt MLP.")] = 0
    single_cut: Annotated[int, typer.Option(help="… every single block.")] = 0
    double: Annotated[tuple[int, int] | None, typer.Option(help="First and last double block.")] = None
    single: Annotated[tuple[int, int] | None, typer.Option(help="First and last single block.")] = None
    img_threshold: Annotated[float, typer.Option(help="Cut img neurons that fired less often than this.")] = 0.0
    txt_threshold: Annotated[float, typer.Option(help="… txt neurons.")] = 0.0
    single_threshold: Annotated[float, typer.Option(help="… neurons of single blocks.")] = 0.0
    on_rate: Annotated[bool, typer.Option(help="Thresholds are per token (0 to 1), not counts.")] = False
    share: Annotated[float | None, typer.Option(help="Budget: share of all neurons to cut, 0 to 1.")] = None
    gigabytes: Annotated[float | None, typer.Option(help="Budget: GB to save at 16 bits.")] = None
    multiple: Annotated[int, typer.Option(help="Budget: widths are multiples of this.")] = 64
    protect: Annotated[str, typer.Option(help="Budget: layers to leave whole, such as 'double-18 single-0'.")] = ""

    def plan(
        self, dense: Dense, recorded: Internals, rows: HiddenStates | None, device: str
    ) -> tuple[PruningPlan, BudgetCurve | None]:
        """The plan, and for a budget the curve it was chosen on; `device` is where neurons are ranked."""
        from ..pruning.budget import BudgetCurve, by_budget, check_budget, protected_sites
        from ..pruning.plan import by_count, by_threshold
        from ..pruning.scores import rank

        counts = self.img_cut, self.txt_cut, self.single_cut
        limits = self.img_threshold, self.txt_threshold, self.single_threshold
        if [any(counts), any(limits), self.share is not None, self.gigabytes is not None].count(True) != 1:
            raise UserError(
                "What to cut is said in one way: by count (--img-cut, --txt-cut, --single-cut), by threshold (--img-threshold, "
                "…), or by a budget (--share or --gigabytes)."
            )
        protected = protected_sites(dense.layout, self.protect)
        if self.share is not None or self.gigabytes is not None:
            check_budget(dense.layout, self.share, self.gigabytes, self.multiple, protected)
        if any(limits):
            return by_threshold(dense, recorded, *limits, "rate" if self.on_rate else "counts", self.double, self.single), None
        with progress_bar() as update:
            rankings = rank(
                self.score, dense, recorded, rows, device=device, progress=lambda name, n, of: update(f"ranking {name}", n / of)
            )
        if any(counts):
            return by_count(dense, rankings, self.score, *counts, self.double, self.single), None
        curve = BudgetCurve.of(dense.layout, rankings, rows.amplification if rows else None, self.multiple, protected)
        return by_budget(dense, rankings, curve, self.score, self.share, self.gigabytes), curve


@spread
def plan(
    internals: Annotated[Path, typer.Argument(help="internals.safetensors")],
    checkpoint: Annotated[Path, typer.Option(help="The dense FLUX it was recorded on.")],
    cuts: Cuts,
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan to write.")] = Path("plan.safetensors"),
    rows: Annotated[Path | None, typer.Option(help="Folder that `record --rows` filled.")] = None,
    picture: Annotated[
        Path | None, typer.Option(callback=drawable, help="Budget: draw memory saved against predicted error.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
) -> None:
    """Choose which neurons to keep: by count, by threshold, or by a budget. Nothing is cut yet."""
    from ..files import check_replaces
    from ..pruning.dense import Dense
    from ..pruning.plan import FORMAT
    from ..recording.internals import Internals
    from ..recording.store import HiddenStates

    check_replaces(out, FORMAT)
    store = HiddenStates.open(rows) if rows else None
    made, curve = cuts.plan(Dense.open(checkpoint), Internals.load(internals), store, device)
    if picture and curve:
        curve.figure(made).savefig(picture, dpi=110)
    made.save(out)
    typer.echo(f"{made.table()}\n{out}: {_next(checkpoint, out, made.score, rows)}")


def _next(checkpoint: Path, plan: Path, score: str, rows: Path | None) -> str:
    """What to do with a plan: the repair that goes with its score."""
    repair = f" --repair affine --rows {rows}" if score == "obs" else ""
    return f"flux-poke prune {checkpoint} --plan {plan}{repair} -o pruned.safetensors"


def prune(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX (.safetensors).")],
    plan: Annotated[Path, typer.Option(help="plan.safetensors")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Pruned checkpoint to write.")],
    repair: Annotated[str, typer.Option(help="none, bias (needs --internals) or affine (needs --rows).")] = "none",
    internals: Annotated[Path | None, typer.Option(help="internals.safetensors")] = None,
    rows: Annotated[Path | None, typer.Option(help="Folder that `record --rows` filled.")] = None,
    fold: Annotated[bool, typer.Option(help="Also store what exact conversion of LoRAs needs after affine repair.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
) -> None:
    """Cut what a plan says, repair what is left, and write a smaller checkpoint that needs no other file."""
    from ..files import check_replaces
    from ..pruning.checkpoint import inspect, save_pruned
    from ..pruning.dense import PRUNED_FORMAT, Dense
    from ..pruning.plan import PruningPlan
    from ..pruning.repair import Repairs
    from ..pruning.surgery import Cut
    from ..recording.internals import Internals
    from ..recording.store import HiddenStates

    check_replaces(out, PRUNED_FORMAT)
    dense, loaded = Dense.open(checkpoint), PruningPlan.load(plan)
    recorded = Internals.load(internals) if internals else None
    store = HiddenStates.open(rows) if rows else None
    repairs = Repairs(dense, loaded, repair, recorded, store, plan.with_suffix(".repairs"), device)
    with progress_bar() as update:
        repairs.compute(lambda name, n, of: update(f"repairing {name}", 0.8 * n / of), fold)
        save_pruned(out, Cut(dense, loaded, repairs), fold, lambda key, n, of: update(f"writing {out}", 0.8 + 0.2 * n / of))
    typer.echo(f"{inspect(out)}\n{out}: {out.stat().st_size / 1e6:,.1f} MB, from {checkpoint.stat().st_size / 1e6:,.1f}")
