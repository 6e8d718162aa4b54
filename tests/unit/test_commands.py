"""The commands plan, retrain and replace, on recordings that the command record makes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux_poke.cli import app, args_with_files
from flux_poke.errors import UserError
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.plan import PruningPlan
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file
from typer.testing import CliRunner

CHECKPOINT = FOLDER / "flux.safetensors"
QUICK = ("--layers", "0, 3", "--method", "closed form", "--save-dtype", "float32")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, args_with_files([str(argument) for argument in arguments]))
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Internals, rows and block states of the tiny FLUX on twenty prompts."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("\n".join(digit_prompts(number % 10)[0] for number in range(20)))
    given = ("record", CHECKPOINT, folder, "--prompts", folder / "prompts.txt", "--steps", 4)
    run(*given, "--what", "internals,rows", "--keep-steps", 4)
    run(*given, "--what", "blocks", "--keep-steps", 2)
    return folder


@pytest.mark.parametrize(
    ("cuts", "named"),
    [
        (("--img-cut", 100, "--single-cut", 200, "--score", "frequency"), "by count, img 100 txt 0 single 200"),
        (("--img-threshold", 0.3, "--single-threshold", 0.2, "--on-rate"), "by threshold on rate, img 0.3 txt 0 single 0.2"),
        (("--share", 0.5, "--score", "obs", "--multiple", 32), "by budget, 50% of the neurons, score obs"),
    ],
)
def test_retrain_takes_what_to_cut_as_plan_does(recorded, tmp_path, cuts, named):
    internals = recorded / "internals.safetensors"
    rows = ("--rows", recorded / "hidden_states")
    run("plan", internals, "--checkpoint", CHECKPOINT, *rows, *cuts, "--out", tmp_path / "plan.safetensors")
    given = ("retrain", CHECKPOINT, "--hidden-states", recorded / "hidden_states", *QUICK)
    run(*given, "--plan", tmp_path / "plan.safetensors", "--out", tmp_path / "by_plan")
    output = run(*given, "--internals", internals, *cuts, "--out", tmp_path / "by_cuts")
    assert PruningPlan.load(tmp_path / "plan.safetensors").table() in output
    files = sorted(path.name for path in (tmp_path / "by_plan").glob("*.safetensors"))
    assert files == ["0.safetensors", "3.safetensors"]
    for name in files:
        one, other = (load_file(tmp_path / folder / name) for folder in ("by_plan", "by_cuts"))
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
    run("replace", CHECKPOINT, "--layers-dir", tmp_path / "by_cuts", "--out", tmp_path / "out.safetensors")
    plan = Pruned.open(tmp_path / "out.safetensors").plan
    assert named in plan.made
    assert named in run("inspect", tmp_path / "out.safetensors")
    kept = load_file(tmp_path / "by_cuts" / "3.safetensors").get("flux_poke.kept.single-1")
    assert kept is not None
    assert torch.equal(plan.kept["single-1"], kept.long())


@pytest.mark.parametrize("cuts", [(), ("--img-cut", 9, "--share", 0.5), ("--img-threshold", 3, "--gigabytes", 1)])
def test_what_to_cut_is_said_in_one_way(recorded, tmp_path, cuts):
    internals, plan = recorded / "internals.safetensors", tmp_path / "plan.safetensors"
    with pytest.raises(UserError, match="said in one way"):
        run("plan", internals, "--checkpoint", CHECKPOINT, *cuts, "--out", plan)
    assert not plan.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--share", 1.5), "between 0 and 1"),
        (("--gigabytes", 9), "ask for less"),
        (("--share", 0.5, "--multiple", 0), "multiple of at least 1"),
        (("--share", 0.5, "--protect", "double-9"), "double-img-9"),
        (("--share", 0.5, "--picture", "x.foo"), "is not a picture"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_neurons_are_ranked(recorded, tmp_path, monkeypatch, wrong, said):
    monkeypatch.setattr("flux_poke.pruning.scores.rank", None)
    given = ("plan", recorded / "internals.safetensors", "--checkpoint", CHECKPOINT, "--out", tmp_path / "plan.safetensors")
    with pytest.raises(UserError, match=said):
        run(*given, *wrong)


def test_a_recording_is_not_added_to_itself(recorded):
    internals = recorded / "internals.safetensors"
    with pytest.raises(UserError, match="named twice"):
        run("internals", "merge", internals, internals, "--out", internals)


def test_what_the_file_system_refuses_is_said_in_one_sentence(recorded, tmp_path):
    (tmp_path / "junk.txt").write_text("mine")
    given = [
        "retrain",
        CHECKPOINT,
        "--hidden-states",
        recorded / "hidden_states",
        "--internals",
        recorded / "internals.safetensors",
    ]
    given += ["--img-cut", 9, *QUICK, "--out", tmp_path / "junk.txt"]
    main = [sys.executable, "-c", "from flux_poke.cli import main; main()"]
    ended = subprocess.run([*main, *map(str, given)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "junk.txt" in ended.stderr


def test_distill_takes_no_choice_of_layers(recorded, tmp_path):
    given = ("--hidden-states", recorded / "hidden_states", "--internals", recorded / "internals.safetensors", "--img-cut", 9)
    with pytest.raises(UserError, match="all layers at once"):
        run("retrain", CHECKPOINT, *given, "--method", "distill", "--layers", "0", "--out", tmp_path)


def test_arguments_in_a_file_are_as_on_the_command_line(recorded, tmp_path):
    (tmp_path / "arguments.txt").write_text(
        f"""--hidden-states '{recorded / "hidden_states"}'   # where the states are
        --internals '{recorded / "internals.safetensors"}'
        --img-cut 50 --txt-cut 50
        --method "closed form"
        """
    )
    output = run("retrain", CHECKPOINT, f"@{tmp_path / 'arguments.txt'}", "--layers", "1", "--out", tmp_path / "out")
    assert "462 + 462" in output
    assert (tmp_path / "out" / "1.safetensors").exists()
    assert (tmp_path / "out" / "layer_stats.png").exists()


def test_what_to_cut_is_said_once(recorded, tmp_path):
    given = ("retrain", CHECKPOINT, "--hidden-states", recorded / "hidden_states")
    internals = ("--internals", recorded / "internals.safetensors")
    run("plan", internals[1], "--checkpoint", CHECKPOINT, "--img-cut", 5, "--out", tmp_path / "plan.safetensors")
    plan = ("--plan", tmp_path / "plan.safetensors")
    for wrong in ((), (*plan, *internals)):
        with pytest.raises(UserError, match="is said once"):
            run(*given, *wrong)
    with pytest.raises(UserError, match="says already what to cut"):
        run(*given, *plan, "--img-cut", 7)
    with pytest.raises(UserError, match="said in one way"):
        run(*given, *internals)
