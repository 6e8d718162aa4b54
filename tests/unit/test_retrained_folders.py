"""Folders of retrained layers: what may be written into one (retrain/files.py), and what is read from one."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.pruning.dense import Dense
from flux_poke.retrain.files import FORMAT, STATS, default_folder, require_own_folder
from flux_poke.retrain.layers import retrain_layers
from flux_poke.retrain.options import Options
from flux_poke.retrain.replaced import Replaced, RetrainedLayers, open_dense_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CLOSED = Options(method="closed form", save_dtype="float32")


@pytest.fixture(scope="module")
def layers(recorded, tmp_path_factory) -> Path:
    """Layers 0 and 1."""
    folder = tmp_path_factory.mktemp("layers")
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0-1", folder, CLOSED)
    return folder


@pytest.fixture
def other(recorded):
    """A plan that keeps other neurons."""
    return replace(recorded.plan, kept={**recorded.plan.kept, "single-1": torch.arange(100)})


def changed(source: Path, target: Path, tensors: dict | None = None, header: dict | None = None) -> None:
    """Writes the layer `source` to `target` with other tensors and header entries; None takes one out."""
    with safe_open(source, "pt") as file:
        all_tensors = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {})
        all_headers = file.metadata() | (header or {})
    target.parent.mkdir(exist_ok=True)
    save_file(
        {key: tensor for key, tensor in all_tensors.items() if tensor is not None},
        target,
        {key: value for key, value in all_headers.items() if value is not None},
    )


def test_another_plans_folder_is_refused_before_any_work(recorded, layers, other):
    before = {path.name: path.stat().st_mtime_ns for path in layers.iterdir()}
    told: list[str] = []
    given = recorded.dense, other, recorded.states, "3", layers, CLOSED
    with pytest.raises(UserError, match="was retrained for another plan") as refused:
        retrain_layers(*given, progress=lambda what, *_: told.append(what))
    assert default_folder(other) in str(refused.value)
    assert not told
    assert {path.name: path.stat().st_mtime_ns for path in layers.iterdir()} == before


def test_the_same_plan_with_other_options_replaces_its_layers(recorded, layers, tmp_path):
    for index in (0, 1):
        changed(layers / f"{index}.safetensors", tmp_path / "own" / f"{index}.safetensors")
    before = load_file(tmp_path / "own" / "0.safetensors")
    options = replace(CLOSED, seed=5, eval_share=0.4)
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path / "own", options)
    after = load_file(tmp_path / "own" / "0.safetensors")
    assert not torch.equal(before["img_mlp.2.weight"], after["img_mlp.2.weight"])


def test_what_is_not_a_layer_of_a_plan_is_not_written_beside(recorded, tmp_path):
    for name in ("0.safetensors", "flux1-dev.safetensors"):
        folder = tmp_path / name.removesuffix(".safetensors")
        folder.mkdir()
        save_file({"a": torch.zeros(1)}, folder / name)
        with pytest.raises(UserError, match="is not a layer of this plan"):
            require_own_folder(folder, recorded.plan)
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / STATS).write_text("layer0: mine")
    with pytest.raises(UserError, match="would be replaced"):
        require_own_folder(tmp_path / "stats", recorded.plan)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        require_own_folder(tmp_path / "file", recorded.plan)
    for own in (tmp_path / "new", tmp_path):
        require_own_folder(own, recorded.plan)


def test_every_plan_has_a_folder_of_its_own(recorded, other):
    assert default_folder(recorded.plan) != default_folder(other)
    assert default_folder(recorded.plan) == default_folder(replace(recorded.plan, made="otherwise"))
    assert len(default_folder(recorded.plan)) < 40


def test_layers_of_two_plans_are_not_taken_for_one_model(recorded, layers, other, tmp_path):
    retrain_layers(recorded.dense, other, recorded.states, "2-3", tmp_path / "mixed", CLOSED)
    for index in (0, 1):
        os.link(layers / f"{index}.safetensors", tmp_path / "mixed" / f"{index}.safetensors")
    with pytest.raises(UserError, match=r"layers of 2 plans \(0, 1; 2, 3\)"):
        RetrainedLayers.open(tmp_path / "mixed", recorded.dense)
    assert RetrainedLayers.open(tmp_path / "mixed", recorded.dense, 0, 1).layers.keys() == {0, 1}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_not_loaded(recorded, layers, value, tmp_path):
    weight = load_file(layers / "0.safetensors")["img_mlp.2.weight"]
    weight[3, 4] = value
    changed(layers / "0.safetensors", tmp_path / "layers" / "0.safetensors", {"img_mlp.2.weight": weight})
    replaced = Replaced(recorded.dense, RetrainedLayers.open(tmp_path / "layers", recorded.dense))
    with pytest.raises(UserError, match=r"img_mlp\.2\.weight that are not finite"):
        replaced["double_blocks.0.img_mlp.2.weight"]


def test_numbers_that_overflow_the_save_dtype_are_not_written(recorded, tmp_path):
    state = {key: recorded.dense.tensors[key].clone() for key in recorded.dense.tensors}
    state["double_blocks.0.img_mlp.2.bias"][0] = 1e30
    dense = Dense.of(state)
    plan = replace(recorded.plan, fingerprint=dense.fingerprint)
    data = recorded.states
    with pytest.raises(UserError, match="not a finite number before training"):
        retrain_layers(dense, plan, data, "0", tmp_path / "layers", replace(CLOSED, save_dtype="float16"))
    assert not list(tmp_path.glob("layers/*.safetensors"))


KEPT = "flux_poke.kept.double-img-0"


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": {KEPT: torch.tensor([0] * 192)}},
        {"tensors": {KEPT: torch.arange(255, -1, -1)}},
        {"tensors": {KEPT: torch.arange(256) + 400}},
        {"tensors": {KEPT: torch.arange(256).view(2, 128)}},
        {"tensors": {KEPT: torch.zeros(0, dtype=torch.int32)}},
        {"tensors": {KEPT: torch.arange(256).float()}},
        {"tensors": {"flux_poke.kept.single-1": torch.arange(9)}},
        {"tensors": {"flux_poke.kept.double-img-77": torch.arange(9)}},
        {"header": {"plan": None}},
        {"header": {"plan": "[]"}},
        {"header": {"plan": "{"}},
        {"header": {"model": "7"}},
        {"header": {"stats": None}},
        {"header": {"stats": "[1]"}},
        {"header": {"stats": json.dumps({"relative_cut": "much", "relative_final": 1.0})}},
        {"header": {"stats": '{"relative_cut": NaN, "relative_final": 1.0}'}},
        {"header": {"format": "flux-poke plan 1"}},
        {"header": {"format": FORMAT.replace("1", "9")}},
    ],
)
def test_a_damaged_layer_is_refused_in_a_sentence(recorded, layers, damage, tmp_path):
    changed(layers / "0.safetensors", tmp_path / "layers" / "0.safetensors", **damage)
    with pytest.raises(UserError, match=r"0\.safetensors"):
        RetrainedLayers.open(tmp_path / "layers", recorded.dense)


def test_a_scale_that_does_not_fit_its_weight_is_refused_in_a_sentence(recorded, tmp_path):
    options = replace(CLOSED, save_dtype="float8_e4m3fn")
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path, options)
    changed(tmp_path / "0.safetensors", tmp_path / "0.safetensors", {"img_mlp.0.scale_weight": torch.ones(7)})
    replaced = Replaced(recorded.dense, RetrainedLayers.open(tmp_path, recorded.dense))
    with pytest.raises(UserError, match=r"the scale of img_mlp\.0\.weight does not fit it"):
        replaced["double_blocks.0.img_mlp.0.weight"]


def test_layers_know_the_checkpoint_of_their_plan(recorded, layers, tmp_path):
    plan = replace(recorded.plan, checkpoint=str(recorded.path))
    retrain_layers(recorded.dense, plan, recorded.states, "0", tmp_path, CLOSED)
    assert open_dense_of(tmp_path).source == recorded.dense.source
    with pytest.raises(UserError, match="--checkpoint"):
        open_dense_of(layers)
    assert open_dense_of(layers, recorded.path).source == recorded.dense.source
    with pytest.raises(UserError, match="holds no layers that tell"):
        open_dense_of(tmp_path / "nothing")
