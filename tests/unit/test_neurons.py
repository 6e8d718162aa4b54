"""Neurons of a concept: found by comparing internals, saved, joined, subtracted, made into plans and LoRA files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.files import write_safetensors
from flux_poke.flux.model import Flux
from flux_poke.poking.export import lora_of, save_lora
from flux_poke.poking.find import Search, find, shuffled
from flux_poke.poking.neurons import FORMAT, Measured, Neurons, SiteDirections, SiteNeurons
from flux_poke.poking.poke import Poke, Where, poked
from flux_poke.pruning.dense import Dense
from flux_poke.recording.internals import Internals
from flux_poke.recording.statistics import SiteInternals
from flux_poke.tiny.model import SHIPPED, TinyFlux
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

DENSE = Dense.open(SHIPPED["flux1"] / "flux.safetensors")
LAYOUT = DENSE.layout
TOKENS = 50


def recorded(generator: torch.Generator, planted: dict[str, list[int]] | None = None) -> Internals:
    """Internals of random activations, in which the neurons named stand far from the others'."""
    sites = {}
    for site in LAYOUT.sites:
        h = torch.randn(TOKENS, site.width, generator=generator, dtype=torch.float64) / 10
        h[:, (planted or {}).get(site.name, [])] += 3
        sites[site.name] = SiteInternals((h > 0).sum(0), TOKENS, h.sum(0), h.square().sum(0))
    return Internals.new(LAYOUT.family, DENSE.fingerprint, sites, steps=1)


@pytest.fixture(scope="module")
def recordings() -> tuple[list[Internals], list[Internals]]:
    generator = torch.Generator().manual_seed(3)
    planted = {"double-txt-1": [7, 200], "single-3": [11]}
    return [recorded(generator, planted) for _ in range(2)], [recorded(generator) for _ in range(8)]


@pytest.fixture(scope="module")
def found(recordings) -> Neurons:
    with_it, without = recordings
    return find(DENSE.tensors, LAYOUT, with_it, without, Search(count=3), "a test against others")


def test_neurons_that_stand_out_are_found(found: Neurons):
    assert {name: site.indices.tolist() for name, site in found.sites.items()} == {"double-txt-1": [7, 200], "single-3": [11]}
    assert found.count == 3
    known = found.sites["single-3"].measured
    column = DENSE.tensors["single_blocks.3.linear2.weight"][:, 128 + 11].float().norm()
    torch.testing.assert_close(known.difference, torch.tensor([3.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(known.effect, known.difference.abs() * column.reshape(1))
    assert 0.05 < known.spread.item() < 0.15
    assert found.chance == 0.0
    assert found.explained is not None
    assert found.explained > 0.5


def test_what_is_chosen_is_what_changes_the_concept_most_and_the_others_least(recordings):
    """The score of every neuron, from its definition."""
    with_it, without = recordings
    spare = 4.0
    found = find(DENSE.tensors, LAYOUT, with_it, without, Search(share=0.01, spare=spare))
    scores = []
    for site in LAYOUT.sites:
        columns = DENSE.tensors[f"{site.down}.weight"][:, site.down_column :].double().square().sum(0)
        tokens = [sum(one.sites[site.name].tokens for one in some) for some in recordings]
        mean = sum(one.sites[site.name].sum for one in without) / tokens[1]
        spread = sum(one.sites[site.name].sum_sq for one in without) / tokens[1] - mean**2
        # the concept's mean square about the others' mean
        square = sum(one.sites[site.name].sum_sq - 2 * mean * one.sites[site.name].sum for one in with_it)
        gain = square / tokens[0] + mean**2
        scores += [(value, site.name, index) for index, value in enumerate((columns * (gain - spare * spread)).tolist())]
    expected = {(name, index) for value, name, index in sorted(scores, reverse=True)[:40] if value > 0}
    assert {(name, index) for name, site in found.sites.items() for index in site.indices.tolist()} == expected


def test_what_chance_gives_is_told(recordings):
    """Between drawings that do not differ there are neurons too, and by chance as many."""
    _, without = recordings
    generator = torch.Generator().manual_seed(9)
    found = find(DENSE.tensors, LAYOUT, [recorded(generator)], without, Search(count=40, spare=0.0))
    assert found.chance is not None
    assert 20 < found.chance < 80
    first, rest = shuffled(without, 3, seed=1)
    assert (len(first), len(rest)) == (3, 5)
    assert {id(one) for one in [*first, *rest]} == {id(one) for one in without}
    assert "among the others alone" in found.totals()


def test_one_recording_each_is_enough_but_for_the_control(recordings):
    with_it, without = recordings
    found = find(DENSE.tensors, LAYOUT, with_it[:1], without[:1], Search(count=3))
    assert found.count == 3
    assert found.chance is None


def test_recordings_that_cannot_be_compared_are_refused(recordings):
    with_it, without = recordings
    with pytest.raises(UserError, match="no recording without the concept"):
        find(DENSE.tensors, LAYOUT, with_it, [])
    original = replace(without[0], fingerprint=None)
    with pytest.raises(UserError, match="hold no means"):
        find(DENSE.tensors, LAYOUT, with_it, [original])
    tiny = TinyFlux.load(family="flux2").flux
    with pytest.raises(UserError, match="is not of this model"):
        find(tiny.state_dict(), tiny.layout, with_it, without)
    with pytest.raises(UserError, match="let the others count less"):
        find(DENSE.tensors, LAYOUT, without[:1], without[1:], Search(spare=1e6))
    for wrong in ({"count": 0}, {"share": 0.0}, {"spare": -1.0}):
        with pytest.raises(UserError):
            Search(**wrong)


@pytest.fixture(scope="module")
def weighed(found: Neurons) -> Neurons:
    """The same, as if they had been learned."""
    weights = {"double-txt-1": torch.tensor([2.5, -0.5]), "single-3": torch.tensor([1.0])}
    sites = {name: replace(site, measured=replace(site.measured, weight=weights[name])) for name, site in found.sites.items()}
    return replace(found, sites=sites, factor=0.0, chance=None)


def test_a_file_holds_weights_that_were_learned(found: Neurons, weighed: Neurons, tmp_path: Path):
    weighed.save(tmp_path / "n.safetensors")
    read = Neurons.load(tmp_path / "n.safetensors")
    assert (read.learned, read.own_factor, found.learned, found.own_factor) == (True, 0.0, False, -1.0)
    assert read.table() == weighed.table()
    assert "each turned by a weight of its own; turned with factor 0" in read.totals()
    assert {line.split()[-1] for line in read.table().splitlines()[-4:]} == {"weight", "2.50", "-0.50", "1.00"}
    assert "weight" not in found.table()
    for name, site in weighed.sites.items():
        assert torch.equal(read.sites[name].measured.weight, site.measured.weight)
    other = Neurons.of(LAYOUT, DENSE.fingerprint, {"double-txt-1": torch.tensor([100, 7]), "single-1": torch.tensor([1])}, "b")
    both = read.join(other)
    assert both.sites["double-txt-1"].indices.tolist() == [7, 100, 200]
    assert both.sites["double-txt-1"].measured.weight.tolist() == [2.5, 2.0, -0.5]  # at factor 0 as the other was at -1
    assert both.sites["single-1"].measured.weight.tolist() == [2.0]
    assert both.own_factor == 0.0
    assert other.join(read).sites["double-txt-1"].measured.weight.tolist() == [2.0, 2.0, -0.5]  # 7 as it is in the first
    assert read.subtract(other).sites["double-txt-1"].measured.weight.tolist() == [-0.5]


def test_a_file_holds_them_whole(found: Neurons, tmp_path: Path):
    vectors = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    along = {"single-0": SiteDirections(vectors, Measured.about(torch.tensor([0.5, -1.0])))}
    whole = replace(found, directions=along, sigmas=(0.3, 1.0), workflow={"prompt": "{}"})
    whole.save(tmp_path / "n.safetensors", {"workflow": '{"a": 1}'})
    read = Neurons.load(tmp_path / "n.safetensors")
    assert read.table() == whole.table()
    assert (read.sigmas, read.compared, read.chance, read.widths) == ((0.3, 1.0), found.compared, 0.0, found.widths)
    assert read.workflow == {"prompt": "{}", "workflow": '{"a": 1}'}
    assert read.fingerprint == found.fingerprint
    assert torch.equal(read.directions["single-0"].vectors, vectors)
    for name, site in whole.sites.items():
        assert torch.equal(read.sites[name].indices, site.indices)
        assert torch.equal(read.sites[name].measured.mean, site.measured.mean)


def damage(tensors: dict[str, Tensor], header: dict[str, str], how: str) -> None:
    match how:
        case "descending":
            tensors["double-txt-1"] = tensors["double-txt-1"].flip(0)
        case "beyond":
            tensors["single-3"] = torch.tensor([512], dtype=torch.int32)
        case "nan":
            tensors["single-3.mean"] = torch.tensor([float("nan")])
        case "short":
            tensors["double-txt-1.effect"] = torch.zeros(1)
        case "lacks":
            del tensors["double-txt-1.mean"]
        case "site":
            tensors["lamp-3"] = tensors["single-3"].clone()
        case "header":
            del header["neurons"]
        case "levels":
            header["neurons"] = header["neurons"].replace('"sigmas": [0.0, 1.0]', '"sigmas": [0.8, 0.1]')
        case "family":
            header["family"] = "sd15"
        case "weights":
            tensors["double-txt-1.weight"] = torch.ones(3)
        case "far":
            tensors["single-3.weight"] = torch.tensor([1e6])


@pytest.mark.parametrize(
    "how", ["descending", "beyond", "nan", "short", "lacks", "site", "header", "levels", "family", "weights", "far"]
)
def test_a_damaged_file_is_told(found: Neurons, tmp_path: Path, how: str):
    found.save(tmp_path / "n.safetensors")
    with safe_open(tmp_path / "n.safetensors", "pt") as file:
        header = dict(file.metadata())
    tensors = load_file(tmp_path / "n.safetensors")
    damage(tensors, header, how)
    write_safetensors(tmp_path / "d.safetensors", tensors, header)
    with pytest.raises(UserError, match=r"d\.safetensors"):
        Neurons.load(tmp_path / "d.safetensors")


def test_other_files_are_none(tmp_path: Path):
    with pytest.raises(UserError, match="There are no neurons"):
        Neurons.load(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match=f"expected '{FORMAT}'"):
        Neurons.load(SHIPPED["flux1"] / "flux.safetensors")


def test_neurons_are_joined_and_subtracted(found: Neurons):
    other = Neurons.of(
        LAYOUT, DENSE.fingerprint, {"double-txt-1": torch.tensor([300, 7]), "double-img-0": torch.tensor([1])}, "b"
    )
    both = found.join(other)
    assert {name: site.indices.tolist() for name, site in both.sites.items()} == {
        "double-img-0": [1], "double-txt-1": [7, 200, 300], "single-3": [11],
    }  # fmt: skip
    assert list(both.sites) == ["double-img-0", "double-txt-1", "single-3"]
    assert both.sites["double-txt-1"].measured.mean[0] == found.sites["double-txt-1"].measured.mean[0]  # its own of neuron 7
    left = both.subtract(other)
    assert {name: site.indices.tolist() for name, site in left.sites.items()} == {"double-txt-1": [200], "single-3": [11]}
    tiny = TinyFlux.load(family="flux2").flux
    of_another = replace(other, fingerprint=Dense.of(tiny.state_dict()).fingerprint)
    for join in (found.join, found.subtract, of_another.join):
        with pytest.raises(UserError, match="of two models"):
            join(other if join == of_another.join else of_another)
    with pytest.raises(UserError, match="0 to 511"):
        Neurons.of(LAYOUT, DENSE.fingerprint, {"single-0": torch.tensor([512])}, "none")


def test_joined_neurons_are_turned_as_they_were_in_their_files(found: Neurons):
    others = {"double-img-0": torch.tensor([1]), "single-3": torch.tensor([12])}
    tuned = replace(found, factor=-2.5)
    assert tuned.join(tuned).own_factor == -2.5
    assert tuned.subtract(Neurons.of(LAYOUT, DENSE.fingerprint, others, "b")).own_factor == -2.5
    measured = replace(Measured.about(torch.tensor([0.3])), weight=torch.tensor([1.5]))
    sites = {name: SiteNeurons(which, measured) for name, which in others.items()}
    learned = replace(Neurons.of(LAYOUT, DENSE.fingerprint, others, "b"), sites=sites, factor=0.0)
    tiny = TinyFlux.load()
    args = tiny.noise(2, 0), torch.tensor([0.9, 0.4]), *tiny.words(["three", "a 7"])
    drawn = []
    for pokes in ([Poke(tuned, -2.5), Poke(learned, 0.0)], [Poke(both := tuned.join(learned), both.own_factor)]):
        with torch.no_grad(), poked(tiny.flux, pokes):
            drawn.append(tiny.flux(*args))
    assert both.own_factor == 0.0
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-5, atol=1e-6)


def test_a_plan_cuts_them(found: Neurons):
    with pytest.raises(UserError, match="There are no neurons to cut"):
        replace(found, sites={}).plan(DENSE)
    plan = found.plan(DENSE)
    assert plan.neurons == (4093, 4096)
    assert {name: plan.removed(name).tolist() for name in plan.kept} == {"double-txt-1": [7, 200], "single-3": [11]}
    everything = Neurons.of(LAYOUT, DENSE.fingerprint, {"single-0": torch.arange(512)}, "all")
    with pytest.raises(UserError, match="at least one has to stay"):
        everything.plan(DENSE)


def with_lora(flux: Flux, lora: dict[str, Tensor]) -> Flux:
    """The model with a LoRA and a difference of biases added to its weights, as ComfyUI does."""
    weights = {key: tensor.clone() for key, tensor in flux.state_dict().items()}
    for key, tensor in lora.items():
        name = key.removeprefix("diffusion_model.")
        if key.endswith(".lora_up.weight"):
            weights[name.replace("lora_up.", "")] += tensor @ lora[key.replace("lora_up", "lora_down")]
        elif key.endswith(".diff_b"):
            weights[name.replace("diff_b", "bias")] += tensor
    return Flux.load(weights)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 2.0])
def test_a_lora_does_what_the_poke_does(found: Neurons, weighed: Neurons, tmp_path: Path, factor: float):
    tiny = TinyFlux.load()
    args = tiny.noise(2, 0), torch.tensor([0.9, 0.4]), *tiny.words(["three", "a 7"])
    for poke in (Poke(found, factor), Poke(weighed, factor), Poke(weighed, factor, about=0.5)):
        rank = save_lora(tmp_path / "lora.safetensors", DENSE.tensors, LAYOUT, [poke])
        assert rank == 2
        with torch.no_grad():
            expected = with_lora(tiny.flux, load_file(tmp_path / "lora.safetensors"))(*args)
            with poked(tiny.flux, [poke]):
                by_hooks = tiny.flux(*args)
        torch.testing.assert_close(expected, by_hooks, rtol=1e-4, atol=1e-5)


def test_a_model_without_biases_takes_a_lora_of_cut_neurons_alone():
    tiny = TinyFlux.load(family="flux2")
    layout, tensors = tiny.flux.layout, tiny.flux.state_dict()
    chosen = Neurons.of(layout, Dense.of(tensors).fingerprint, {"single-1": torch.tensor([3, 99])}, "two")
    args = tiny.noise(2, 0), torch.tensor([0.9, 0.4]), tiny.words(["three", "a 7"])[0]
    with torch.no_grad():
        expected = with_lora(tiny.flux, lora_of(tensors, layout, [Poke(chosen, 0.0, about=0.0)]))(*args)
        with poked(tiny.flux, [Poke(chosen, 0.0, about=0.0)]):
            by_hooks = tiny.flux(*args)
    torch.testing.assert_close(expected, by_hooks, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="has no bias"):
        lora_of(tensors, layout, [Poke(chosen, 0.0, about=0.5)])


def test_what_a_lora_cannot_do_is_told(found: Neurons):
    with pytest.raises(UserError, match="for all noise levels"):
        lora_of(DENSE.tensors, LAYOUT, [Poke(found, 0.0, where=Where(sigmas=(0.5, 1.0)))])
    with pytest.raises(UserError, match="poked twice"):
        lora_of(DENSE.tensors, LAYOUT, [Poke(found, 0.0), Poke(found, 2.0)])
    with pytest.raises(UserError, match="Nothing is changed"):
        lora_of(DENSE.tensors, LAYOUT, [Poke(found, 1.0)])
