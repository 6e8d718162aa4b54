"""The commands retrain and replace, on plans and recordings that the other commands make."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux_poke.draw import open_tiny
from flux_poke.errors import UserError
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.plan import PruningPlan
from flux_poke.retrain.files import default_folder
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file, save_file

CHECKPOINT = FOLDER / "flux.safetensors"
QUICK = ("--layers", "0, 3", "--method", "closed form", "--save-dtype", "float32")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory) -> Path:
    """A recording of block states and counts on twenty prompts, two plans of it, and the layers 0 and 3 of the first."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.txt").write_text("\n".join(digit_prompts(number % 10)[0] for number in range(20)))
    given = ("--prompts", folder / "prompts.txt", "--steps", 4, "--what", "internals,blocks", "--keep-steps", 2)
    run("record", CHECKPOINT, folder / "digits", *given)
    for name, cut in (("plan", 100), ("other", 50)):
        cuts = ("--img-cut", cut, "--single-cut", 2 * cut, "--score", "frequency")
        run("plan", folder / "digits", "--checkpoint", CHECKPOINT, *cuts, "--out", folder / f"{name}.safetensors")
    run("retrain", folder / "plan.safetensors", *QUICK, "--out", folder / "layers")
    return folder


def test_a_plan_is_all_that_retraining_takes_and_its_layers_all_that_replacing_does(run, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("retrain", made / "plan.safetensors", *QUICK)
    plan = PruningPlan.load(made / "plan.safetensors")
    folder = Path(default_folder(plan))
    assert f"replace {folder}" in output
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["0.safetensors", "3.safetensors"]
    assert (folder / "layer_stats.png").exists()
    run("replace", folder, "--out", "out.safetensors")
    found = Pruned.open("out.safetensors").plan
    assert "by count, img 100 txt 0 single 200" in found.made
    assert torch.equal(found.kept["single-1"], plan.kept["single-1"])
    assert "by count" in run("inspect", "out.safetensors")


def test_what_moved_is_named(run, made, tmp_path):
    for source in ("digits", "plan.safetensors"):
        copy = shutil.copytree if (made / source).is_dir() else shutil.copy
        copy(made / source, tmp_path / source)
    moved = ("--recording", tmp_path / "digits", "--checkpoint", CHECKPOINT)
    run("retrain", tmp_path / "plan.safetensors", *QUICK, *moved, "--out", tmp_path / "layers")
    one, other = (load_file(folder / "layers" / "3.safetensors") for folder in (made, tmp_path))
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
    run("replace", tmp_path / "layers", "--checkpoint", CHECKPOINT, "--out", tmp_path / "out.safetensors")
    for wrong in (("--recording", tmp_path / "nowhere"), ("--checkpoint", tmp_path / "nowhere")):
        with pytest.raises(UserError, match="nowhere is not there"):
            run("retrain", made / "plan.safetensors", *QUICK, *wrong, "--out", tmp_path / "layers")


def test_the_originals_block_states_are_trained_on(run, made, tmp_path):
    """Files of whole calls, with no manifest and with `vec` and `pe` of every block."""
    (tmp_path / "states").mkdir()
    for number, path in enumerate(sorted((made / "digits" / "hidden_states").glob("blocks-*.safetensors"))):
        tensors = load_file(path)
        places = [key.removesuffix("-img") for key in tensors if key.endswith("-img")]
        repeated = {f"{place}-{name}": tensors[name].clone() for place in places for name in ("vec", "pe")}
        states = {key: tensor for key, tensor in tensors.items() if key.endswith(("-img", "-txt"))}
        save_file({**states, **repeated}, tmp_path / "states" / f"{number}.safetensors")
    given = ("--recording", tmp_path / "states", "--out", tmp_path / "layers")
    run("retrain", made / "plan.safetensors", *QUICK, *given)
    assert (tmp_path / "layers" / "3.safetensors").exists()


def test_a_folder_without_anything_to_train_on_is_refused(run, made, tmp_path):
    with pytest.raises(UserError, match="holds no block states"):
        run("retrain", made / "plan.safetensors", *QUICK, "--recording", tmp_path, "--out", tmp_path / "layers")


def test_another_plans_layers_are_not_replaced(run, made):
    before = load_file(made / "layers" / "0.safetensors")
    with pytest.raises(UserError, match="was retrained for another plan"):
        run("retrain", made / "other.safetensors", *QUICK, "--out", made / "layers")
    after = load_file(made / "layers" / "0.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_what_the_file_system_refuses_is_said_in_one_sentence(run, made, tmp_path):
    (tmp_path / "junk.txt").write_text("mine")
    given = ["retrain", made / "plan.safetensors", *QUICK, "--out", tmp_path / "junk.txt"]
    main = [sys.executable, "-c", "from flux_poke.cli import main; main()"]
    ended = subprocess.run([*main, *map(str, given)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "junk.txt" in ended.stderr


def test_distill_takes_no_choice_of_layers(run, made, tmp_path):
    with pytest.raises(UserError, match="all layers at once"):
        run("retrain", made / "plan.safetensors", "--method", "distill", "--layers", "0", "--out", tmp_path)


def test_arguments_in_a_file_are_as_on_the_command_line(run, made, tmp_path):
    (tmp_path / "arguments.txt").write_text(f"--method 'closed form'   # no gradient\n--out '{tmp_path / 'out'}'\n--layers 1")
    output = run("retrain", made / "plan.safetensors", f"@{tmp_path / 'arguments.txt'}")
    assert "412 + 512" in output
    assert (tmp_path / "out" / "1.safetensors").exists()


def test_a_checkpoint_of_replaced_layers_does_not_replace_what_it_is_made_from(run, made, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes((made / "plan.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"mine\.safetensors"):
        run("replace", made / "layers", "--out", tmp_path / "mine.safetensors")
    with pytest.raises(UserError):
        run("replace", made / "layers", "--first", 7, "--out", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_retrained_layers_and_the_checkpoint_made_of_them_draw_the_same_and_not_as_the_dense_model(run, made, tmp_path):
    run("replace", made / "layers", "-o", tmp_path / "replaced.safetensors")
    latents = {}
    for path in (made / "layers", tmp_path / "replaced.safetensors", CHECKPOINT):
        tiny = open_tiny(path)
        latents[path.name] = tiny.sample(["three", "a 7"], tiny.noise(2, 5), torch.linspace(1, 0, 6))
    torch.testing.assert_close(latents["layers"], latents["replaced.safetensors"], atol=0.02, rtol=0)  # stored in bfloat16
    assert (latents["layers"] - latents[CHECKPOINT.name]).abs().max() > 0.1
    run("draw", made / "layers", "-o", tmp_path / "drawn", "--prompt", "three", "--steps", 2)
    assert (tmp_path / "drawn" / "three_0.png").exists()
