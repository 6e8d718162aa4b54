"""Poked MODELs inside ComfyUI: what is turned is what was asked for, on its tokens and noise levels; nothing is left behind."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import test_watching
import torch
from flux_poke.errors import UserError
from flux_poke.poking.neurons import Measured, Neurons
from flux_poke.poking.poke import BlockPoke, Poke, Where
from test_watching import FLUX1, FLUX2, STEPS, WORDS, sample, traces

load, target, watch, record = test_watching.load, test_watching.target, test_watching.watch, test_watching.record
FAMILIES = pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=["flux1", "flux2"])


@pytest.fixture
def poked(in_process):
    from flux_poke.nodes.poking import poked_clone

    def clone(model, *pokes):
        for poke in pokes:
            model = poked_clone(model, poke)
        return model

    return clone


@pytest.fixture
def some(in_process):
    """Seven neurons of every MLP of a MODEL, with means and weights of their own."""
    from flux_poke.nodes.models import flux_layout, model_fingerprint

    def choose(model) -> Neurons:
        layout, generator = flux_layout(model), torch.Generator().manual_seed(4)
        indices = {site.name: torch.randperm(site.width, generator=generator)[:7] for site in layout.sites}
        named = Neurons.of(layout, model_fingerprint(model), indices, "by the test")
        sites = {}
        for name, site in named.sites.items():
            mean, weight = torch.randn(7, generator=generator), 2 * torch.rand(7, generator=generator)
            sites[name] = replace(site, measured=replace(Measured.about(mean), weight=weight))
        return replace(named, sites=sites)

    return choose


@pytest.fixture
def read(in_process):
    """What the down projections of a MODEL read while it is sampled: by site, [batch, tokens, width] of each call."""
    from flux_poke.nodes.models import flux_layout

    def run(model, **options) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {}
        with ExitStack() as hooks:
            for site in flux_layout(model).sites:

                def note(module, args, site=site):
                    found.setdefault(site.name, []).append(args[0][..., site.down_column :].clone())

                down = model.model.diffusion_model.get_submodule(site.down)
                hooks.enter_context(down.register_forward_pre_hook(note))
            sample(model, **options)
        return found

    return run


@FAMILIES
def test_factor_one_is_bit_identical(load, poked, some, family):
    model = load(family)
    everything = BlockPoke.of(layout_of(model), "all", factor=1.0)
    assert torch.equal(sample(poked(model, Poke(some(model), 1.0), everything), cfg=2.0), sample(model, cfg=2.0))


@FAMILIES
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_poked_model_draws_what_hooks_by_hand_draw(load, poked, some, family, factor: float):
    model = load(family)
    neurons = some(model)
    layout = layout_of(model)
    with ExitStack() as hooks:
        for site in layout.sites:
            chosen = neurons.sites[site.name]

            def hook(module, args, site=site, chosen=chosen):
                h, known = args[0].clone(), chosen.measured
                for index, mean, weight in zip(chosen.indices, known.mean, known.weight, strict=True):
                    turned = 1 + (factor - 1) * weight
                    h[..., site.down_column + index] = mean + turned * (h[..., site.down_column + index] - mean)
                return (h,)

            down = model.model.diffusion_model.get_submodule(site.down)
            hooks.enter_context(down.register_forward_pre_hook(hook))
        expected = sample(model)
    found = sample(poked(model, Poke(neurons, factor)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, sample(model), atol=1e-2)


@FAMILIES
def test_masks_and_noise_levels_and_prompts_are_kept_to_token_by_token(load, poked, some, read, family):
    """Set to 0.7, a neuron is 0.7 where it is poked, and nowhere else."""
    model = load(family)
    neurons, first = some(model), test_watching.sigmas_of(model)[0]
    mask = torch.zeros(4, 4)
    mask[1, 2] = mask[3, 0] = 1
    where = Where((first, 1.0), mask, positive_only=True)
    found = read(poked(model, Poke(neurons, 0.0, about=0.7, where=where)), cfg=3.0)
    words = 512 if family is FLUX2 else WORDS
    for name, calls in found.items():
        poked_tokens = torch.zeros(calls[0].shape[1], dtype=torch.bool)
        if "txt" not in name:
            first_token = words if name.startswith("single") else 0
            poked_tokens[[first_token + 4 * 1 + 2, first_token + 4 * 3]] = True
        assert len(calls) == STEPS
        for step, h in enumerate(calls):
            values = h[..., neurons.sites[name].indices]
            negative, positive = values.chunk(2)  # rows of the negative prompt come first
            assert not (negative == 0.7).any()
            hit = (positive == 0.7).all(-1)
            assert torch.equal(hit, (poked_tokens & (step == 0)).expand_as(hit)), (name, step)


def test_nothing_is_left_in_the_model_by_a_run_or_an_interrupt(load, poked, some):
    model = load(FLUX1)
    sample(model)
    before = traces(model)
    clone = poked(model, Poke(some(model), -1.0), BlockPoke.of(layout_of(model), "single 0"))
    sample(clone)
    assert traces(model) == before

    class Stopped(BaseException):
        """As ComfyUI's interrupt: no Exception."""

    def stop(*_):
        raise Stopped

    hook = model.model.diffusion_model.final_layer.register_forward_pre_hook(stop)  # in the middle of a call
    with pytest.raises(Stopped), hook:
        sample(clone)
    assert traces(model) == before
    with pytest.raises(Stopped):
        sample(clone, callback=stop)
    assert traces(model) == before


@FAMILIES
@pytest.mark.parametrize("recorded_first", [True, False])
def test_recordings_hold_what_was_poked(load, poked, some, record, target, watch, family, recorded_first: bool):
    from flux_poke.nodes.recorders import InternalsRun

    model = load(family)
    neurons = some(model)
    poke, where = Poke(neurons, 0.0, about=0.25), target(model, "poked")

    def watched(one):
        return watch(one, lambda: InternalsRun(where, {}, False, False))

    both = poked(watched(model), poke) if recorded_first else watched(poked(model, poke))
    assert torch.equal(sample(both), sample(poked(model, poke)))
    for name, site in where.recording.internals().sites.items():
        assert (site.mean[neurons.sites[name].indices] - 0.25).abs().max() < 1e-6


def test_what_one_poke_turns_the_next_one_turns_again(load, poked, some, read):
    model = load(FLUX1)
    neurons = some(model)
    found = read(poked(model, Poke(neurons, 0.0, about=0.5), Poke(neurons, 3.0, about=0.0)))
    for name, calls in found.items():
        assert all((h[..., neurons.sites[name].indices] == 1.5).all() for h in calls)


def test_neurons_of_a_pruned_model_are_those_that_were_kept(load, poked, some, read, in_process):
    from flux_poke.nodes import loading
    from flux_poke.nodes.models import MergedWeights
    from flux_poke.nodes.pruned import PRUNED, PrunedModel
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.plan import PruningPlan
    from flux_poke.pruning.surgery import Cut

    model = load(FLUX1)
    dense = Dense.of(dict(MergedWeights(model)))
    neurons = some(model)
    kept = {name: torch.arange(1, 512, 2) for name in ("single-0", "double-img-0")}
    plan = replace(PruningPlan.keeping_all(dense), kept=kept)
    cut = Cut(dense, plan)
    smaller = loading.load_flux(cut, "default", {})
    smaller.set_attachments(PRUNED, PrunedModel(dense.layout, plan, {}, {}, None, cut))
    found = read(poked(smaller, Poke(neurons, 0.0, about=0.7)))
    for name, calls in found.items():
        indices = neurons.sites[name].indices
        left = (indices[indices % 2 == 1] - 1) // 2 if name in kept else indices
        assert 0 < len(left) <= 7
        for h in calls:
            assert torch.equal((h == 0.7).all(0).all(0).nonzero().squeeze(1), left)


def test_pokes_of_a_pruned_model_and_of_the_dense_one_it_was_made_of_go_together(load, poked, some, read, in_process):
    from flux_poke.nodes import loading
    from flux_poke.nodes.models import MergedWeights, model_fingerprint
    from flux_poke.nodes.pruned import PRUNED, PrunedModel
    from flux_poke.poking.neurons import Neurons
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.plan import PruningPlan
    from flux_poke.pruning.surgery import Cut

    model = load(FLUX1)
    dense = Dense.of(dict(MergedWeights(model)))
    plan = replace(PruningPlan.keeping_all(dense), kept={"single-0": torch.arange(256, 512)})
    cut = Cut(dense, plan)
    smaller = loading.load_flux(cut, "default", {})
    smaller.set_attachments(PRUNED, PrunedModel(dense.layout, plan, {}, {}, None, cut))
    of_dense = Neurons.of(dense.layout, dense.fingerprint, {"single-0": torch.tensor([7, 300])}, "of the dense model")
    own = Neurons.of(layout_of(smaller), model_fingerprint(smaller), {"single-0": torch.tensor([5, 100])}, "of the pruned one")
    pokes = Poke(of_dense, 0.0, about=0.7), Poke(own, 0.0, about=0.7)
    for some_pokes, turned in ((pokes, [5, 44, 100]), (pokes[::-1], [5, 44, 100]), (pokes[:1], [44]), (pokes[1:], [5, 100])):
        (h, *_) = read(poked(smaller, *some_pokes))["single-0"]
        assert (h == 0.7).all(0).all(0).nonzero().squeeze(1).tolist() == turned


def test_the_lora_of_a_poke_draws_what_the_node_draws(load, poked, some, in_process):
    import comfy.sd
    from flux_poke.nodes.models import MergedWeights
    from flux_poke.poking.export import lora_of

    model = load(FLUX1)
    poke = Poke(some(model), -1.0)
    lora = lora_of(MergedWeights(model), layout_of(model), [poke])
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    found = sample(with_lora)
    torch.testing.assert_close(found, sample(poked(model, poke)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, sample(model), atol=1e-2)


def test_neurons_of_another_model_are_refused(load, poked, some):
    neurons = some(load(FLUX1))
    with pytest.raises(UserError, match="of another model than the one that is connected"):
        poked(load(FLUX2), Poke(neurons))


def layout_of(model):
    from flux_poke.nodes.models import flux_layout

    return flux_layout(model)


def test_the_shipped_graph_finds_neurons_draws_them_at_every_factor_and_turns_them_down(client, host, workflow):
    """In small: fewer pictures and steps than as it ships."""
    graph = workflow("find_and_poke_tiny")
    for number, name, count in (("4", "poke_threes", 12), ("5", "poke_others", 12), ("6", "poke_others_again", 12)):
        graph[number]["inputs"] |= {"name": name, "number": count, "steps": 6}
    graph["7"]["inputs"]["save_as"] = "poked-threes.safetensors"
    graph["12"]["inputs"] |= {"factors": "-2, 1", "steps": 6}
    graph["15"]["inputs"]["steps"] = 6
    result = client.run(graph)
    found = Neurons.load(host.output / "flux_poke" / "poked-threes.safetensors")
    assert 0 < found.count <= 81
    assert found.compared == "poke_threes against poke_others and poke_others_again"
    assert found.chance is not None
    assert "prompt" in found.workflow
    assert result.texts["7"] == result.texts["13"] == found.totals()
    assert result.texts["12"].startswith("Changes most: factor -2 (")
    assert "factor 1" not in result.texts["12"]  # it changes nothing, to the bit


def test_the_shipped_sweep_leaves_out_every_block_in_turn(client, workflow):
    graph = workflow("which_block_does_what_tiny")
    graph["8"]["inputs"]["steps"] = graph["10"]["inputs"]["steps"] = 4
    assert "Changes most: without " in client.run(graph).texts["8"]
    graph["8"]["inputs"]["factors"] = "a lot"
    with pytest.raises(UserError, match="names no factors"):
        client.run(graph)
