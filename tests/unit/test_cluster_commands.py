"""What `flux-poke cluster record` refuses before a worker begins, and that paths are meant where they were typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_poke.errors import UserError
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import FOLDER

TINY = FOLDER / "flux.safetensors"
WORKFLOW = Path(__file__).parents[2] / "workflows" / "api" / "try_it_tiny.json"


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("zero\none\ntwo\n")
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (WORKFLOW, [], "A workflow runs on ComfyUI: give the folder in which every machine has it with --comfyui"),
        (WORKFLOW, ["--comfyui", ".", "--what", "rows"], "leave out all but --batch"),
        (WORKFLOW, ["--comfyui", ".", "--seed", 3], "leave out all but --batch"),
        (WORKFLOW, ["--comfyui", ".", "--set", "KSampler.nothing=3"], "KSampler has no such input"),
        (TINY, ["--set", "KSampler.steps=3"], "--comfyui and --set are for workflows"),
        (TINY, ["--what", "rows"], "A cluster records internals, with or without hidden states"),
        (TINY, ["--what", "internals,atlas"], "and no atlas"),
        (TINY, ["--what", "internals,rows", "--max-gb", 0.0001], r"3 prompts take up to .* of rows, and 0.1 MB are allowed"),
        (TINY, ["--out", "nowhere://bucket"], "nowhere://bucket cannot be reached"),
        (TINY, ["--address", "127.0.0.1:1"], "No Ray cluster answers at 127"),
        (TINY, ["--gpus-per-worker", 2, "--address", "127.0.0.1:x"], "No Ray cluster answers"),
    ],
)
def test_what_cannot_be_recorded_is_a_sentence(run, prompts, tmp_path, source, options, said):
    pytest.importorskip("ray")
    given = {"--out": tmp_path / "out", "--prompts": prompts, "--address": "127.0.0.1:1"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    with pytest.raises(UserError, match=said):
        run("cluster", "record", source, *(word for pair in given.items() for word in pair))
    assert not (tmp_path / "out").exists()


def test_paths_are_meant_where_they_were_typed_and_one_machine_is_a_cluster(run, prompts, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = run("cluster", "record", TINY, "--prompts", "prompts.txt", "--out", "made/here", "--batch", 2, "--steps", 2)
    assert "made/here: 2 of 2 pieces" in printed
    assert Recording.open(tmp_path / "made" / "here").internals().runs == 2
