"""`flux-poke neurons`: found from two lists of prompts, looked at, joined, cut, drawn with, and written as a LoRA."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from flux_poke.errors import UserError
from flux_poke.poking.neurons import Neurons
from flux_poke.poking.tune import Extent
from flux_poke.pruning.plan import PruningPlan
from flux_poke.tiny.model import FOLDER
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

CHECKPOINT = FOLDER / "flux.safetensors"


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "threes.txt").write_text("a three\na 3\n")
    (tmp_path / "others.txt").write_text("a one\na 7\nnumber four\na 0\n")
    return tmp_path / "threes.txt", tmp_path / "others.txt"


def test_from_two_lists_of_prompts_to_a_picture_without_the_concept(run, prompts, tmp_path: Path):
    with_it, without = prompts
    found, picture = tmp_path / "three.safetensors", tmp_path / "three.png"
    said = run(
        "neurons", "find", CHECKPOINT, "--with", with_it, "--without", without, "-o", found, "--images", 1, "--steps", 4,
        "--picture", picture,
    )  # fmt: skip
    neurons = Neurons.load(found)
    assert neurons.factor is not None
    assert neurons.factor < 1
    assert 0 < neurons.count <= 81
    assert neurons.chance is not None
    assert neurons.table() in said
    assert "threes against others" in said
    assert f"--poke {found}:{neurons.factor:g}" in said
    assert Image.open(picture).width > 500
    assert run("neurons", "show", found, "--count", 3).count(":") >= 3

    pictures = []
    for folder, poke in (("as_it_is", ()), ("poked", ("--poke", f"{found}:-3")), ("one", ("--poke", f"{found}:1"))):
        run("draw", CHECKPOINT, "-o", tmp_path / folder, "--prompt", "a three", "--steps", 6, *poke)
        pictures.append(Image.open(tmp_path / folder / "a-three_0.png"))
    assert ImageChops.difference(pictures[0], pictures[1]).getbbox() is not None
    assert ImageChops.difference(pictures[0], pictures[2]).getbbox() is None

    run("neurons", "join", found, found, "-o", tmp_path / "both.safetensors")
    assert Neurons.load(tmp_path / "both.safetensors").count == neurons.count
    with pytest.raises(UserError, match="Nothing is left"):
        run("neurons", "subtract", found, found, "-o", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()
    run("neurons", "cut", found, CHECKPOINT, "-o", tmp_path / "plan.safetensors")
    assert sum(PruningPlan.load(tmp_path / "plan.safetensors").cut.values()) == neurons.count
    assert "load it at strength 1" in run("neurons", "lora", found, CHECKPOINT, "-o", tmp_path / "lora.safetensors")
    lora = load_file(tmp_path / "lora.safetensors")
    assert sum(len(tensor) for key, tensor in lora.items() if key.endswith("lora_down.weight")) == neurons.count


def test_a_prompt_that_is_in_both_lists_is_told_of_before_anything_is_drawn(run, prompts, tmp_path: Path):
    given = "--with", prompts[0], "--without", prompts[1], "--without", prompts[0]
    with pytest.raises(UserError, match="'a 3' is among those with the concept and among those without"):
        run("neurons", "find", CHECKPOINT, *given, "-o", tmp_path / "n.safetensors")


def test_how_far_each_neuron_is_turned_is_learned_where_asked(run, prompts, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("flux_poke.poking.learn.STEPS", 10)
    monkeypatch.setattr("flux_poke.poking.learn.LEARNING", Extent(2, 4, 2, (0.0, 0.3)))
    with_it, without = prompts
    found = tmp_path / "three.safetensors"
    given = "neurons", "find", CHECKPOINT, "--with", with_it, "--without", without, "-o", found, "--images", 1, "--steps", 4
    said = run(*given, "--learn", "--percent", 1, "--streams", "txt")
    neurons = Neurons.load(found)
    assert neurons.learned
    assert neurons.count == 40
    assert all("txt" in name for name in neurons.sites)
    assert re.search(
        r"In new drawings, (\d+ % of the concept's pull is left|.* the other way); others change by [\d.e-]+ %", said
    )
    assert f"--poke {found}:0 " in said
    with pytest.raises(UserError, match="do not count about zero"):
        run("neurons", "lora", found, CHECKPOINT, "--about", "zero", "-o", tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="leave out --spare"):
        run(*given, "--learn", "--spare", 3)
    with pytest.raises(UserError, match="--learn is for prompts"):
        run("neurons", "find", CHECKPOINT, "--with", tmp_path, "--without", tmp_path, "-o", found, "--learn")


def test_neurons_are_poked_in_their_own_model_and_in_what_it_was_pruned_to(run, prompts, tmp_path: Path):
    with_it, without = prompts
    found, other = tmp_path / "three.safetensors", tmp_path / "other"
    given = "--with", with_it, "--without", without, "--images", 1, "--steps", 4, "--spare", 2
    run("neurons", "find", CHECKPOINT, *given, "-o", found)
    shutil.copytree(FOLDER, other)
    save_file({key: 1.01 * tensor for key, tensor in load_file(CHECKPOINT).items()}, other / "flux.safetensors")
    drawn = "-o", tmp_path / "drawings", "--prompt", "a three", "--steps", 2
    with pytest.raises(UserError, match="neurons are of another model than"):
        run("draw", other / "flux.safetensors", "--poke", found, *drawn)
    run("record", CHECKPOINT, tmp_path / "threes", "--prompts", with_it, "--steps", 2)
    with pytest.raises(UserError, match="another model than"):
        run("neurons", "find", other / "flux.safetensors", "--with", tmp_path / "threes", "--without", tmp_path / "threes",
            "-o", tmp_path / "n.safetensors")  # fmt: skip
    neurons = Neurons.load(found)
    first = next(iter(neurons.sites))
    half = replace(neurons, sites={first: neurons.sites[first]})
    half.save(tmp_path / "half.safetensors")
    run("neurons", "cut", tmp_path / "half.safetensors", CHECKPOINT, "-o", tmp_path / "plan.safetensors")
    run("prune", tmp_path / "plan.safetensors", "--repair", "none", "-o", other / "pruned.safetensors")
    pictures = []
    for poke in (found, tmp_path / "half.safetensors"):  # of the second none is left
        run("draw", other / "pruned.safetensors", "--poke", f"{poke}:-3", *drawn)
        pictures.append(Image.open(tmp_path / "drawings" / "a-three_0.png").copy())
    run("draw", other / "pruned.safetensors", *drawn)
    as_it_is = Image.open(tmp_path / "drawings" / "a-three_0.png")
    assert ImageChops.difference(pictures[0], as_it_is).getbbox() is not None
    assert ImageChops.difference(pictures[1], as_it_is).getbbox() is None


def test_recordings_are_compared_too(run, prompts, tmp_path: Path):
    folders = [tmp_path / name for name in ("with", "without", "again")]
    for number, (folder, some) in enumerate(zip(folders, (prompts[0], prompts[1], prompts[1]), strict=True)):
        run("record", CHECKPOINT, folder, "--prompts", some, "--steps", 2, "--seed", 100 * number)
    given = "neurons", "find", CHECKPOINT, "--with", folders[0], "-o", tmp_path / "n.safetensors"
    run(*given, "--without", folders[1], "--without", folders[2], "--percent", 1, "--streams", "txt", "--spare", 2)
    found = Neurons.load(tmp_path / "n.safetensors")
    assert 0 < found.count <= 40
    assert all("txt" in name for name in found.sites)
    assert found.chance is not None
    assert found.spare == 2
    assert found.factor is None
    for wrong, sentence in (
        (("--without", prompts[1]), "one of each cannot be compared"),
        (("--without", folders[1], "--sigma-from", 0.5), "are for prompts"),
        (("--without", folders[1], "--steps", 4), "--images and --steps are for prompts"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(*given, *wrong)
