"""Retraining layers, and checkpoints with them in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError
from .plans import Cuts
from .terminal import progress_bar, spread

if TYPE_CHECKING:
    from ..pruning.dense import Dense
    from ..pruning.plan import PruningPlan
    from ..recording.store import HiddenStates


@dataclass(frozen=True)
class Training:
    """How to train: fields of `retrain.options.Options`; None leaves them to the method."""

    steps: Annotated[int | None, typer.Option(help="Gradient steps (default: 32; distill 200).")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Highest one (5e-4); it rises first and falls to zero.")] = None
    batch: Annotated[int | None, typer.Option(help="Images at steps, of one batch (default: 8; distill 32).")] = None
    eval_every: Annotated[int | None, typer.Option(help="Steps between looks at held-out images (16; distill 50).")] = None
    patience: Annotated[int | None, typer.Option(help="Looks without progress before it stops (4).")] = None
    eval_share: Annotated[float | None, typer.Option(help="Share of the images to judge by (0.2).")] = None
    seed: Annotated[int, typer.Option(help="Of the split and the batches.")] = 0
    thickness: Annotated[int, typer.Option(help="Consecutive blocks trained together.")] = 1
    sequential: Annotated[bool, typer.Option(help="Train on what the retrained layers before give.")] = False
    save_dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, float8_e4m3fn or float8_e5m2.")] = "bfloat16"
    just_evaluate: Annotated[bool, typer.Option(help="Only measure; write nothing.")] = False
    mixed_precision: Annotated[bool, typer.Option(help="Products in bfloat16.")] = False
    optimizer: Annotated[Literal["adamw", "adafactor"], typer.Option(help="adafactor takes less memory.")] = "adamw"
    recompute: Annotated[bool, typer.Option(help="distill: gradient checkpointing, slower in less memory.")] = False
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for event files.")] = None
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu"


@spread
def retrain(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX (.safetensors).")],
    hidden_states: Annotated[
        Path, typer.Option(help="Folder that `record --hidden-states` filled, or the original flux-poke.")
    ],
    cuts: Cuts,
    training: Training,
    plan: Annotated[Path | None, typer.Option(help="plan.safetensors; or --internals and what to cut.")] = None,
    internals: Annotated[Path | None, typer.Option(help="internals.safetensors, to choose by what to cut.")] = None,
    layers: Annotated[str, typer.Option(help="0-18, or 0,3,7 (single blocks count on), or 'double 3, single'.")] = "all",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the layers.")] = Path("retrained_layers"),
    method: Annotated[
        Literal["closed form", "gradient", "both", "distill"],
        typer.Option(help="distill: all layers at once, on trajectories."),
    ] = "both",
    on: Annotated[Literal["auto", "blocks", "rows"], typer.Option(help="What of the folder to train on.")] = "auto",
) -> None:
    """Train what a plan leaves of the layers against what the dense model did. @arguments.txt reads options from a file."""
    from ..pruning.dense import Dense
    from ..retrain import methods
    from ..retrain.files import draw_stats
    from ..retrain.options import Progress
    from ..retrain.stats import stats_table

    dense = Dense.open(checkpoint)
    chosen = _chosen(dense, plan, internals, cuts, hidden_states, training.device)
    with progress_bar() as update:

        def report(progress: Progress) -> None:
            done = (progress.layers_done + progress.step / progress.steps) / progress.layers
            update(f"{progress.layer}: held-out loss {progress.held_out_loss:.3g}", done)

        stats = methods.retrain(method, dense, chosen, hidden_states, out, layers, on, report, **vars(training))
    typer.echo(stats_table(stats))
    if not training.just_evaluate:
        picture = draw_stats(out)
        typer.echo(
            f"{out}: {len(stats)} layers, {picture}\nflux-poke replace {checkpoint} --layers-dir {out} -o OUT.safetensors"
        )


def _chosen(
    dense: Dense, plan: Path | None, internals: Path | None, cuts: Cuts, hidden_states: Path, device: str
) -> PruningPlan:
    """The plan, from its file or made now."""
    from ..pruning.plan import PruningPlan
    from ..recording.internals import Internals
    from ..recording.store import MANIFEST, HiddenStates

    if plan is not None and internals is None:
        if cuts != Cuts():
            raise UserError(f"{plan} says already what to cut: leave out the options for that, or give --internals instead.")
        return PruningPlan.load(plan)
    if plan is not None or internals is None:
        raise UserError(
            "What to cut is said once: give --plan FILE, or --internals FILE with --img-cut, --img-threshold, --share or such."
        )
    rows: HiddenStates | None = HiddenStates.open(hidden_states) if (hidden_states / MANIFEST).exists() else None
    made, _ = cuts.plan(dense, Internals.load(internals), rows, device)
    typer.echo(made.table())
    return made


def replace(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX (.safetensors).")],
    layers_dir: Annotated[Path, typer.Option(help="Folder that `retrain` filled, or the original flux-poke.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint to write.")],
    first: Annotated[int | None, typer.Option(help="First layer to replace (default: 0).")] = None,
    last: Annotated[int | None, typer.Option(help="Last one (default: the last in the folder).")] = None,
) -> None:
    """Write a checkpoint with retrained layers in place of the dense ones; it needs no other file."""
    from ..pruning.checkpoint import inspect, save_pruned
    from ..pruning.dense import Dense
    from ..retrain.replaced import Replaced, RetrainedLayers

    dense = Dense.open(checkpoint)
    layers = RetrainedLayers.open(layers_dir, dense, first, last)
    with progress_bar() as update:
        save_pruned(out, Replaced(dense, layers), progress=lambda key, n, of: update(f"writing {out}", n / of))
    if layers.missing:
        typer.echo(layers.describe_missing(dense.layout))
    typer.echo(f"{inspect(out)}\n{out}: {out.stat().st_size / 1e6:,.1f} MB, from {checkpoint.stat().st_size / 1e6:,.1f}")
