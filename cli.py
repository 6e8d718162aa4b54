"""`flux-poke`: which commands there are; they are in `commands/`."""

from __future__ import annotations

import io
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from .commands import (
    atlas,
    captures,
    cluster,
    cluster_sites,
    convert,
    draw,
    fit,
    layers,
    models,
    neurons,
    plans,
    queue,
    recordings,
    views,
)
from .errors import UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"flux-poke {metadata.version('flux-poke')}")
        except metadata.PackageNotFoundError:
            typer.echo("flux-poke, not installed: the version is in pyproject.toml")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Open up FLUX: record, see, cut, repair and retrain its MLP neurons."""


for command in (
    models.demo, fit.fit, recordings.record, recordings.download_prompts, plans.plan, plans.prune, layers.retrain,
    layers.replace, models.train, models.inspect, queue.queue, convert.convert, draw.draw, captures.capture,
    captures.decode, views.animate, views.compare,
):  # fmt: skip
    app.command()(command)

internals = typer.Typer(help="Look at and add up recordings.", no_args_is_help=True)
internals.command()(recordings.show)
internals.command()(recordings.merge)
app.add_typer(internals, name="internals")

atlases = typer.Typer(help="Where every neuron was strongest.", no_args_is_help=True)
atlases.command()(atlas.show)
atlases.command()(atlas.sheet)
atlases.command()(atlas.merge)
app.add_typer(atlases, name="atlas")

lens = typer.Typer(help="The tuned lens on what blocks predict.", no_args_is_help=True)
lens.command()(views.fit)
app.add_typer(lens, name="lens")

of_concepts = typer.Typer(help="The neurons of a concept.", no_args_is_help=True)
for command in (neurons.find, neurons.show, neurons.join, neurons.subtract, neurons.cut, neurons.lora):
    of_concepts.command()(command)
app.add_typer(of_concepts, name="neurons")

clusters = typer.Typer(help="The same work on many machines, on Ray.", no_args_is_help=True)
for command in (cluster.record, cluster_sites.rank, cluster_sites.repair, cluster_sites.retrain, cluster_sites.sweep):
    clusters.command()(command)
app.add_typer(clusters, name="cluster")


def main() -> None:
    """The command line; an error of the user's is one sentence and exit status 1."""
    # Threads that wait by turning round keep the processor from those that they wait for, where anything else runs beside them:
    # the demo took 380 s there. After a few turns it takes 143 s there, and 39 s alone on two cores (asleep at once, 68 s).
    # Both are read when torch is imported, which nothing has done by now.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a character shows "?" for it
            stream.reconfigure(errors="replace")
    try:
        app(args_with_files(sys.argv[1:]), prog_name="flux-poke")
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.status)
    except OSError as error:
        found = error.filename or "A file"
        typer.echo(f"Error: {found} cannot be used ({error.strerror or error}): check the path and its permissions.", err=True)
        sys.exit(1)


def args_with_files(arguments: list[str]) -> list[str]:
    """The arguments, with those in a file in place of `@file`: as on the command line, on any number of lines, # comments."""
    found: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            found.append(argument)
            continue
        try:
            found += shlex.split(Path(argument[1:]).read_text(encoding="utf-8"), comments=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{argument}: the arguments in {argument[1:]} cannot be read ({error}).") from error
    return found


if __name__ == "__main__":
    main()
