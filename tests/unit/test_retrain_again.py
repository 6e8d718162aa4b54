"""Retraining that is done again: what is known again, what is made anew, and what a cancel or a kill leaves."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from flux_poke.pruning.dense import Dense
from flux_poke.retrain.files import STATS
from flux_poke.retrain.layers import open_data, retrain_layers
from flux_poke.retrain.options import Options, TrainingStatus
from safetensors.torch import load_file

QUICK = Options(steps=20, eval_every=10, learning_rate=1e-3, save_dtype="float32")


class Cancelled(Exception):
    pass


def same(one: Path, other: Path) -> bool:
    found, expected = load_file(one), load_file(other)
    return found.keys() == expected.keys() and all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("what", ["blocks", "rows"])
def test_another_recording_of_the_same_shapes_is_trained_on_anew(recorded, what, tmp_path):
    options = Options(method="closed form", save_dtype="float32")
    first, second = (recorded.record(tmp_path / f"recording{seed}", seed) for seed in (1, 2))
    for folder, recordings in (("again", (first, second)), ("second", (second,)), ("first", (first,))):
        for recording in recordings:
            retrain_layers(recorded.dense, recorded.plan, open_data(recording, what), "0", tmp_path / folder, options)
    assert same(tmp_path / "again" / "0.safetensors", tmp_path / "second" / "0.safetensors")
    assert not same(tmp_path / "again" / "0.safetensors", tmp_path / "first" / "0.safetensors")


def test_a_training_on_another_recording_is_not_gone_on_with(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("flux_poke.retrain.loop.SAVE_EVERY", 0.0)
    steps: list[int] = []

    def cancel(status: TrainingStatus) -> None:
        if status.step >= 10:
            raise Cancelled

    first, second = (open_data(recorded.record(tmp_path / f"recording{seed}", seed)) for seed in (1, 2))
    with pytest.raises(Cancelled):
        retrain_layers(recorded.dense, recorded.plan, first, "0", tmp_path / "layers", QUICK, cancel)
    assert list((tmp_path / "layers").glob(".*.training.safetensors"))
    given = recorded.dense, recorded.plan, second, "0", tmp_path / "layers", QUICK
    retrain_layers(*given, lambda status: steps.append(status.step))
    assert min(steps) == 0


@pytest.mark.parametrize(("what", "phase"), [("blocks", "dense blocks"), ("blocks", "reading rows"), ("rows", "ridge")])
def test_cancel_is_heard_within_the_closed_form_of_one_layer(recorded, what, phase, tmp_path):
    told: list[tuple[str, float]] = []

    def cancel(what: str, done: float, total: float) -> None:
        told.append((what, done / total))
        if phase in what:
            raise Cancelled

    data, options = open_data(recorded.recording, what), Options(method="closed form")
    with pytest.raises(Cancelled):
        retrain_layers(recorded.dense, recorded.plan, data, "0", tmp_path, options, progress=cancel)
    assert told[-1][1] < 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_progress_goes_from_nothing_to_all_and_never_back(recorded, tmp_path):
    told: list[float] = []
    given = recorded.dense, recorded.plan, recorded.states, "0-1", tmp_path, QUICK
    retrain_layers(*given, progress=lambda what, done, total: told.append(round(done / total, 9)))
    assert told == sorted(told)
    assert (told[0], round(told[-1], 1)) == (0, 1)


def test_layers_that_are_done_are_not_done_again(recorded, tmp_path):
    first = retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path, QUICK)
    written = (tmp_path / "0.safetensors").stat().st_mtime_ns
    told: list[TrainingStatus] = []
    again = retrain_layers(recorded.dense, recorded.plan, recorded.states, "0-1", tmp_path, QUICK, told.append)
    assert again[0] == first[0]
    assert (tmp_path / "0.safetensors").stat().st_mtime_ns == written
    assert {progress.layer for progress in told} == {"double-1"}
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path, Options(steps=3, save_dtype="float32"))
    assert (tmp_path / "0.safetensors").stat().st_mtime_ns != written


def test_layers_of_the_model_in_another_precision_are_made_anew(recorded, tmp_path):
    options = Options(method="closed form", save_dtype="float32")
    low = Dense.of({key: tensor.bfloat16() for key, tensor in recorded.dense.tensors.items()})
    for dense in (recorded.dense, low):
        retrain_layers(dense, recorded.plan, recorded.states, "0", tmp_path / "one", options)
    retrain_layers(low, recorded.plan, recorded.states, "0", tmp_path / "other", options)
    found, expected = (load_file(tmp_path / folder / "0.safetensors") for folder in ("one", "other"))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_cancelled_training_keeps_finished_layers_and_goes_on_bit_for_bit(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("flux_poke.retrain.loop.SAVE_EVERY", 0.0)

    class Cancel(Exception):
        pass

    def cancel(progress):
        if progress.layer == "double-1" and progress.step >= 10:
            raise Cancel

    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0-1", tmp_path / "whole", QUICK)
    with pytest.raises(Cancel):
        retrain_layers(recorded.dense, recorded.plan, recorded.states, "0-1", tmp_path / "cut", QUICK, cancel)
    assert (tmp_path / "cut" / "0.safetensors").exists()
    assert not (tmp_path / "cut" / "1.safetensors").exists()
    steps = []
    retrain_layers(
        recorded.dense, recorded.plan, recorded.states, "0-1", tmp_path / "cut", QUICK, lambda p: steps.append(p.step)
    )
    assert min(steps) == 10
    assert not list((tmp_path / "cut").glob(".*.training.safetensors"))
    for name in ("0.safetensors", "1.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from flux_poke.recording.block_states import BlockStates
from flux_poke.pruning.checkpoint import save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.retrain import loop
from flux_poke.retrain.layers import open_data, retrain_layers
from flux_poke.retrain.options import Options
loop.SAVE_EVERY = 0.0
checkpoint, plan, states, out = map(Path, sys.argv[1:])
dense = Dense.open(checkpoint)
print("begun", flush=True)
retrain_layers(dense, PruningPlan.load(plan), BlockStates.open(states), "0-3", out, Options(steps=60, eval_every=10))
"""


def test_killed_at_any_time_its_files_are_whole_or_absent_and_it_goes_on(recorded, tmp_path):
    out = tmp_path / "layers"
    recorded.plan.save(tmp_path / "plan.safetensors")
    given = [str(recorded.path), str(tmp_path / "plan.safetensors"), str(recorded.folder), str(out)]
    chance = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, *given], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.05, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in out.glob("*.safetensors"):
            assert len(load_file(path)) >= 5
        if (out / STATS).exists():
            assert yaml.safe_load((out / STATS).read_text())
    subprocess.run([sys.executable, "-c", KILLED, *given], check=True)
    assert {path.name for path in out.glob("*.safetensors")} == {f"{n}.safetensors" for n in range(4)}
    assert yaml.safe_load((out / STATS).read_text()).keys() == {f"layer{n}" for n in range(4)}
