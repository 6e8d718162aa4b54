"""Retraining layers (retrain/layers.py, blocks.py, rows.py) and what is written and read of them (retrain/files.py)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.call import Call
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice, RowRecorder
from flux_poke.recording.states import StateChoice, StateRecorder
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import trajectory
from flux_poke.retrain.blocks import BlockProblem, Chain
from flux_poke.retrain.files import PICTURE, STATS, draw_stats
from flux_poke.retrain.layers import choose_layers, grouped, retrain_layers
from flux_poke.retrain.loop import held_out_loss
from flux_poke.retrain.options import Options, Progress
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file, save_file

SIGMAS = torch.linspace(1, 0, 5)
QUICK = Options(steps=20, eval_every=10, learning_rate=1e-3, save_dtype="float32")


class Recorded:
    """A small FLUX with half of every MLP cut, and block states and rows of 12 images of it."""

    def __init__(self, tensors, folder: Path, family: str):
        state = tensors(family)
        for site in Dense.of(state).layout.sites:  # neurons of 12 features, which so can stand in for each other
            up, generator = state[f"{site.up}.weight"], torch.Generator().manual_seed(site.index)
            features = torch.randn(12, 128, generator=generator) / 3.5
            up[site.up_row :] = 0.3 * torch.randn(len(up) - site.up_row, 12, generator=generator) @ features
        self.path = folder / f"{family}.safetensors"
        save_file(state, self.path)
        self.dense = Dense.open(self.path)
        self.flux, layout = Flux.load(self.dense.tensors), self.dense.layout
        widths = {site.name: site.width for site in layout.sites}
        kept = {name: torch.arange(0, width, 2) for name, width in widths.items()}
        self.plan = PruningPlan(family, self.dense.fingerprint, kept, widths, "magnitude", "every other neuron")
        store = HiddenStates.for_model(folder / family, family, self.dense.fingerprint)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(12, layout.in_channels // layout.patch**2, 6 * layout.patch, 6, generator=generator)
        context = torch.randn(12, 20, layout.context, generator=generator)
        vector = torch.randn(12, layout.vector, generator=generator) if layout.vector else None
        points, _ = trajectory(self.flux, noise, SIGMAS, context, vector)
        blocks = StateRecorder("blocks", store, StateChoice(4, dtype=torch.float32), indices=range(5))
        rows = RowRecorder(layout.sites, store, RowChoice(rows=36, steps=4))
        with blocks.run() as run, rows.run() as row_run:
            for step, point in enumerate(points):
                call = Call.at(point.x, point.sigma, SIGMAS, step)
                with run.watching(self.flux, call), row_run.watching(self.flux, call), torch.no_grad():
                    point.run(self.flux)
        self.folder = folder / family
        self.states, self.rows = BlockStates.open(self.folder), HiddenStates.open(self.folder)


@pytest.fixture(scope="module")
def recorded(tensors, tmp_path_factory) -> Recorded:
    return Recorded(tensors, tmp_path_factory.mktemp("recorded"), "flux1")


@pytest.fixture(scope="module", params=["flux1", "flux2"])
def either(request, recorded, tensors, tmp_path_factory) -> Recorded:
    if request.param == "flux1":
        return recorded
    return Recorded(tensors, tmp_path_factory.mktemp("recorded"), request.param)


def loss_after(recorded, tensors, first, last, samples):
    """Relative squared error of the state after block `last`, by hand: the model's own blocks, one after the other."""
    flux, state = Flux.load(tensors), recorded.states.batch(samples, first)
    double = single = state.vec
    if recorded.dense.layout.family == "flux2":
        double = (flux.double_stream_modulation_img(state.vec), flux.double_stream_modulation_txt(state.vec))
        single = flux.single_stream_modulation(state.vec)
    img, txt = state.img, state.txt
    with torch.no_grad():
        for place in range(first, last + 1):
            if place < 2:
                img, txt = flux.double_blocks[place](img=img, txt=txt, vec=double, pe=state.pe)
            else:
                tokens = flux.single_blocks[place - 2](torch.cat((txt, img), 1), vec=single, pe=state.pe)
                txt, img = tokens[:, : txt.shape[1]], tokens[:, txt.shape[1] :]
    goal = recorded.states.batch(samples, last + 1)
    errors = [((found - right) ** 2).sum() / (right**2).sum() for found, right in ((img, goal.img), (txt, goal.txt))]
    return (sum(errors) / 2).item()


def held_out_samples(recorded, stats):
    return torch.isin(recorded.states.image, torch.tensor(stats.held_out_images)).nonzero().squeeze(1)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_retrained_block_is_nearer_to_the_dense_one_on_images_it_was_not_trained_on(either, place, tmp_path):
    (stats,) = retrain_layers(either.dense, either.plan, either.states, str(place), tmp_path, QUICK)
    samples = held_out_samples(either, stats)
    assert 0 < len(samples) < len(either.states)
    layers = RetrainedLayers.open(tmp_path, either.dense, place, place)
    assert stats.relative_cut == pytest.approx(
        loss_after(either, Cut(either.dense, either.plan), place, place, samples), rel=1e-3
    )
    assert stats.relative_final == pytest.approx(
        loss_after(either, Replaced(either.dense, layers), place, place, samples), rel=1e-3
    )
    assert stats.relative_final <= stats.relative_start < 0.6 * stats.relative_cut


@pytest.mark.parametrize("place", [0, 3])
def test_gradient_steps_alone_bring_a_block_nearer_too(either, place, tmp_path):
    options = Options(steps=40, eval_every=20, learning_rate=1e-3, method="gradient")
    (stats,) = retrain_layers(either.dense, either.plan, either.states, str(place), tmp_path, options)
    assert stats.relative_start == stats.relative_cut
    assert stats.relative_final < 0.8 * stats.relative_cut


@pytest.mark.parametrize("place", [0, 2])
def test_rows_alone_retrain_a_block(either, place, tmp_path):
    (stats,) = retrain_layers(either.dense, either.plan, either.rows, str(place), tmp_path, QUICK)
    assert stats.relative_final <= stats.relative_start < stats.relative_cut
    everything = torch.arange(len(either.states))
    replaced = Replaced(either.dense, RetrainedLayers.open(tmp_path, either.dense, place, place))
    before = loss_after(either, Cut(either.dense, either.plan), place, place, everything)
    assert loss_after(either, replaced, place, place, everything) < 0.6 * before


def test_the_target_of_two_blocks_is_the_state_after_the_second(recorded):
    chain = Chain.load(Cut(recorded.dense, recorded.plan), range(1, 3))  # a double and a single block
    problem = BlockProblem("two", chain, recorded.states, QUICK)
    by_hand = loss_after(recorded, Cut(recorded.dense, recorded.plan), 1, 2, torch.cat(problem.judge))
    assert held_out_loss(problem, QUICK).relative == pytest.approx(by_hand, rel=1e-4)
    whole = BlockProblem("two", Chain.load(recorded.dense.tensors, range(1, 3)), recorded.states, QUICK)
    assert held_out_loss(whole, QUICK).relative < 1e-9


def test_two_blocks_trained_together_do_better_after_the_second_than_each_by_itself(tmp_path):
    checkpoint = FOLDER / "flux.safetensors"
    prompts = [digit_prompts(number % 10)[number // 10] for number in range(30)]
    recording = Recording.at(tmp_path)
    record(checkpoint, prompts, recording, Wanted(blocks=StateChoice(4), blocks_of_states="single 2-3"), batch=15)
    dense, states = Dense.open(checkpoint), BlockStates.open(recording.states_folder)
    kept = {f"single-{index}": torch.arange(0, 512, 2) for index in (2, 3)}
    plan = replace(PruningPlan.keeping_all(dense), kept=kept)
    (together, _) = retrain_layers(dense, plan, states, "4-5", tmp_path / "together", Options(thickness=2))
    retrain_layers(dense, plan, states, "4-5", tmp_path / "apart", Options())
    layers = RetrainedLayers.open(tmp_path / "apart", dense)
    problem = BlockProblem("apart", Chain.load(Replaced(dense, layers), range(4, 6)), states, Options())
    assert together.relative_final < 0.99 * held_out_loss(problem, Options()).relative


def test_in_sequential_training_a_layer_learns_from_what_the_retrained_ones_give(recorded, tmp_path):
    options = Options(steps=20, eval_every=10, save_dtype="float32", sequential=True)
    _, second = retrain_layers(recorded.dense, recorded.plan, recorded.states, "1-2", tmp_path, options)
    replaced = Replaced(recorded.dense, RetrainedLayers.open(tmp_path, recorded.dense, 1, 2))
    assert second.relative_final == pytest.approx(
        loss_after(recorded, replaced, 1, 2, held_out_samples(recorded, second)), rel=1e-3
    )


@pytest.mark.parametrize(("first", "layers"), [("0,2", "0,2,3"), ("3", "2-3")])
def test_sequential_training_that_goes_on_ends_where_one_in_one_go_does(recorded, first, layers, tmp_path):
    options = Options(method="closed form", sequential=True, save_dtype="float32")
    given = recorded.dense, recorded.plan, recorded.states
    whole = retrain_layers(*given, layers, tmp_path / "whole", options)
    retrain_layers(*given, first, tmp_path / "parts", options)
    rest = retrain_layers(*given, layers, tmp_path / "parts", options)
    assert [stats.relative_final for stats in rest] == [stats.relative_final for stats in whole]


def test_a_training_that_only_does_harm_saves_what_it_started_from(recorded, tmp_path):
    options = Options(steps=4, eval_every=2, learning_rate=20.0, save_dtype="float32", method="gradient")
    (stats,) = retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path, options)
    assert stats.relative_final == stats.relative_start == stats.relative_cut
    cut = Cut(recorded.dense, recorded.plan)
    for key, tensor in load_file(tmp_path / "0.safetensors").items():
        if not key.startswith("flux_poke."):
            assert torch.equal(tensor, cut[f"double_blocks.0.{key}"])


def test_only_mlps_are_saved_and_attention_stays(recorded, tmp_path):
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0, 2", tmp_path, QUICK)
    parts = {f"{stream}_mlp.{n}.{part}" for stream in ("img", "txt") for n in (0, 2) for part in ("weight", "bias")}
    assert load_file(tmp_path / "0.safetensors").keys() == parts | {
        "flux_poke.kept.double-img-0",
        "flux_poke.kept.double-txt-0",
    }
    single = load_file(tmp_path / "2.safetensors")
    assert torch.equal(single["flux_poke.kept.single-0"].long(), recorded.plan.kept["single-0"])
    assert torch.equal(single["linear1.weight"][: 3 * 128], recorded.dense.tensors["single_blocks.0.linear1.weight"][: 3 * 128])


def test_stats_tell_the_originals_fields_and_more(recorded, tmp_path):
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "1, 3", tmp_path, QUICK)
    assert draw_stats(tmp_path) == tmp_path / PICTURE
    found = yaml.safe_load((tmp_path / STATS).read_text())
    assert found.keys() == {"layer1", "layer3"}
    originals = {
        "layer",
        "img_lines",
        "txt_lines",
        "img_threshold",
        "txt_threshold",
        "initial_loss",
        "final_loss",
        "train_loss",
    }
    assert originals < found["layer1"].keys()
    assert (found["layer1"]["img_lines"], found["layer1"]["txt_lines"], found["layer3"]["single_lines"]) == (256, 256, 256)
    assert found["layer1"]["final_loss"] < found["layer1"]["initial_loss"]
    assert found["layer1"]["method"] == "both"
    assert found["layer1"]["seconds"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_layers_load_in_whatever_they_are_saved_as(recorded, dtype, tmp_path):
    options = Options(method="closed form", save_dtype=dtype)
    (stats,) = retrain_layers(recorded.dense, recorded.plan, recorded.states, "2", tmp_path, options)
    assert load_file(tmp_path / "2.safetensors")["linear2.weight"].dtype == getattr(torch, dtype)
    replaced = Replaced(recorded.dense, RetrainedLayers.open(tmp_path, recorded.dense))
    samples = held_out_samples(recorded, stats)
    assert replaced["single_blocks.0.linear2.weight"].dtype == torch.float32
    assert stats.relative_final == pytest.approx(loss_after(recorded, replaced, 2, 2, samples), rel=1e-3)


def test_just_evaluating_writes_nothing(recorded, tmp_path):
    options = Options(just_evaluate=True)
    (stats,) = retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path / "none", options)
    assert stats.relative_final <= stats.relative_cut
    assert not (tmp_path / "none").exists()


def test_layers_that_are_done_are_not_done_again(recorded, tmp_path):
    first = retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path, QUICK)
    written = (tmp_path / "0.safetensors").stat().st_mtime_ns
    told: list[Progress] = []
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
from flux_poke.retrain.layers import retrain_layers
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


def test_layers_that_are_missing_are_named_and_stay_dense(recorded, tmp_path):
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0, 2-3", tmp_path, Options(method="closed form"))
    layers = RetrainedLayers.open(tmp_path, recorded.dense, 0, 3)
    assert layers.missing == (1,)
    assert "double block 1: left dense" in layers.describe_missing(recorded.dense.layout)
    replaced = Replaced(recorded.dense, layers)
    assert replaced.plan.masked_count == "img256_txt256_single512"
    layout = Flux.load(replaced).layout
    assert [layout.site(f"double-img-{index}").width for index in (0, 1)] == [256, 512]


def test_the_originals_files_of_whole_blocks_load(recorded, tmp_path):
    cut = Cut(recorded.dense, recorded.plan)
    whole = {k.removeprefix("double_blocks.1."): cut[k].bfloat16() for k in cut if k.startswith("double_blocks.1.")}
    save_file({key: tensor.contiguous() for key, tensor in whole.items()}, tmp_path / "1.safetensors")
    replaced = Replaced(recorded.dense, RetrainedLayers.open(tmp_path, recorded.dense))
    assert replaced.plan.masked_count == "img256_txt256_single0"
    for key in cut:
        expected = cut[key].bfloat16().float() if key.startswith("double_blocks.1.") else recorded.dense.tensors[key]
        assert torch.equal(replaced[key], expected)


def test_a_dense_file_in_fp8_with_scales_takes_layers_in(recorded, tmp_path):
    state = {}
    for key in recorded.dense.tensors:
        tensor = recorded.dense.tensors[key]
        if "_blocks." in key and key.endswith(".weight"):
            state[f"{key.removesuffix('.weight')}.scale_weight"] = (scale := tensor.abs().max() / 448)
            tensor = (tensor / scale).to(torch.float8_e4m3fn)
        state[key] = tensor
    save_file(state, tmp_path / "fp8.safetensors")
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path / "layers", QUICK)
    dense = Dense.open(tmp_path / "fp8.safetensors")
    replaced = Replaced(dense, RetrainedLayers.open(tmp_path / "layers", dense))
    name = "double_blocks.0.img_mlp.0"
    found = replaced[f"{name}.weight"].float() * replaced[f"{name}.scale_weight"]
    expected = load_file(tmp_path / "layers" / "0.safetensors")["img_mlp.0.weight"]
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert replaced.kind(f"{name}.weight") == ("F8_E4M3", (256, 128))


def test_another_models_layers_and_shapes_that_do_not_fit_are_refused(recorded, tensors, tmp_path):
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path, Options(method="closed form"))
    with pytest.raises(UserError, match="another model"):
        RetrainedLayers.open(tmp_path, Dense.of(tensors("flux1", seed=9)))
    layer = load_file(tmp_path / "0.safetensors")
    good = {key: tensor for key, tensor in layer.items() if not key.startswith("flux_poke.")}
    for wrong, message in (
        ({**good, "img_mlp.0.weight": good["img_mlp.0.weight"][:100]}, "disagree about its width"),
        ({**good, "img_mlp.2.weight": good["img_mlp.2.weight"][:100]}, "does not fit"),
        ({**good, "linear1.weight": good["img_mlp.0.weight"].clone()}, "has not"),
    ):
        (tmp_path / "bad").mkdir(exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in wrong.items()}, tmp_path / "bad" / "0.safetensors")
        with pytest.raises(UserError, match=message):
            RetrainedLayers.open(tmp_path / "bad", recorded.dense)
    (tmp_path / "bad" / "0.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        RetrainedLayers.open(tmp_path / "bad", recorded.dense)
    with pytest.raises(UserError, match="no layer from 2 to 3"):
        RetrainedLayers.open(tmp_path, recorded.dense, 2, 3)
    with pytest.raises(UserError, match="holds no retrained layers"):
        RetrainedLayers.open(tmp_path / "nowhere", recorded.dense)


def test_what_does_not_belong_together_is_refused(recorded, tensors, tmp_path):
    other = Dense.of(tensors("flux1", seed=9))
    with pytest.raises(UserError, match="another model"):
        retrain_layers(other, recorded.plan, recorded.states, "0", tmp_path)
    uncut = PruningPlan.keeping_all(recorded.dense)
    with pytest.raises(UserError, match="cuts nothing"):
        retrain_layers(recorded.dense, uncut, recorded.states, "0-3", tmp_path)
    with pytest.raises(UserError, match="record block states"):
        retrain_layers(recorded.dense, recorded.plan, recorded.rows, "0-1", tmp_path, Options(thickness=2))
    assert json.dumps(list(tmp_path.iterdir())) == "[]"


def test_layers_are_named_by_numbers_or_by_words(recorded):
    layout = recorded.dense.layout
    assert choose_layers("0-1, 3", layout) == (0, 1, 3)
    assert choose_layers("double 1, single", layout) == (1, 2, 3)
    assert choose_layers("all", layout) == (0, 1, 2, 3)
    for wrong in ("4", "2-1", "1,,2", "triple 1", "-"):
        with pytest.raises(UserError):
            choose_layers(wrong, layout)
    assert grouped((0, 1, 2, 3), 3) == [range(0, 3), range(3, 4)]
    assert grouped((0, 2, 3), 2) == [range(0, 1), range(2, 4)]
