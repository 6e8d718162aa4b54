"""Retrained layers in place of dense ones (retrain/replaced.py), and the checkpoint that is made of them."""

from dataclasses import replace

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.checkpoint import Pruned, inspect, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import convert_lora
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.retrain.files import Output
from flux_poke.retrain.layers import retrain_layers
from flux_poke.retrain.loop import Trained
from flux_poke.retrain.options import Options
from flux_poke.retrain.problem import Loss
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from safetensors.torch import load_file, save_file

PREFIXES = ("double_blocks.0.", "double_blocks.1.", "single_blocks.0.", "single_blocks.1.")


class Folder:
    """A dense model in a file, and a folder of layers that are cut by a plan and shifted a little, as training would."""

    def __init__(self, tensors, folder):
        self.path, self.layers = folder / "dense.safetensors", folder / "layers"
        save_file(tensors("flux1"), self.path, {"modelspec.title": "kept"})
        self.dense = Dense.open(self.path)
        widths = {site.name: site.width for site in self.dense.layout.sites}
        kept = {name: torch.randperm(width)[: width // 2].sort().values for name, width in widths.items()}
        whole = replace(PruningPlan.keeping_all(self.dense), kept=kept, score="magnitude", made="by chance")
        self.plan = replace(whole, predicted=dict.fromkeys(kept, 0.25))

    def write(self, block_index: int, plan: PruningPlan) -> dict[str, torch.Tensor]:
        """Layer `block_index`; what it holds, by the model's keys."""
        cut, prefix = Cut(self.dense, plan), PREFIXES[block_index]
        layers = ("_mlp.", "linear1.", "linear2.")
        own = {key: cut[key] + 0.01 for key in cut if key.startswith(prefix) and any(layer in key for layer in layers)}
        cut_loss, start, final = (Loss(relative, 1.0) for relative in (0.5, 0.25, 0.125))
        output = Output(self.layers, cut, Options(save_dtype="float32"), "block states")
        trained = Trained(own, cut_loss, start, final, None, 3, frozenset({1}))
        output.write([block_index], "test", trained, "both", "cut", 0.0)
        return own

    def write_as_original(self, block_index: int, plan: PruningPlan) -> None:
        """The whole block and nothing else, as the original flux-poke wrote it."""
        cut, prefix = Cut(self.dense, plan), PREFIXES[block_index]
        whole = {key.removeprefix(prefix): cut[key].contiguous() for key in cut if key.startswith(prefix)}
        self.layers.mkdir(exist_ok=True)
        save_file(whole, self.layers / f"{block_index}.safetensors")

    def saved(self) -> Pruned:
        replaced = Replaced(self.dense, RetrainedLayers.open(self.layers, self.dense))
        path = self.path.with_name("replaced.safetensors")
        save_pruned(path, replaced)
        pruned = Pruned.open(path)
        assert pruned.tensors.keys() == replaced.keys()
        for key in replaced:
            assert torch.equal(pruned.tensors[key], replaced[key])
        return pruned


@pytest.fixture
def folder(tensors, tmp_path) -> Folder:
    return Folder(tensors, tmp_path)


def test_it_is_a_pruned_checkpoint_that_knows_what_was_kept_and_how(folder, inputs):
    written = folder.write(0, folder.plan) | folder.write(2, folder.plan)
    pruned = folder.saved()
    expected = {key: written.get(key, folder.dense.tensors[key]) for key in folder.dense.tensors}
    flux, dense = Flux.load(pruned.tensors), Flux.load(folder.dense.tensors)
    with torch.no_grad():
        found = flux(**inputs(dense))
        torch.testing.assert_close(found, Flux.load(expected)(**inputs(dense)), rtol=0, atol=0)
        assert not torch.equal(found, dense(**inputs(dense)))
    names = ("double-img-0", "double-txt-0", "single-0")
    assert pruned.plan.kept.keys() == set(names)
    for name in names:
        assert torch.equal(pruned.plan.kept[name], folder.plan.kept[name])
        assert pruned.plan.predicted[name] == 0.25
        assert (pruned.report[name].method, pruned.report[name].before, pruned.report[name].after) == ("retrained", 0.5, 0.125)
    assert pruned.plan.masked_count == "img256_txt256_single256"
    assert pruned.plan.fingerprint == folder.dense.fingerprint
    assert (pruned.plan.score, pruned.plan.made) == ("magnitude", "by chance")
    assert pruned.metadata["modelspec.title"] == "kept"
    text = inspect(pruned.path)
    assert "by chance: 2,304 of 3,072 neurons kept" in text
    assert "retrained" in text


def test_layers_of_full_width_change_weights_and_cut_nothing(folder):
    written = folder.write(1, PruningPlan.keeping_all(folder.dense))
    pruned = folder.saved()
    assert all(torch.equal(pruned.tensors[key], tensor) for key, tensor in written.items())
    assert pruned.plan.masked_count == "img0_txt0_single0"
    assert pruned.report.keys() == {"double-img-1", "double-txt-1"}
    assert "keeps everything: 3,072 of 3,072 neurons kept" in inspect(pruned.path)
    with pytest.raises(UserError, match="pruned already"):
        Dense.open(pruned.path)


def test_of_the_originals_layers_it_says_that_it_does_not_know_which_neurons_are_kept(folder):
    folder.write(0, folder.plan)
    folder.write_as_original(1, folder.plan)
    pruned = folder.saved()
    assert pruned.plan.kept.keys() == {"double-img-0", "double-txt-0"}
    assert pruned.plan.unknown == {"double-img-1": 256, "double-txt-1": 256}
    assert pruned.plan.masked_count == "img512_txt512_single0"
    assert pruned.report["double-img-1"].after is None
    assert "Which neurons were kept is not known of double-img-1, double-txt-1." in inspect(pruned.path)
    lora = {
        f"diffusion_model.double_blocks.{index}.img_mlp.2.lora_{part}.weight": torch.randn(shape)
        for index in (0, 1)
        for part, shape in (("A", (4, 512)), ("B", (128, 4)))
    }
    first, second = convert_lora(
        lora, pruned.layout, pruned.plan, pruned.folds, pruned.report, pruned.vectors, pruned.tensors
    ).modules
    assert (first.outcome, second.outcome) == ("converted", "skipped")
    assert "training does not tell" in first.why
    assert "is not known" in second.why


def test_layers_of_two_plans_are_told_apart(folder):
    folder.write(0, folder.plan)
    folder.write(2, replace(folder.plan, made="by hand", score="obs"))
    plan = folder.saved().plan
    assert (plan.made, plan.score) == ("by chance; by hand", "magnitude; obs")


def test_a_layer_whose_tensors_disagree_is_refused(folder):
    folder.write(0, folder.plan)
    path = folder.layers / "0.safetensors"
    good = load_file(path)
    for wrong in (
        {**good, "flux_poke.kept.double-img-0": torch.arange(7)},
        {key: tensor for key, tensor in good.items() if key != "img_mlp.2.weight"},
        {**good, "txt_mlp.0.bias": torch.zeros(100)},
    ):
        save_file(wrong, path)
        with pytest.raises(UserError, match="does not fit"):
            RetrainedLayers.open(folder.layers, folder.dense)


def test_layers_that_are_missing_are_named_and_stay_dense(recorded, tmp_path):
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0, 2-3", tmp_path, Options(method="closed form"))
    layers = RetrainedLayers.open(tmp_path, recorded.dense, 0, 3)
    assert layers.missing == (1,)
    (note,) = layers.notes(recorded.dense.layout)
    assert "double block 1: left dense" in note
    replaced = Replaced(recorded.dense, layers)
    assert replaced.plan.masked_count == "img256_txt256_single512"
    layout = Flux.load(replaced).layout
    assert [layout.site(f"double-img-{index}").width for index in (0, 1)] == [256, 512]


def test_a_layer_that_was_trained_anew_without_those_it_was_trained_with_is_told_of(recorded, tmp_path):
    def train(layers: str, thickness: int) -> list[str]:
        options = Options(method="closed form", thickness=thickness)
        retrain_layers(recorded.dense, recorded.plan, recorded.states, layers, tmp_path, options)
        return RetrainedLayers.open(tmp_path, recorded.dense).notes(recorded.dense.layout)

    assert train("0-3", 2) == []
    (note,) = train("3", 1)
    assert "mixes two trainings: single block 1, once trained" in note
    assert train("2", 1) == []


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
    retrain_layers(recorded.dense, recorded.plan, recorded.states, "0", tmp_path / "layers", Options(steps=4, eval_every=2))
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
        ({**good, "img_mlp.0.weight": good["img_mlp.0.weight"][:100]}, "does not fit"),
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
