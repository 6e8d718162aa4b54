"""Recording without a host (drawing.py): all kinds in one pass, checked before, and kept where it is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.model import Flux
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.lens_rows import LensRows
from flux_poke.recording.manifest import Limit
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.states import StateChoice
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import Trajectories
from flux_poke.tiny.model import FOLDER, TinyFlux
from safetensors.torch import save_file

CHECKPOINT = FOLDER / "flux.safetensors"
PROMPTS = ["a three", "a 7", "one", "eight", "a 2"]
ROWS, STATES = RowChoice(rows=4, steps=2), StateChoice(steps=2)
EVERYTHING = Wanted(internals=True, rows=ROWS, lens=ROWS, blocks=STATES, trajectories=STATES, blocks_of_states="double")


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Recording:
    recording = Recording.at(tmp_path_factory.mktemp("recorded") / "digits")
    assert record(CHECKPOINT, PROMPTS, recording, EVERYTHING, seed=3, steps=4, batch=2) == ()
    return recording


def test_all_kinds_are_recorded_in_one_pass(everything):
    recording = Recording.open(everything.folder)
    assert recording.kinds == {"internals", "rows", "lens", "blocks", "trajectories", "amplification"}
    assert recording.internals().steps == 3 * 4
    assert recording.internals().sites["single-0"].tokens == 5 * 4 * (8 + 16)
    assert recording.fingerprint() is not None
    assert set(recording.states().amplification) >= set(recording.internals().sites)


def test_an_image_has_one_number_in_all_kinds(everything):
    states = everything.states()
    numbers = [0, 1, 2, 3, 4]
    assert states.images("single-0").tolist() == numbers
    assert LensRows(states.folder).images.unique().tolist() == numbers
    assert BlockStates.open(states.folder).image.unique().tolist() == numbers
    assert Trajectories.open(states).image.unique().tolist() == numbers
    assert states.image_count() == 5


def test_each_image_is_drawn_from_its_own_seed_and_prompt(everything):
    captures = [c for shard in everything.states().manifest.shards if shard.kind == "trajectories" for c in shard.captures]
    assert {(c.image, c.prompt, c.seed) for c in captures} == {(n, PROMPTS[n], 3 + n) for n in range(5)}


def test_what_was_recorded_is_what_a_plain_run_does(everything):
    """The velocity of image 2 at its recorded steps, from a run of it alone."""
    tiny, samples = TinyFlux.load(), Trajectories.open(everything.states())
    seen = {}
    tiny.sample(
        PROMPTS[2:3], tiny.noise(1, 5), torch.tensor([1, 0.75, 0.5, 0.25, 0]), lambda step, x, v: seen.update({step: v})
    )
    captures = [c for shard in everything.states().manifest.shards if shard.kind == "trajectories" for c in shard.captures]
    mine = [number for number, capture in enumerate(captures) if capture.image == 2]
    assert len(mine) == 2
    for number in mine:
        expected = seen[captures[number].step]
        torch.testing.assert_close(samples.batch(torch.tensor([number])).velocity, expected, rtol=0.02, atol=0.02)


def test_rows_of_pictures_whose_lens_rows_were_recorded_are_no_repetition(tmp_path):
    recording = Recording.at(tmp_path)
    given = CHECKPOINT, PROMPTS[:2], recording
    assert record(*given, Wanted(lens=ROWS), steps=2) == ()
    assert record(*given, Wanted(rows=ROWS), steps=2) == ()
    (note,) = record(*given, Wanted(rows=ROWS), steps=2)
    assert "recorded before" in note
    assert recording.states().image_count() == 2


def test_the_bar_goes_up_and_ends_at_its_end(tmp_path):
    told: list[tuple[float, float]] = []
    wanted = Wanted(internals=True, rows=ROWS)
    record(CHECKPOINT, PROMPTS[:3], Recording.at(tmp_path), wanted, steps=3, batch=2, progress=lambda _, *at: told.append(at))
    shares = [done / total for done, total in told]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(before <= after for before, after in pairwise(shares))
    assert len(shares) >= 2 * 3


def test_a_full_recording_says_so_stops_and_its_bar_ends(tmp_path):
    told: list[tuple[float, float]] = []
    recording = Recording.at(tmp_path)
    wanted = Wanted(trajectories=STATES, limit=Limit(1e-6))
    notes = record(CHECKPOINT, PROMPTS, recording, wanted, steps=2, batch=1, progress=lambda _, *at: told.append(at))
    assert notes == ("The recording is as large as it may become: nothing more is taken.",)
    assert told[-1][0] == told[-1][1]
    assert len(told) == 3  # the two steps of the first image


def never(what: str, done: float, total: float) -> None:
    raise AssertionError("drawn")


def test_what_cannot_be_recorded_to_is_refused_before_anything_is_drawn(tmp_path, tensors):
    """Another model's recording, a file where the folder is expected, foreign files where ours would be."""
    other = Fingerprint.of_tensors(Flux.load(tensors("flux1")).state_dict())
    HiddenStates.for_model(tmp_path / "another" / "hidden_states", "flux1", other)
    (tmp_path / "file").write_text("mine")
    for name in ("foreign", "text", "folder", "damaged"):
        (tmp_path / name).mkdir()
    save_file({"weight": torch.ones(1)}, tmp_path / "foreign" / "internals.safetensors")
    (tmp_path / "text" / "internals.safetensors").write_text("mine")
    (tmp_path / "folder" / "internals.safetensors").mkdir()
    (tmp_path / "damaged" / "hidden_states").mkdir()
    (tmp_path / "damaged" / "hidden_states" / "manifest.json").write_text("{")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    for name, said in {
        "another": "recorded on another model than",
        "file": "file is a file: expected a folder",
        "foreign": "is not an internals file",
        "text": "cannot be read as safetensors",
        "folder": "is a folder",
        "damaged": "manifest.json is damaged",
    }.items():
        with pytest.raises(UserError, match=said):
            record(CHECKPOINT, PROMPTS, Recording.at(tmp_path / name), EVERYTHING, progress=never)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert after == before


def test_nothing_to_record_is_refused():
    with pytest.raises(UserError, match="Nothing is to be recorded"):
        Wanted()


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice

def progress(what, done, total):
    if done > 4.3:
        os._exit(9)

checkpoint, folder = map(Path, sys.argv[1:])
wanted = Wanted(internals=True, rows=RowChoice(rows=4, steps=1))
record(checkpoint, ["a two"] * 6, Recording.at(folder), wanted, steps=4, batch=2, progress=progress)
"""


def test_a_recording_that_is_killed_keeps_what_was_drawn_before(tmp_path):
    folder = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(CHECKPOINT), str(folder)], env=os.environ, timeout=300)
    assert ended.returncode == 9
    recording = Recording.open(folder)
    assert recording.internals().steps == 2 * 4
    assert recording.states().images("single-0").tolist() == [0, 1, 2, 3]
    assert "amplification" in recording.kinds


@pytest.mark.parametrize("wanted", [EVERYTHING, Wanted(rows=RowChoice(rows=4, steps=9)), Wanted(lens=ROWS)])
def test_the_estimate_is_at_least_what_is_taken(tmp_path, wanted):
    recording = Recording.at(tmp_path)
    record(CHECKPOINT, PROMPTS[:2], recording, wanted, steps=3)
    estimates = wanted.estimated_bytes(TinyFlux.load(), 3, 2)
    assert estimates.keys() == recording.kinds - {"internals", "amplification"}
    for kind, size in estimates.items():
        assert 0.5 * size <= recording.states().bytes(kind) <= size, kind


def test_an_internals_file_in_the_folder_stands_for_the_folder(everything):
    assert Recording.open(everything.internals_file) == everything
    assert Recording.open(everything.folder).digest("internals") == Recording.open(everything.internals_file).digest(
        "internals"
    )


def test_a_folder_without_a_recording_is_named_with_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no recording.*Record first"):
        Recording.open(tmp_path)
    with pytest.raises(UserError, match=r"holds no recording"):
        Recording.open(tmp_path / "nowhere")
