"""The command plan, on recordings that the command record makes."""

from pathlib import Path

import pytest
from flux_poke.errors import UserError
from flux_poke.tiny.model import FOLDER

CHECKPOINT = FOLDER / "flux.safetensors"
QUICK = ("--layers", "0, 3", "--method", "closed form", "--save-dtype", "float32")


@pytest.fixture(scope="module")
def recorded(record_digits, tmp_path_factory) -> Path:
    """Internals, rows and block states of the tiny FLUX on twenty prompts."""
    return record_digits(tmp_path_factory.mktemp("recorded"), blocks=True)


@pytest.mark.parametrize("cuts", [(), ("--img-cut", 9, "--neurons", 0.5), ("--img-threshold", 3, "--saved", 1)])
def test_what_to_cut_is_said_in_one_way(run, recorded, tmp_path, cuts):
    internals, plan = recorded / "internals.safetensors", tmp_path / "plan.safetensors"
    with pytest.raises(UserError, match="said in one way"):
        run("plan", internals, "--checkpoint", CHECKPOINT, *cuts, "--out", plan)
    assert not plan.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--neurons", 1.5), "between 0 and 1"),
        (("--saved", 9), "ask for less"),
        (("--neurons", 0.5, "--multiple", 0), "multiple of at least 1"),
        (("--neurons", 0.5, "--protect", "double-9"), "double-img-9"),
        (("--neurons", 0.5, "--picture", "x.foo"), "is not a picture"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_neurons_are_ranked(run, recorded, tmp_path, monkeypatch, wrong, said):
    monkeypatch.setattr("flux_poke.pruning.scores.rank", None)
    given = ("plan", recorded / "internals.safetensors", "--checkpoint", CHECKPOINT, "--out", tmp_path / "plan.safetensors")
    with pytest.raises(UserError, match=said):
        run(*given, *wrong)


def test_a_recording_is_not_added_to_itself(run, recorded):
    internals = recorded / "internals.safetensors"
    with pytest.raises(UserError, match="named twice"):
        run("internals", "merge", internals, internals, "--out", internals)
