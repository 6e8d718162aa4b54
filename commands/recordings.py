"""Recording what neurons and blocks do, and the recordings themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from .terminal import drawable, progress_bar


def record(
    checkpoint: Annotated[Path, typer.Argument(help="FLUX of the tiny kind (.safetensors), as `train tiny` makes.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adds to this file.")] = Path("internals.safetensors"),
    seed: Annotated[int, typer.Option(help="Seed of the first image; each image takes the next.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps per image.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 16,
    rows: Annotated[Path | None, typer.Option(help="Also sample rows of what the MLPs read into this folder.")] = None,
    rows_per_step: Annotated[int, typer.Option(min=1, help="Rows per MLP, image and step.")] = 64,
    hidden_states: Annotated[
        Path | None, typer.Option(help="Keep what --what says in this folder, for retraining, and count no neurons.")
    ] = None,
    what: Annotated[Literal["blocks", "trajectories"], typer.Option(help="What goes into --hidden-states.")] = "blocks",
    blocks: Annotated[str, typer.Option(help='Blocks to keep states of, such as "double 0-3, single"; or all.')] = "all",
    keep_steps: Annotated[int | None, typer.Option(min=1, help="Steps per image to keep (default: 5 %, at least 1).")] = None,
    max_gb: Annotated[float, typer.Option(help="What a folder may take; then rows are thinned, states end.")] = 64.0,
    storage: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of states and velocities.")] = "bfloat16",
) -> None:
    """Draw a file of prompts and add what every neuron did to an internals file, or keep what went through its blocks."""
    if rows and hidden_states:
        raise UserError("Rows and hidden states are recorded one after the other: give --rows or --hidden-states, not both.")
    if hidden_states:
        return _record_states(checkpoint, prompts, hidden_states, what, blocks, keep_steps, storage, max_gb, seed, steps, batch)
    from ..analysis.report import internals_title
    from ..flux.checkpoint import Checkpoint
    from ..prompts import read_prompts
    from ..recording.drawing import RowsTo, record_prompts
    from ..recording.rows import RowChoice, estimated_bytes
    from ..recording.store import Limit

    texts = read_prompts(prompts)
    to = None
    if rows:
        to = RowsTo(rows, RowChoice(rows_per_step, keep_steps, seed=seed), Limit(max_gb))
        layout = Checkpoint(checkpoint).layout
        size = estimated_bytes(layout.sites, layout.hidden, to.choice, steps, len(texts))
        typer.echo(f"{rows}: at most {size / 1e9:.2g} GB of rows")
    with progress_bar() as update:
        total = record_prompts(checkpoint, texts, out, seed=seed, steps=steps, batch=batch, progress=update, rows=to)
    typer.echo(f"{out}: {internals_title(total)}")


def _record_states(
    checkpoint: Path,
    prompts: Path,
    folder: Path,
    what: Literal["blocks", "trajectories"],
    blocks: str,
    kept_steps: int | None,
    storage: str,
    max_gb: float,
    seed: int,
    steps: int,
    batch: int,
) -> None:
    import torch

    from ..flux.blocks import choose_blocks
    from ..flux.checkpoint import Checkpoint
    from ..prompts import read_prompts
    from ..recording.drawing import record_states
    from ..recording.states import StateChoice, estimated_state_bytes, places_around
    from ..recording.store import Limit
    from ..tiny.model import LATENT_SIDE
    from ..tiny.words import PADDED

    texts, layout = read_prompts(prompts), Checkpoint(checkpoint).layout
    choice = StateChoice(kept_steps, seed=seed, dtype=getattr(torch, storage))
    places = places_around(choose_blocks(blocks, layout), layout)
    calls = len(texts) * (kept_steps or max(1, round(0.05 * steps)))
    size = estimated_state_bytes(what, layout, places, choice, calls, (LATENT_SIDE // layout.patch) ** 2, PADDED)
    typer.echo(f"{folder}: about {size / 1e9:.2g} GB of {what}")
    with progress_bar() as update:
        store = record_states(
            checkpoint, texts, what, folder, blocks, choice, Limit(max_gb, "stop"), seed, steps, batch, update
        )
    kept = sum(len(shard.captures) for shard in store.manifest.shards if shard.kind == what)
    typer.echo(f"{folder}: {kept:,} model calls, {store.bytes(what) / 1e9:.2g} GB")


def download_prompts(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, one prompt per line.")] = Path(
        "downloaded_prompts.txt"
    ),
    contains: Annotated[str, typer.Option(help="Only prompts with this in them, such as '\"'.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0 = all.")] = 10_000,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this one (default: both).")] = None,
) -> None:
    """Fetch prompts that people gave to image models from two public datasets."""
    from ..download_prompts import DATASETS, download_with_bar

    download_with_bar(out, dataset or [*DATASETS], contains, limit)


def show(
    file: Annotated[Path, typer.Argument(help="internals.safetensors")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    picture: Annotated[Path | None, typer.Option(callback=drawable, help="Also draw it (.png, .pdf, .svg).")] = None,
) -> None:
    """Print what was recorded, MLP by MLP."""
    from dataclasses import asdict

    from ..analysis.report import internals_figure, internals_summaries, internals_table
    from ..recording.internals import Internals

    internals = Internals.load(file)
    if as_json:
        about = {key: getattr(internals, key) for key in ("family", "runs", "steps", "created", "updated")}
        typer.echo(json.dumps({**about, "sites": [asdict(site) for site in internals_summaries(internals)]}, indent=2))
    else:
        typer.echo(internals_table(internals))
    if picture:
        internals_figure(internals).savefig(picture, dpi=110)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Recordings of one model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: a new one, or one of those.")],
) -> None:
    """Add up recordings of one model."""
    from ..analysis.report import internals_title
    from ..recording.internals import merge_files

    typer.echo(f"{out}: {internals_title(merge_files(out, files))}")
