"""What commands have in common on a terminal: progress, tables, and options that belong together.

with progress_bar() as progress:
    progress("repairing single-3", 4, 10)
table(("block", "error"), [["double 0", 0.25]])

@spread
def plan(internals: Path, cuts: Cuts) -> None:   # Cuts is a dataclass: its fields are options of the command

steps: Annotated[int, whole(help="Euler steps per image.", least=1)] = 20
"""

from __future__ import annotations

import functools
import inspect
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import parsing
from ..files import FIGURES, check_picture
from ..progress import Progress

#: The most of anything that is counted, so that a slip of the finger does not fill memory or run for years.
MOST = 1_000_000
#: The largest seed: images of one call take the next ones, and torch takes up to 2 ** 64 - 1.
MOST_SEED = 2**63 - 1


#: Where a command computes.
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
#: The dense FLUX of a plan, or of layers.
MovedCheckpoint = Annotated[Path | None, typer.Option(help="The dense FLUX, where it moved since the plan was made.")]


def picture(help: str, formats: tuple[str, ...] = FIGURES) -> Any:
    """An option that names a picture to write; refused before any work is done where it cannot be written."""

    def check(path: Path | None) -> Path | None:
        if path is not None:
            check_picture(path, formats)
        return path

    return typer.Option(callback=check, help=help)


def typed(*words: object) -> str:
    """A command of ours as one types it here: with `uv run` in front where that started this one."""
    return shlex.join([*(("uv", "run") if "UV" in os.environ else ()), "flux-poke", *map(str, words)])


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, told what is being done and how much of it is done; it is full when the work ended well."""
    with progress_bars() as bar:
        progress, last = bar(""), ["starting"]

        def update(what: str, done: float, total: float = 1.0) -> None:
            last[0] = what
            progress(what, done, total)

        update("starting", 0)
        yield update
        update(last[0], 1)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Progress]]:
    """Several bars on stderr: a name gives one, which appears when it is first told something."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def named(name: str) -> Progress:
            def update(what: str, done: float, total: float = 1.0) -> None:
                if name not in tasks:
                    tasks[name] = bar.add_task(what, total=1.0)
                bar.update(tasks[name], description=what, completed=min(done / total, 1.0) if total else 0.0)

            return update

        yield named


def number(*names: str, help: str, least: float, most: float) -> Any:
    """An option (or with `names`, such as "--rate", one of that name) that takes a finite number from `least` to `most`."""

    def check(value: float | None) -> float | None:
        try:
            return None if value is None else parsing.number(value, least, most)  # nan passes min and max
        except ValueError as error:
            raise typer.BadParameter(f"{error}.") from error

    return typer.Option(*names, min=least, max=most, callback=check, help=help)


def whole(*names: str, help: str, least: int, most: int = MOST) -> Any:
    """An option that takes a whole number from `least` to `most`."""
    return typer.Option(*names, min=least, max=most, help=help)


def seed(help: str = "Seed.", most: int = MOST_SEED) -> Any:
    """An option that takes a seed."""
    return whole(help=help, least=0, most=most)


def say_written(checkpoint: Path, dense: Path) -> None:
    """Tells what a checkpoint is that was written, and how much smaller than the dense one."""
    from ..pruning.checkpoint import inspect as described

    sizes = checkpoint.stat().st_size / 1e6, dense.stat().st_size / 1e6
    typer.echo(f"{described(checkpoint)}\n{checkpoint}: {sizes[0]:,.1f} MB, from {sizes[1]:,.1f}")


def table(columns: tuple[str, ...], rows: list[list[object]]) -> None:
    """Prints a table; numbers short."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    first, *others = (column.replace("_", " ") for column in columns)
    printed = Table(Column(first, no_wrap=True), *others, box=SIMPLE)
    for row in rows:
        printed.add_row(*map(_short, row))
    Console(markup=False).print(printed)  # names of files may have [ in them


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for each field of a dataclass in place of a parameter of that type.

    What is annotated there is declared once and shared by commands.
    """
    signature = inspect.signature(command, eval_str=True)
    types = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    groups = {
        name: (kind, [*inspect.signature(kind, eval_str=True).parameters.values()])
        for name, kind in types.items()
        if isinstance(kind, type) and is_dataclass(kind)
    }

    @functools.wraps(command)
    def spread_out(**given: object) -> None:
        for name, (kind, fields) in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields})
        command(**given)

    own = [parameter for name, parameter in signature.parameters.items() if name not in groups]
    options = [field for _, fields in groups.values() for field in fields]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *options)]
    spread_out.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return spread_out
