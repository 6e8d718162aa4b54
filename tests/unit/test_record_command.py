"""`flux-poke record` and `flux-poke internals` on recordings: folders in, sentences out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import FOLDER
from PIL import Image
from safetensors.torch import load_file, save_file

CHECKPOINT = FOLDER / "flux.safetensors"


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("a two\na three\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def given(tmp_path, prompts) -> tuple[object, ...]:
    return "record", CHECKPOINT, tmp_path / "digits", "--prompts", prompts, "--steps", 2


def test_rows_and_trajectories_are_recorded_in_one_call_and_counted_out(run, given, tmp_path):
    output = run(*given, "--what", "internals, rows,trajectories", "--keep-steps", 2, "--rows-per-step", 4)
    recording = Recording.open(tmp_path / "digits")
    assert recording.kinds == {"internals", "rows", "trajectories", "amplification"}
    assert recording.states().count("double-img-0") == 2 * 2 * 4
    assert "rows of 2 images" in output
    assert "trajectories of 2 images" in output
    assert "1 run, 2 model calls" in output
    assert "at most" in output


def test_internals_alone_are_what_is_recorded_where_nothing_is_said(run, given, tmp_path):
    run(*given)
    assert Recording.open(tmp_path / "digits").kinds == {"internals"}


@pytest.mark.parametrize(
    ("what", "option", "said"),
    [
        ("internals", ("--keep-steps", 2), "--keep-steps is for rows, lens, blocks, trajectories"),
        ("internals", ("--max-gb", 2), "--max-gb is for rows, lens, blocks, trajectories"),
        ("internals,blocks", ("--rows-per-step", 2), "--rows-per-step is for rows, lens"),
        ("rows,trajectories", ("--blocks", "double"), "--blocks is for blocks"),
        ("rows,lens", ("--storage", "float32"), "--storage is for blocks, trajectories"),
        ("rows,cows", (), "--what rows,cows: expected some of internals, atlas, rows, lens, blocks, trajectories"),
        ("", (), "expected some of"),
        ("rows", ("--max-gb", "nan"), "number of gigabytes above 0"),
        ("rows", ("--max-gb", "inf"), "number of gigabytes above 0"),
        ("blocks", ("--blocks", "triple"), "is not understood"),
        ("rows", ("--no-append",), "--no-append is for internals"),
    ],
)
def test_no_option_is_ignored_and_nothing_is_made_before_all_are_understood(run, given, tmp_path, what, option, said):
    with pytest.raises(UserError, match=said):
        run(*given, "--what", what, *option)
    assert not (tmp_path / "digits").exists()


def test_counts_add_up_or_take_the_place_of_those_before(run, given):
    run(*given)
    assert "2 runs" in run(*given, "--batch", 2)
    assert "2 runs, 4 model calls" in run(*given, "--batch", 1, "--no-append")


def test_the_same_prompts_again_are_said_to_be(run, given):
    assert "recorded before" not in run(*given, "--what", "lens", "--rows-per-step", 4)
    assert "recorded before" in run(*given, "--what", "lens", "--rows-per-step", 4)


def test_internals_are_shown_and_added_up_by_the_names_of_recordings(run, given, tmp_path, prompts):
    run(*given)
    run("record", CHECKPOINT, tmp_path / "others", "--prompts", prompts, "--steps", 2, "--seed", 7)
    one, other = (Internals.load(tmp_path / name / "internals.safetensors") for name in ("digits", "others"))
    output = run(
        "internals", "merge", tmp_path / "digits", tmp_path / "others" / "internals.safetensors", "-o", tmp_path / "all"
    )
    assert f"{tmp_path / 'all' / 'internals.safetensors'}" in output
    both = Recording.open(tmp_path / "all").internals()
    assert torch.equal(both.sites["single-0"].fires, one.sites["single-0"].fires + other.sites["single-0"].fires)
    shown = json.loads(run("internals", "show", tmp_path / "all", "--json"))
    assert (shown["runs"], shown["steps"]) == (2, 4)
    assert "single-3" in run("internals", "show", tmp_path / "all" / "internals.safetensors", "--picture", tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").format == "PNG"


def test_the_originals_counts_are_shown_and_not_added_to(run, given, tmp_path):
    run(*given)
    tensors = load_file(tmp_path / "digits" / "internals.safetensors")
    (tmp_path / "original").mkdir()
    file = tmp_path / "original" / "internals.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if "." not in key}, file)
    before = file.read_bytes()
    assert "Counts of the original flux-poke" in run("internals", "show", tmp_path / "original")
    with pytest.raises(UserError, match="do not say of which model"):
        run("record", CHECKPOINT, tmp_path / "original", *given[3:])
    with pytest.raises(UserError, match="do not say of which model"):
        run("internals", "merge", file, tmp_path / "digits", "-o", tmp_path / "all")
    assert file.read_bytes() == before
    assert not (tmp_path / "all" / "internals.safetensors").exists()
    run("record", CHECKPOINT, tmp_path / "original", *given[3:], "--what", "rows")
    assert Recording.open(tmp_path / "original").fingerprint() is not None
    assert file.read_bytes() == before


def test_a_recording_without_internals_is_not_shown(run, given, tmp_path):
    run(*given, "--what", "lens", "--rows-per-step", 4)
    with pytest.raises(UserError, match=r"holds no internals.*uv run flux-poke record --what internals"):
        run("internals", "show", tmp_path / "digits")
