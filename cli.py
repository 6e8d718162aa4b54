"""`flux-poke`: one thin function per command; the work is in the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from .errors import UserError

app = typer.Typer(
    help="Open up FLUX: record, see, cut, repair and retrain its MLP neurons.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
internals_app = typer.Typer(help="Look at and add up recordings.", no_args_is_help=True)
train_app = typer.Typer(help="Make models from scratch.", no_args_is_help=True)
app.add_typer(internals_app, name="internals")
app.add_typer(train_app, name="train")


def main() -> None:
    """The command line; an error of the user's is one sentence and exit status 1."""
    try:
        app()
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("flux_poke_demo"),
    seed: Annotated[int, typer.Option(help="Seed of the drawings.")] = 0,
) -> None:
    """Try the whole loop on a tiny FLUX that draws digits: no ComfyUI, no download, a minute on a CPU."""
    from .demo import run_demo

    with progress_bar() as update:
        summary = run_demo(out, seed, update)
    columns = ("name", "neurons_kept", "parameters", "bytes", "velocity_error", "latent_error", "psnr", "digit_accuracy")
    table(columns, [[variant[column] for column in columns] for variant in summary["variants"]])
    typer.echo(
        f"{summary['seconds']} s. Look at {out / 'internals.png'} (what every neuron did) and {out / 'dense.png'} (the digits);"
    )
    typer.echo(f"flux-poke internals show {out / 'internals.safetensors'} prints the numbers.")


@app.command()
def record(
    checkpoint: Annotated[Path, typer.Argument(help="FLUX of the tiny kind (.safetensors), as `train tiny` makes.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adds to this file.")] = Path("internals.safetensors"),
    seed: Annotated[int, typer.Option(help="Seed of the first image; each image takes the next.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps per image.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 16,
) -> None:
    """Draw a file of prompts and add what every neuron did to an internals file."""
    from .analysis.record import record_prompts
    from .analysis.report import internals_title
    from .prompts import read_prompts

    with progress_bar() as update:
        total = record_prompts(checkpoint, read_prompts(prompts), out, seed=seed, steps=steps, batch=batch, progress=update)
    typer.echo(f"{out}: {internals_title(total)}")


@app.command("download-prompts")
def download_prompts_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Text file to write, one prompt a line.")] = Path("prompts.txt"),
    contains: Annotated[str, typer.Option(help="Only prompts with this in them, such as '\"'.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0 = all.")] = 10_000,
    dataset: Annotated[Optional[list[str]], typer.Option(help="Only this one (default: both).")] = None,  # noqa: UP045
) -> None:
    """Fetch prompts that people gave to image models from two public datasets."""
    from .download_prompts import DATASETS, download_with_bar

    download_with_bar(out, dataset or [*DATASETS], contains, limit)


@internals_app.command("show")
def internals_show(
    file: Annotated[Path, typer.Argument(help="internals.safetensors")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    picture: Annotated[Optional[Path], typer.Option(help="Also draw it (.png, .pdf, .svg).")] = None,  # noqa: UP045 typer on 3.10
) -> None:
    """Print what was recorded, MLP by MLP."""
    from dataclasses import asdict

    from .analysis.internals import Internals
    from .analysis.report import internals_figure, internals_summaries, internals_table

    internals = Internals.load(file)
    if as_json:
        about = {key: getattr(internals, key) for key in ("family", "runs", "steps", "created", "updated")}
        typer.echo(json.dumps({**about, "sites": [asdict(site) for site in internals_summaries(internals)]}, indent=2))
    else:
        typer.echo(internals_table(internals))
    if picture:
        internals_figure(internals).savefig(picture, dpi=110)


@internals_app.command("merge")
def internals_merge(
    out: Annotated[Path, typer.Argument(help="File to write (replaced if it exists).")],
    files: Annotated[list[Path], typer.Argument(help="Recordings of one model.")],
) -> None:
    """Add up recordings of one model."""
    from .analysis.internals import Internals
    from .analysis.report import internals_title

    total = Internals.load(files[0])
    for file in files[1:]:
        total = total.merged(Internals.load(file), str(file))
    total.save(out)
    typer.echo(f"{out}: {internals_title(total)}")


@train_app.command("tiny")
def train_tiny_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the weights; called again, it goes on from there.")
    ] = Path("tiny"),
    config: Annotated[Optional[Path], typer.Option(help="YAML like flux/tiny/config.yaml.")] = None,  # noqa: UP045
) -> None:
    """Make the tiny FLUX from scratch: autoencoder, transformer and word encoder, under 20 minutes on 2 cores."""
    from .flux.tiny.training import read_config, train_tiny

    with progress_bar() as update:
        train_tiny(out, read_config(config), lambda part, step, steps, loss: update(f"{part}: loss {loss:.4f}", step / steps))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on the terminal (nothing where there is none), told what is being done and how far it is, 0..1."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda doing, done: bar.update(task, description=doing, completed=done)


def table(columns: tuple[str, ...], rows: list[list[object]]) -> None:
    """Prints a table; numbers short."""
    from rich.console import Console
    from rich.table import Table

    printed = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        printed.add_row(*(_short(value) for value in row))
    Console().print(printed)


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
