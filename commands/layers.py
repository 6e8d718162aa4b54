"""Retraining layers, and checkpoints with them in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from .terminal import Device, MovedCheckpoint, number, progress_bar, say_written, seed, spread, typed, whole

Layers = Annotated[str, typer.Option(help="0-18, or 0,3,7 (single blocks count on), or 'double 3, single'.")]
TrainedOn = Annotated[Literal["auto", "blocks", "rows"], typer.Option(help="What of the recording to train on.")]


@dataclass(frozen=True)
class Training:
    """How to train: fields of `retrain.options.Options`; None leaves them to the method."""

    steps: Annotated[int | None, whole(help="Gradient steps (default: 32; distill 200).", least=1)] = None
    learning_rate: Annotated[
        float | None, number(help="Highest one (5e-4); it rises first and falls to zero.", least=1e-12, most=100.0)
    ] = None
    batch: Annotated[int | None, whole(help="Images at steps, of one batch (default: 8; distill 32).", least=1)] = None
    eval_every: Annotated[int | None, whole(help="Steps between looks at held-out images (16; distill 50).", least=1)] = None
    patience: Annotated[int | None, whole(help="Looks without progress before it stops (4).", least=1)] = None
    eval_share: Annotated[float | None, number(help="Share of the images that are held out (0.2).", least=0.0, most=0.5)] = None
    seed: Annotated[int, seed(help="Of the held-out images and the batches.", most=2**31 - 1)] = 0
    thickness: Annotated[int, whole(help="Consecutive blocks trained together.", least=1)] = 1
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Train on what the retrained layers before give, one after the other.")
    ] = False
    save_dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, float8_e4m3fn or float8_e5m2.")] = "bfloat16"
    just_evaluate: Annotated[bool, typer.Option("--just-evaluate", help="Only measure; write nothing.")] = False
    mixed_precision: Annotated[bool, typer.Option("--mixed-precision", help="Products in bfloat16.")] = False
    optimizer: Annotated[Literal["adamw", "adafactor"], typer.Option(help="adafactor takes less memory.")] = "adamw"
    recompute: Annotated[bool, typer.Option("--recompute", help="distill: gradient checkpointing, slower in less memory.")] = (
        False
    )
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for event files.")] = None
    device: Device = "cpu"


@spread
def retrain(
    plan: Annotated[Path, typer.Argument(help="A plan, as `plan` makes it.")],
    training: Training,
    layers: Layers = "all",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the layers (default: one that is named by the plan).")
    ] = None,
    method: Annotated[
        Literal["closed form", "gradient", "both", "distill"],
        typer.Option(help="distill: all layers at once, on trajectories."),
    ] = "both",
    on: TrainedOn = "auto",
    checkpoint: MovedCheckpoint = None,
    recording: Annotated[
        Path | None,
        typer.Option(help="What to train on, if not the plan's recording; the original flux-poke's block states, too."),
    ] = None,
) -> None:
    """Train what a plan leaves of the layers against what the dense model did. @arguments.txt reads options from a file."""
    from ..pruning.plan import PruningPlan
    from ..pruning.planning import open_dense, open_recording
    from ..recording.recording import Recording
    from ..retrain import layers as retraining
    from ..retrain.files import default_folder, draw_stats, stats_table

    loaded = PruningPlan.load(plan)
    if recording is not None and recording.is_dir() and not Recording.at(recording).kinds:
        recorded = Recording.at(recording)  # block states of the original flux-poke
    else:
        recorded = open_recording(loaded, recording)
    given = open_dense(loaded, checkpoint), loaded, recorded
    folder = out or Path(default_folder(loaded))
    with progress_bar() as progress:
        stats = retraining.retrain(method, *given, folder, layers, on, progress=progress, **vars(training))
    typer.echo(stats_table(stats))
    if not training.just_evaluate:
        picture = draw_stats(folder)
        typer.echo(f"{folder}: {len(stats)} layers, {picture}\n{typed('replace', folder, '-o', 'replaced.safetensors')}")


def replace(
    layers: Annotated[Path, typer.Argument(help="Folder that `retrain` filled, or the original flux-poke.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint to write.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The dense FLUX, where it moved, or the layers do not tell (the original flux-poke's).")
    ] = None,
    first: Annotated[int | None, whole(help="First layer to replace (default: 0).", least=0)] = None,
    last: Annotated[int | None, whole(help="Last one (default: the last in the folder).", least=0)] = None,
) -> None:
    """Write a checkpoint with retrained layers in place of the dense ones; it needs no other file."""
    from ..files import check_not_read, check_replaces, check_writable
    from ..pruning.checkpoint import save_pruned
    from ..pruning.dense import PRUNED_FORMAT
    from ..retrain.replaced import Replaced, RetrainedLayers, open_dense_of

    check_replaces(out, PRUNED_FORMAT)
    check_writable(out)
    dense = open_dense_of(layers, checkpoint)
    check_not_read(out, [dense.path])
    opened = RetrainedLayers.open(layers, dense, first, last)
    with progress_bar() as progress:
        save_pruned(out, Replaced(dense, opened), progress=progress)
    for note in opened.notes(dense.layout):
        typer.echo(note)
    say_written(out, Path(dense.path))
