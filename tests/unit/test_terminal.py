"""What commands have in common: the bar, and options that take numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Annotated, get_args, get_origin

import flux_poke.cli
import pytest
import typer
from flux_poke import parsing
from flux_poke.commands.plans import Cuts
from flux_poke.commands.terminal import number, progress_bar, seed, whole
from flux_poke.errors import UserError
from flux_poke.progress import part
from flux_poke.pruning.dense import Dense
from flux_poke.tiny.model import FOLDER
from typer.models import OptionInfo
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


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 0, 10**400, pytest.param(10**5000, id="huge"), -1, 2.5, "1", None, [1], 1j]
)
def test_what_is_no_whole_number_of_a_range_is_named_in_short(value):
    with pytest.raises(ValueError, match=r"^expected a whole number from 1 to 1000, found .{1,60}$"):
        parsing.number(value, 1, 1000, whole=True)


def numeric_options(app: typer.Typer, *before: str) -> Iterator[tuple[str, OptionInfo]]:
    """Of all commands: what is typed up to the option, and how it is declared."""
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from numeric_options(group.typer_instance, *before, str(group.name))
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        for option in inspect.signature(command.callback, eval_str=True).parameters.values():
            kind, *told = get_args(option.annotation)
            numbers = {int, float} & {kind, *get_args(kind)}
            if numbers and isinstance(told[0], OptionInfo):
                long = [given for given in told[0].param_decls or () if given.startswith("--")]
                yield " ".join([*before, name, *(long or [f"--{option.name.replace('_', '-')}"])]), told[0]


#: What goes by the model or the recording: these have sentences of their own.
CUTS = (
    "size",
    "saved",
    "share",
    "neurons",
    "multiple",
    *(f"{s}_{w}" for s in ("img", "txt", "single") for w in ("cut", "threshold")),
)
BY_THE_MODEL = {f"--{name.replace('_', '-')}" for name in CUTS} | {"--max-gb"}
OPTIONS = dict(numeric_options(flux_poke.cli.app))


@pytest.mark.parametrize("typed", [typed for typed in OPTIONS if typed.split()[-1] not in BY_THE_MODEL])
def test_every_option_that_takes_a_number_has_a_range_and_refuses_what_is_outside_it(typed):
    command, declared = typed.split(), OPTIONS[typed]
    assert declared.min is not None, "`number`, `whole` or `seed` declare it"
    assert declared.max is not None
    for value in (declared.min - 1, declared.max + 1, "nan", "-inf", "1e400"):
        result = CliRunner().invoke(flux_poke.cli.app, [*command, f"{value}"])
        assert (result.exit_code, type(result.exception)) == (2, SystemExit), value
        assert "Invalid value for" in result.output
        assert command[-1] in result.output


@pytest.mark.parametrize("value", [-1, 10**20, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CUTS)
def test_cuts_that_no_model_has_are_refused_in_a_sentence(name, value):
    if "threshold" in name and value == 10**20:
        return  # a number of tokens, like any other
    if name in ("multiple", *(f"{stream}_cut" for stream in ("img", "txt", "single"))) and isinstance(value, float):
        return  # these are whole
    given = {name: value, **({"neurons": 0.5} if name == "multiple" else {})}
    with pytest.raises(UserError):
        Cuts(**given).request().check(Dense.open(FOLDER / "flux.safetensors"))


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
