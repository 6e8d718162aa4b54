"""Ranking, repairing, retraining and sweeping on many machines, on Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError
from .cluster import Cluster, tell
from .layers import Layers, TrainedOn, Training
from .plans import Repair
from .terminal import Device, number, progress_bar, seed, spread, table, typed, whole

if TYPE_CHECKING:
    from ..cluster.sites import Source
    from ..cluster.tasks import Terms
    from ..progress import Progress
    from ..pruning.plan import PruningPlan

Patience = Annotated[
    float, number(help="Seconds that one task may take before its worker is ended and replaced.", least=1, most=10**7)
]
Checkpoint = Annotated[str | None, typer.Option(help="The dense FLUX, where it moved since the plan was made, or its URL.")]
Recorded = Annotated[str | None, typer.Option(help="The recording, where it moved since the plan was made, or its URL.")]


def _terms(cluster: Cluster, patience: float, progress: Progress) -> Terms:
    from ..cluster.tasks import Terms

    return Terms(cluster.needs, cluster.workers, patience, progress, lambda line: typer.echo(line, err=True))


def _device(cluster: Cluster, given: str) -> str:
    """Where a worker computes: on its GPU, where it has one."""
    return "cuda" if cluster.gpus_per_worker and given == "cpu" else given


def _source(plan: PruningPlan, checkpoint: str | None, recording: str | None) -> Source:
    from ..cluster.sites import Source

    return Source(_known(checkpoint or plan.checkpoint, "checkpoint"), _known(recording or plan.recording, "recording"))


def _known(place: str, what: str) -> str:
    if not place:
        raise UserError(f"The plan does not tell what {what} it is of: give it with --{what}.")
    return place


@spread
def rank(
    recording: Annotated[str, typer.Argument(help="Folder of a recording that all machines reach, or its URL.")],
    checkpoint: Annotated[str, typer.Option(help="The dense FLUX it was recorded on, where all machines reach it; or a URL.")],
    cluster: Cluster,
    patience: Patience = 14_400.0,
    device: Device = "cpu",
) -> None:
    """Rank the neurons of every MLP by obs, a task for each: the long part of `plan`, which then finds it done."""
    from ..cluster.sites import Source
    from ..cluster.sites import rank as rank_there

    source = Source(checkpoint, recording)
    with cluster.connected(), progress_bar() as progress:
        done = rank_there(source, _terms(cluster, patience, progress), _device(cluster, device))
    tell(done, "rankings", typed("plan", recording, "--checkpoint", checkpoint, "--neurons", 0.5))


@spread
def repair(
    plan: Annotated[Path, typer.Argument(help="A plan, as `plan` makes it.")],
    cluster: Cluster,
    repair: Repair = None,
    fold: Annotated[bool, typer.Option("--fold", help="With affine: also what exact conversion of LoRAs needs.")] = False,
    checkpoint: Checkpoint = None,
    recording: Recorded = None,
    patience: Patience = 14_400.0,
    device: Device = "cpu",
) -> None:
    """Repair every MLP that a plan cuts, a task for each: the long part of `prune`, which then finds it done."""
    from ..cluster.sites import repair as repair_there
    from ..pruning.plan import PruningPlan
    from ..pruning.scores import REPAIR_OF

    loaded = PruningPlan.load(plan)
    method = repair or REPAIR_OF.get(loaded.score, "none")
    if fold and method != "affine":
        raise UserError(f"--fold works out what affine repair leaves, and the repair is {method}: leave it out.")
    if method != "affine" and not loaded.ranks:
        raise UserError(f"Repair = {method} takes no work beforehand: run {typed('prune', plan, '-o', 'pruned.safetensors')}.")
    source = _source(loaded, checkpoint, recording)
    with cluster.connected(), progress_bar() as progress:
        done = repair_there(source, loaded, method, _terms(cluster, patience, progress), fold, _device(cluster, device))
    tell(done, "MLPs and modulation layers" if loaded.ranks else "MLPs", typed("prune", plan, "-o", "pruned.safetensors"))


@spread
def retrain(
    plan: Annotated[Path, typer.Argument(help="A plan, as `plan` makes it.")],
    cluster: Cluster,
    training: Training,
    layers: Layers = "all",
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Folder that all machines reach, or a URL (default: named by the plan)."),
    ] = None,
    method: Annotated[
        Literal["closed form", "gradient", "both", "distill"],
        typer.Option(help="distill trains all layers at once: `flux-poke retrain` does."),
    ] = "both",
    on: TrainedOn = "auto",
    checkpoint: Checkpoint = None,
    recording: Recorded = None,
    task_patience: Patience = 86_400.0,
) -> None:
    """Train what a plan leaves of the layers, a task for each layer, or for each --thickness of them."""
    from ..cluster.layers import layer_options, stats_of
    from ..cluster.layers import retrain as retrain_there
    from ..pruning.plan import PruningPlan
    from ..retrain.files import default_folder, stats_table

    loaded = PruningPlan.load(plan)
    options = layer_options(method, **vars(training))
    options = replace(options, device=_device(cluster, options.device))
    folder, source = out or default_folder(loaded), _source(loaded, checkpoint, recording)
    with cluster.connected(), progress_bar() as progress:
        done = retrain_there(source, loaded, options, folder, _terms(cluster, task_patience, progress), layers, on)
    typer.echo(stats_table(stats_of(done)))
    written = f"{folder}\n{typed('replace', folder, '-o', 'replaced.safetensors')}"
    tell(done, "layers" if options.thickness == 1 else "groups of layers", "" if options.just_evaluate else written)


@spread
def sweep(
    recording: Annotated[str, typer.Argument(help="Folder of a recording that all machines reach, or its URL.")],
    checkpoint: Annotated[str, typer.Option(help="A FLUX of the tiny kind, where all machines reach it; or a URL.")],
    prompts: Annotated[str, typer.Option(help="Held-out prompts to measure on: text file, or hf:DATASET#COLUMN.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder that all machines reach, or a URL.")],
    cluster: Cluster,
    budgets: Annotated[str, typer.Option(help="Shares of the neurons to cut.")] = ".25,.5,.75",
    scores: Annotated[
        str, typer.Option(help="Of obs (by budget), frequency, magnitude and fluctuation (the same share of every MLP).")
    ] = "obs,fluctuation,frequency",
    precisions: Annotated[str, typer.Option(help="Of stored, bf16 and fp8.")] = "stored,bf16,fp8",
    count: Annotated[int, whole(help="As many of the prompts.", least=1, most=10_000)] = 50,
    seed: Annotated[int, seed("Seed of the first image's noise; each image takes the next.", most=2**62)] = 500_000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pruned checkpoints in the folder.")] = False,
    patience: Patience = 14_400.0,
    device: Device = "cpu",
) -> None:
    """Cut a model in many ways and measure each on held-out prompts: what is worth its gigabytes, as a table and a picture."""
    from ..cluster.prompts import prompts_from
    from ..cluster.sites import Source
    from ..cluster.sweep import PICTURE, TABLE, Measuring, grid, measured
    from ..cluster.sweep import sweep as sweep_there

    points = grid(
        [*map(_share, budgets.split(","))], scores.replace(" ", "").split(","), precisions.replace(" ", "").split(",")
    )
    measuring = Measuring(tuple(prompts_from(prompts, count)), seed, keep)
    with cluster.connected(), progress_bar() as progress:
        terms = _terms(cluster, patience, progress)
        done = sweep_there(Source(checkpoint, recording), measuring, points, out, terms, _device(cluster, device))
    columns = ("point", "GB", "velocity_error", "latent_error", "PSNR", "s_a_step", "none_is_better")
    rows: list[list[object]] = [
        [p.name, p.gb, p.velocity_error, p.latent_error, p.psnr, p.seconds_a_step, "*" if p.best else ""]
        for p in measured(done)
    ]
    table(columns, rows)
    tell(done, "points", f"{out}/{TABLE}, {out}/{PICTURE}")


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--budgets are shares of the neurons such as .25,.5; found {text!r}.") from error
