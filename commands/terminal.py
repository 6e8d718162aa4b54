"""What commands have in common on a terminal: progress, tables, and options that belong together.

with progress_bar() as update:
    update("repairing single-3", 0.4)
table(("block", "error"), [["double 0", 0.25]])

@spread
def plan(internals: Path, cuts: Cuts) -> None:   # Cuts is a dataclass: its fields are options of the command
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path

from ..errors import UserError

#: What pictures may be written as.
PICTURES = (".png", ".jpg", ".pdf", ".svg")


def drawable(path: Path | None) -> Path | None:
    """For options that name a picture to write; raises `UserError`, before any work is done, where it is of no known kind."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise UserError(f"{path} is no picture that can be written: its name ends in one of {', '.join(PICTURES)}.")
    return path


@contextmanager
def progress_bar() -> Iterator[Callable[..., None]]:
    """A bar on the terminal (nothing where there is none), told what is being done and how far it is, 0..1."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda doing, done, total=1.0: bar.update(task, description=doing, completed=done / total)


def table(columns: tuple[str, ...], rows: list[list[object]]) -> None:
    """Prints a table; numbers short."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    first, *others = (column.replace("_", " ") for column in columns)
    printed = Table(Column(first, no_wrap=True), *others, box=SIMPLE)
    for row in rows:
        printed.add_row(*(_short(value) for value in row))
    Console().print(printed)


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


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
