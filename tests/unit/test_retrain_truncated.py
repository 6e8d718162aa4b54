"""Retraining a plan that truncates modulation layers too: what layers hold of them, and the model they make."""
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.pruning.by_budget import ByBudget
from flux_poke.pruning.checkpoint import Pruned, inspect, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import convert_lora
from flux_poke.pruning.modulation import LowRanks
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.states import StateChoice
from flux_poke.recording.trajectories import Trajectories, trajectory, velocity_error
from flux_poke.retrain.files import layer_files
from flux_poke.retrain.layers import retrain, retrain_layers
from flux_poke.retrain.options import Options
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from flux_poke.tiny.model import FOLDER, STEPS, TinyFlux
from flux_poke.tiny.words import digit_prompts
from safetensors import safe_open
from safetensors.torch import save_file

CHECKPOINT = FOLDER / "flux.safetensors"


def loaded(tensors) -> Flux:
    """With every tensor in float32."""
    return Flux.load({key: tensors[key].float() for key in tensors})


class Fitted:
    """The tiny FLUX, a recording of it, and a plan that leaves half of all its parameters."""

    def __init__(self, folder: Path):
        self.dense, self.recording = Dense.open(CHECKPOINT), Recording.at(folder / "recording")
        prompts = [digit_prompts(n % 10)[n // 10] for n in range(40)]
        record(CHECKPOINT, prompts[:20], self.recording, Wanted(rows=RowChoice(rows=48, steps=4)), batch=20)
        # of other images, since those that repair was fitted to would be held out from training alone
        states = Wanted(internals=False, trajectories=StateChoice(4), blocks=StateChoice(2))
        record(CHECKPOINT, prompts[20:], self.recording, states, seed=20, batch=20)
        self.plan = make_plan(self.dense, self.recording, ByBudget(share=0.5)).plan
        self.only_truncated = replace(self.plan, kept={})
        tiny = TinyFlux.load()
        prompts = [digit_prompts(digit)[8] for digit in range(10)]
        self.points, _ = trajectory(tiny.flux, tiny.noise(10, 5), FluxTimer(STEPS).sigmas(), *tiny.words(prompts))

    def error(self, tensors) -> float:
        """Relative velocity error on prompts and seeds that were not recorded."""
        return velocity_error(loaded(tensors), self.points)

    def cut(self, plan: PruningPlan, method: str = "none") -> Cut:
        return Cut(self.dense, plan, Repairs(self.dense, plan, method, self.recording))

    def replaced(self, folder: Path) -> Replaced:
        return Replaced(self.dense, RetrainedLayers.open(folder, self.dense))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Fitted:
    return Fitted(tmp_path_factory.mktemp("fitted"))


def require_shapes_of(replaced: Replaced, cut: Cut) -> None:
    assert set(replaced) == set(cut)
    assert len(replaced) == len(cut)
    for key in cut:
        assert key in replaced
        assert replaced.kind(key) == cut.kind(key)
        assert tuple(replaced[key].shape) == replaced.shape(key)
    for key in cut.thin:
        assert torch.equal(replaced[key], cut[key])
    for site in cut.dense.layout.modulated:
        assert (f"{site.modulation}.weight" in replaced) == (site.name not in cut.plan.ranks)


@pytest.fixture(scope="module")
def distilled(fitted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    retrain("distill", fitted.dense, fitted.plan, fitted.recording, folder, steps=40, batch=16, save_dtype="float32")
    return folder


def test_distilled_layers_are_the_smaller_model_of_the_plan_and_better_than_its_closed_form(fitted, distilled):
    replaced, repaired = fitted.replaced(distilled), fitted.cut(fitted.plan, "affine")
    assert replaced.plan.ranks == fitted.plan.ranks
    assert replaced.plan.kept.keys() == fitted.plan.kept.keys()
    require_shapes_of(replaced, repaired)
    parameters = sum(torch.Size(replaced.shape(key)).numel() for key in replaced)
    dense = sum(fitted.dense.tensors[key].numel() for key in fitted.dense.tensors)
    assert 0.48 < parameters / dense < 0.51
    assert fitted.error(replaced) < 0.8 * fitted.error(repaired)


@pytest.mark.parametrize(("on", "method"), [("blocks", "both"), ("rows", "closed form")])
def test_layer_by_layer_it_is_the_model_of_the_plan_too(fitted, on, method, tmp_path):
    given = fitted.dense, fitted.plan, fitted.recording, tmp_path
    stats = retrain(method, *given, on=on, steps=8, save_dtype="float32")
    replaced, cut = fitted.replaced(tmp_path), fitted.cut(fitted.plan)
    assert replaced.plan.ranks == fitted.plan.ranks
    require_shapes_of(replaced, cut)
    assert all(layer.relative_final < 0.5 * layer.relative_cut for layer in stats)
    assert fitted.error(replaced) < 0.3 * fitted.error(cut)


def test_block_states_are_compared_with_what_the_truncated_block_gives(fitted, tmp_path):
    options = Options(just_evaluate=True)
    states = BlockStates.open(fitted.recording.states_folder)
    given = fitted.dense, fitted.only_truncated, states, "0", tmp_path, options
    (stats,) = retrain_layers(*given, recording=fitted.recording)
    held_out = torch.isin(states.image, torch.tensor(stats.held_out_images)).nonzero().squeeze(1)
    state, goal = states.batch(held_out, 0), states.batch(held_out, 1)
    with torch.no_grad():
        block = loaded(fitted.cut(fitted.only_truncated)).double_blocks[0]
        img, txt = block(img=state.img, txt=state.txt, vec=state.vec, pe=state.pe)
    errors = [((a - b) ** 2).sum() / (b**2).sum() for a, b in ((img, goal.img), (txt, goal.txt))]
    assert stats.relative_final == pytest.approx((sum(errors) / 2).item(), rel=1e-3)


@pytest.mark.parametrize("on", ["blocks", "rows"])
def test_blocks_of_which_the_modulation_alone_is_truncated_have_layers_of_that_alone(fitted, on, tmp_path):
    stats = retrain("both", fitted.dense, fitted.only_truncated, fitted.recording, tmp_path, on=on, steps=2)
    assert [layer.steps for layer in stats] == [0] * 6
    assert layer_files(tmp_path).keys() == set(range(6))
    for index, path in layer_files(tmp_path).items():
        modulated = ("img_mod", "txt_mod") if index < 2 else ("modulation",)
        parts = {f"{name}.lin.{part}" for name in modulated for part in ("down.weight", "up.weight", "bias")}
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == parts
    replaced, cut = fitted.replaced(tmp_path), fitted.cut(fitted.only_truncated)
    require_shapes_of(replaced, cut)
    assert all(torch.equal(replaced[key], cut[key]) for key in cut)


def test_what_distillation_trains_of_whole_mlps_is_in_its_layers(fitted, tmp_path):
    plan = replace(fitted.plan, kept={"single-3": torch.arange(0, 512, 2)}, ranks={"single-2": 3})
    given = fitted.dense, plan, fitted.recording, tmp_path
    stats = retrain("distill", *given, steps=2, batch=8, save_dtype="float32")
    samples = Trajectories.open(fitted.recording.states())
    point = samples.batch(torch.isin(samples.image, torch.tensor(stats[0].held_out_images)).nonzero().squeeze(1))
    with torch.no_grad():
        missed = point.run(loaded(fitted.replaced(tmp_path))) - point.velocity
    assert (missed.square().sum() / point.velocity.square().sum()).item() == pytest.approx(stats[0].relative_final, rel=1e-2)


def test_a_layer_in_eight_bits_keeps_its_modulation_as_it_was(fitted, tmp_path):
    given = fitted.dense, fitted.plan, fitted.recording, tmp_path
    retrain("closed form", *given, layers="0", on="rows", save_dtype="float8_e4m3fn")
    replaced, cut = fitted.replaced(tmp_path), fitted.cut(fitted.plan)
    for part in ("down.weight", "up.weight", "bias"):
        key = f"double_blocks.0.img_mod.lin.{part}"
        assert torch.equal(replaced[key], cut[key])
    assert replaced.plan.ranks.keys() == {"double-img-0", "double-txt-0"}
    assert replaced.shape("double_blocks.1.img_mod.lin.weight") == (768, 128)


def test_it_is_written_as_a_pruned_file_which_loras_on_modulation_follow(fitted, distilled, tmp_path):
    replaced = fitted.replaced(distilled)
    save_pruned(tmp_path / "out.safetensors", replaced)
    pruned = Pruned.open(tmp_path / "out.safetensors")
    assert pruned.plan.ranks == pruned.layout.ranks == fitted.plan.ranks
    assert pruned.tensors.keys() == set(replaced)
    assert all(torch.equal(pruned.tensors[key], replaced[key]) for key in replaced)
    assert "modulation of" in inspect(tmp_path / "out.safetensors")
    expected = LowRanks(fitted.dense, fitted.plan, fitted.recording).vectors
    assert pruned.vectors is not None
    torch.testing.assert_close(pruned.vectors.mean.float(), expected.mean.float())
    layer = "diffusion_model.double_blocks.0.img_mod.lin"
    lora = {f"{layer}.lora_A.weight": torch.randn(4, 128), f"{layer}.lora_B.weight": torch.randn(768, 4)}
    facts = (pruned.layout, pruned.plan, pruned.folds, pruned.report)
    (module,) = convert_lora(lora, *facts, pruned.vectors, pruned.tensors).modules
    assert module.outcome == "converted"

    moved = tmp_path / "moved"
    shutil.copytree(distilled, moved)
    for path in layer_files(moved).values():
        rewrite(path, plan=lambda facts: {**facts, "recording": str(tmp_path / "nowhere")})
    save_pruned(tmp_path / "alone.safetensors", fitted.replaced(moved))
    alone = Pruned.open(tmp_path / "alone.safetensors")
    assert alone.vectors is None
    (module,) = convert_lora(lora, *facts, alone.vectors, alone.tensors).modules
    assert module.outcome == "skipped"
    assert "was not stored with the model" in module.why


def test_where_what_is_trained_on_has_no_texts_those_of_the_plans_recording_truncate(fitted, tmp_path):
    states = Recording.at(tmp_path / "states")
    prompts = [digit_prompts(digit)[3] for digit in range(5)]
    record(CHECKPOINT, prompts, states, Wanted(internals=False, blocks=StateChoice(2)), batch=5)
    retrain("closed form", fitted.dense, fitted.plan, states, tmp_path / "layers", layers="1")
    found, cut = fitted.replaced(tmp_path / "layers"), fitted.cut(fitted.plan)
    key = "double_blocks.1.txt_mod.lin.up.weight"
    assert torch.equal(found[key], cut[key])
    lost = replace(fitted.plan, recording=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is not there"):
        retrain("closed form", fitted.dense, lost, states, tmp_path / "none", layers="1")
    assert not (tmp_path / "none").exists()


def test_more_texts_truncate_anew(fitted, tmp_path):
    recording = Recording.at(tmp_path / "recording")
    shutil.copytree(fitted.recording.folder, recording.folder)
    states = BlockStates.open(fitted.recording.states_folder)  # which stay the same
    given = fitted.dense, fitted.plan, states, "2", tmp_path / "layers", Options(method="closed form")
    first = retrain_layers(*given, recording=recording)
    assert retrain_layers(*given, recording=recording) == first
    before = fitted.replaced(tmp_path / "layers")["single_blocks.0.modulation.lin.up.weight"]
    prompts = [digit_prompts(digit)[12] for digit in range(10)]
    wanted = Wanted(internals=False, rows=RowChoice(rows=8, steps=2))
    record(CHECKPOINT, prompts, recording, wanted, seed=9, batch=10)
    retrain_layers(*given, recording=recording)
    after = fitted.replaced(tmp_path / "layers")["single_blocks.0.modulation.lin.up.weight"]
    assert not torch.equal(before, after)


def rewrite(path: Path, tensors: dict | None = None, plan=None) -> None:
    """The layer at `path` with other tensors, of which None takes one out, and other facts of its plan."""
    with safe_open(path, "pt") as file:
        found, header = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {}), file.metadata()
    if plan is not None:
        header["plan"] = json.dumps(plan(json.loads(header["plan"])))
    save_file({key: tensor for key, tensor in found.items() if tensor is not None}, path, header)


LIN = "img_mod.lin"


@pytest.mark.parametrize(
    ("tensors", "ranks", "said"),
    [
        ({f"{LIN}.up.weight": None}, {}, rf"lacks {LIN}\.up\.weight"),
        ({f"{LIN}.bias": None}, {}, rf"lacks {LIN}\.bias"),
        ({f"{LIN}.down.weight": torch.zeros(3, 128)}, {}, r"lin\.down\.weight has the shape \(3, 128\), expected \(6, 128\)"),
        ({f"{LIN}.up.weight": torch.zeros(768, 5)}, {}, r"lin\.up\.weight has the shape \(768, 5\), expected \(768, 6\)"),
        ({f"{LIN}.bias": torch.zeros(767)}, {}, r"lin\.bias has the shape \(767,\)"),
        ({f"{LIN}.weight": torch.zeros(768, 128)}, {}, rf"has {LIN}\.weight, which double block 0 .* has not"),
        ({"txt_mod.lin.down.scale": torch.zeros(1)}, {}, r"has txt_mod\.lin\.down\.scale"),
        ({}, {"double-img-0": None}, rf"has {LIN}\.down\.weight, which double block 0 .* has not"),
        ({}, {"double-img-0": 7}, r"expected \(7, 128\)"),
        ({}, {"double-img-0": 0}, "damaged"),
        ({}, {"double-img-1": 8}, "tells of double-img-1, which is in another block"),
    ],
)
def test_thin_tensors_that_do_not_fit_are_refused_in_a_sentence(fitted, distilled, tensors, ranks, said, tmp_path):
    shutil.copy(distilled / "0.safetensors", tmp_path)

    def changed(facts: dict) -> dict:
        found = {**facts["ranks"], **ranks}
        return {**facts, "ranks": {name: rank for name, rank in found.items() if rank is not None}}

    assert fitted.plan.ranks["double-img-0"] == 6
    rewrite(tmp_path / "0.safetensors", tensors, changed)
    with pytest.raises(UserError, match=said):
        RetrainedLayers.open(tmp_path, fitted.dense)


def test_thin_tensors_that_are_not_finite_are_refused_in_a_sentence(fitted, distilled, tmp_path):
    shutil.copy(distilled / "0.safetensors", tmp_path)
    rewrite(tmp_path / "0.safetensors", {f"{LIN}.bias": torch.full((768,), torch.nan)})
    with pytest.raises(UserError, match="not finite"):
        fitted.replaced(tmp_path)[f"double_blocks.0.{LIN}.bias"]


def test_ranks_of_a_model_without_modulation_of_its_own_are_refused(either, tmp_path):
    if either.dense.layout.family == "flux1":
        pytest.skip("FLUX.1 has them")
    retrain_layers(either.dense, either.plan, either.states, "0", tmp_path, Options(method="closed form"))
    rewrite(tmp_path / "0.safetensors", plan=lambda facts: {**facts, "ranks": {"double-img-0": 4}})
    with pytest.raises(UserError, match=r"0\.safetensors is not a retrained layer"):
        RetrainedLayers.open(tmp_path, either.dense)
