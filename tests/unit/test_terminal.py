"""What commands have in common: the bar, and options that take numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, get_args, get_origin

import flux_poke.cli
import pytest
import typer
from flux_poke.commands.terminal import number, progress_bar, seed, whole
from flux_poke.progress import part
from typer.testing import CliRunner


@pytest.mark.parametrize("last", [(0.77, 1), (3, 57), (0, 1), (0, 0)])
def test_the_bar_is_full_when_the_work_ended_well(capsys, last):
    with progress_bar() as progress:
        progress("ranking", *last)
    assert "100%" in capsys.readouterr().err


def test_the_bar_of_work_that_failed_stays_where_it_was(capsys):
    def fail() -> None:
        with progress_bar() as progress:
            part(progress, 1, 4)("ranking", 6, 12)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    said = capsys.readouterr().err
    assert "ranking" in said
    assert " 38%" in said


app = typer.Typer()


@app.command()
def numbers(
    steps: Annotated[int, whole(help="Steps.", least=1)] = 20,
    max_gb: Annotated[float, number("--max-gb", help="Gigabytes.", least=0, most=1e6)] = 64.0,
    first: Annotated[int, seed()] = 0,
    share: Annotated[float | None, number(help="Share.", least=0, most=1)] = None,
) -> None:
    print(steps, max_gb, first, share)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "100000000000000000000", "x", ""])
@pytest.mark.parametrize("option", ["--steps", "--max-gb", "--first", "--share"])
def test_numbers_out_of_range_and_what_is_no_number_are_refused(option, value):
    result = CliRunner().invoke(app, [option, value])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


def test_numbers_within_range_are_taken():
    result = CliRunner().invoke(app, ["--steps", "3", "--max-gb", "0.5", "--first", str(2**63 - 1), "--share", "1"])
    assert result.output.split() == ["3", "0.5", str(2**63 - 1), "1.0"]


def commands(of: typer.Typer) -> Iterator[Callable[..., object]]:
    for command in of.registered_commands:
        assert command.callback is not None
        yield command.callback
    for group in of.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance)


def test_every_number_of_every_command_has_a_range():
    """Or is a plan's, a fit's or a recording's own, which say what they take themselves."""
    without = set()
    for command in commands(flux_poke.cli.app):
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            if get_origin(parameter.annotation) is not Annotated:
                continue
            kind, option, *_ = get_args(parameter.annotation)
            if {int, float} & {kind, *get_args(kind)} and None in (option.min, option.max):
                without.add(name)
    cuts = {f"{stream}_{how}" for stream in ("img", "txt", "single") for how in ("cut", "threshold")}
    assert without == {"size", "saved", "share", "neurons", "multiple", "max_gb"} | cuts
