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
from flux_poke.retrain.files import Layer, write_layer
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from flux_poke.retrain.stats import LayerStats, plan_stats
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

    def write(self, place: int, plan: PruningPlan) -> dict[str, torch.Tensor]:
        """Layer `place`; what it holds, by the model's keys."""
        cut, prefix = Cut(self.dense, plan), PREFIXES[place]
        layers = ("_mlp.", "linear1.", "linear2.")
        own = {key: cut[key] + 0.01 for key in cut if key.startswith(prefix) and any(layer in key for layer in layers)}
        stats = LayerStats(
            layer=place, name=f"layer {place}", **plan_stats(self.dense.layout, plan, place), initial_loss=2.0, final_loss=1.0,
            train_loss=1.0, relative_cut=0.5, relative_start=0.25, relative_final=0.125, method="both", data="block states",
            steps=3, seconds=1.0, held_out_images=[1], save_dtype="float32",
        )  # fmt: skip
        write_layer(self.layers, Layer.of(self.dense, plan, place, own, stats, "test"))
        return own

    def write_as_original(self, place: int, plan: PruningPlan) -> None:
        """The whole block and nothing else, as the original flux-poke wrote it."""
        cut, prefix = Cut(self.dense, plan), PREFIXES[place]
        whole = {key.removeprefix(prefix): cut[key].contiguous() for key in cut if key.startswith(prefix)}
        self.layers.mkdir(exist_ok=True)
        save_file(whole, self.layers / f"{place}.safetensors")

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
    first, second = convert_lora(lora, pruned.layout, pruned.plan, pruned.folds, pruned.report).modules
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
        with pytest.raises(UserError, match="disagree about its width"):
            RetrainedLayers.open(folder.layers, folder.dense)
