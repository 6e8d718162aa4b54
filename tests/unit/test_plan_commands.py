"""The commands plan and prune, on a recording that the command record makes."""

from pathlib import Path

import pytest
from flux_poke.errors import UserError
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.plan import PruningPlan
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import save_file
from torch import zeros

CHECKPOINT = FOLDER / "flux.safetensors"


@pytest.fixture(scope="module")
def recorded(run, tmp_path_factory) -> Path:
    """Internals and rows of the tiny FLUX on twenty prompts."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("\n".join(digit_prompts(number % 10)[0] for number in range(20)))
    given = ("--prompts", folder / "prompts.txt", "--steps", 4, "--what", "internals,rows", "--keep-steps", 4)
    run("record", CHECKPOINT, folder, *given)
    return folder


@pytest.fixture(scope="module")
def plan(run, recorded):
    return lambda *options: run("plan", recorded, "--checkpoint", CHECKPOINT, *options)


@pytest.mark.parametrize(
    ("cuts", "named", "method"),
    [
        (("--img-cut", 100, "--single-cut", 200, "--score", "frequency"), "by count, img 100 txt 0 single 200", "none"),
        (("--img-cut", 100), "score fluctuation", "bias"),
        (("--img-threshold", 0.3, "--on-rate"), "by threshold on rate, img 0.3", "none"),
        (("--neurons", 0.5, "--multiple", 32), "by budget, 50% of the neurons, score obs", "affine"),
    ],
)
def test_prune_needs_the_plan_alone_and_repairs_as_goes_with_its_score(plan, run, recorded, tmp_path, cuts, named, method):
    told = plan(*cuts, "-o", tmp_path / "plan.safetensors", "--picture", tmp_path / "plan.png")
    assert named in told
    assert f"flux-poke prune {tmp_path / 'plan.safetensors'} -o" in told.replace("\n", "")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    run("prune", tmp_path / "plan.safetensors", "-o", tmp_path / "pruned.safetensors")
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    assert pruned.plan.digest == PruningPlan.load(tmp_path / "plan.safetensors").digest
    assert {report.method for report in pruned.report.values()} == {method}


def test_without_a_name_a_plan_goes_beside_the_recording_and_replaces_no_other(plan, recorded):
    default = recorded / "plan_by_count.safetensors"
    plan("--img-cut", 7)
    assert PruningPlan.load(default).settings["img"] == 7
    plan("--img-cut", 7)
    with pytest.raises(UserError, match=r"plan_by_count.safetensors is another plan \(by count, img 7"):
        plan("--img-cut", 8)
    assert PruningPlan.load(default).settings["img"] == 7
    default.unlink()
    save_file({"mine": zeros(1)}, default)
    with pytest.raises(UserError, match="is not a pruning plan"):
        plan("--img-cut", 7)
    default.unlink()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--img-cut", 5, "--on-rate"), "--on-rate has no meaning in a plan by count"),
        (("--img-cut", 5, "--multiple", 32), "--multiple has no meaning in a plan by count"),
        (("--img-cut", 5, "--protect", "single-0"), "--protect has no meaning in a plan by count"),
        (("--img-threshold", 5, "--score", "obs"), "--score has no meaning in a plan by threshold"),
        (("--neurons", 0.5, "--score", "obs"), "--score has no meaning in a plan by budget: it belongs to one by count"),
        (("--neurons", 0.5, "--double", 0, 1), "--double has no meaning in a plan by budget"),
        (("--img-cut", -5), "cut of img MLPs is -5"),
        (("--img-cut", 5, "--double", 0, 9), "double layers 0 to 9"),
        (("--img-cut", 0), "all cuts .* are 0"),
        (("--img-threshold", -1), "found -1"),
        (("--neurons", "nan"), "found nan"),
        (("--saved", "nan"), "found nan"),
        (("--saved", "inf"), "found inf"),
        (("--img-cut", 5, "--device", "cuda:99"), "device cuda:99 cannot be used"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence_before_any_work(plan, recorded, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("flux_poke.pruning.requests.rank", None)
    monkeypatch.setattr("flux_poke.pruning.by_budget.rank", None)
    with pytest.raises(UserError, match=said):
        plan(*options, "-o", tmp_path / "plan.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_moved_is_named_to_prune(plan, run, recorded, tmp_path):
    file = tmp_path / "plan.safetensors"
    plan("--img-cut", 5, "-o", file)
    moved = recorded.rename(recorded.with_name("moved"))
    try:
        with pytest.raises(UserError, match=r"recording .* is not there, .*--recording FOLDER"):
            run("prune", file, "-o", tmp_path / "out.safetensors")
        run("prune", file, "-o", tmp_path / "out.safetensors", "--recording", moved, "--checkpoint", CHECKPOINT)
    finally:
        moved.rename(recorded)
    with pytest.raises(UserError, match="--fold stores what affine repair leaves, and the repair is bias"):
        run("prune", file, "-o", tmp_path / "other.safetensors", "--fold")
    with pytest.raises(UserError, match=r"is something else|also what is read"):
        run("prune", file, "-o", CHECKPOINT)
