"""Retraining layers (retrain/layers.py, blocks.py, rows.py) and what is written and read of them (retrain/files.py)."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.states import StateChoice
from flux_poke.retrain.blocks import BlockProblem, Chain
from flux_poke.retrain.files import PICTURE, STATS, draw_stats, stats_table
from flux_poke.retrain.layers import grouped, retrain_layers
from flux_poke.retrain.options import Options
from flux_poke.retrain.problem import held_out_loss
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file

QUICK = Options(steps=20, eval_every=10, learning_rate=1e-3, save_dtype="float32")


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
    problem = BlockProblem(chain, recorded.states, QUICK)
    by_hand = loss_after(recorded, Cut(recorded.dense, recorded.plan), 1, 2, torch.cat(problem.held_out))
    assert held_out_loss(problem).relative == pytest.approx(by_hand, rel=1e-4)
    whole = BlockProblem(Chain.load(recorded.dense.tensors, range(1, 3)), recorded.states, QUICK)
    assert held_out_loss(whole).relative < 1e-9


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
    problem = BlockProblem(Chain.load(Replaced(dense, layers), range(4, 6)), states, Options())
    assert together.relative_final < 0.99 * held_out_loss(problem).relative


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


def test_consecutive_layers_are_grouped():
    assert grouped((0, 1, 2, 3), 3) == [range(0, 3), range(3, 4)]
    assert grouped((0, 2, 3), 2) == [range(0, 1), range(2, 4)]


def test_more_blocks_together_than_follow_each_other_are_refused(recorded, tmp_path):
    for layers, thickness in (("all", 5), ("0, 2-3", 3)):
        options = Options(method="closed form", thickness=thickness)
        with pytest.raises(UserError, match=f"no more than {thickness - 1} consecutive layers"):
            retrain_layers(recorded.dense, recorded.plan, recorded.states, layers, tmp_path / "layers", options)
    assert not (tmp_path / "layers").exists()


def test_blocks_that_were_trained_together_are_one_line_of_the_table(recorded, tmp_path):
    options = Options(method="closed form", thickness=2)
    stats = retrain_layers(recorded.dense, recorded.plan, recorded.states, "all", tmp_path, options)
    assert [layer.together for layer in stats] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    lines = stats_table(stats).splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == ["double-0 to double-1", "single-0 to single-1"]


def test_thresholds_in_the_stats_are_those_of_the_plan(recorded, tmp_path):
    settings = {"by": "threshold", "img": 0.1234567890123, "txt": 1e-9, "single": 0.5, "on": "rate"}
    plan = replace(recorded.plan, settings=settings)
    retrain_layers(recorded.dense, plan, recorded.states, "0", tmp_path, Options(method="closed form"))
    found = yaml.safe_load((tmp_path / STATS).read_text())["layer0"]
    assert (found["img_threshold"], found["txt_threshold"]) == (0.1234567890123, 1e-9)
