"""Low-rank modulation: the best layer of a rank for what these layers read, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from flux_poke.flux.layout import Layout, Site
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.flux.vectors import GUIDANCES, SIGMAS, VECTOR, modulation_inputs
from flux_poke.pruning.low_rank import Vectors, low_rank, rank_errors
from flux_poke.recording.amplification import AmplificationProbe
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import relative_error, trajectory, velocity_error
from flux_poke.tiny.model import FOLDER, STEPS, TinyFlux
from flux_poke.tiny.words import digit_prompts


@pytest.fixture(scope="module")
def tiny() -> TinyFlux:
    return TinyFlux.load()


def pooled(tiny: TinyFlux, digits: range) -> torch.Tensor:
    return tiny.words([prompt for digit in digits for prompt in digit_prompts(digit)[:8]])[1]


def of_rank(tiny: TinyFlux, vectors: Vectors, rank: int, sites: Sequence[Site] = ()) -> Flux:
    """The tiny FLUX with the modulation layers of `sites` (default: all) of one rank."""
    tensors = dict(tiny.flux.state_dict())
    for site in sites or tiny.flux.layout.sites:
        weight, bias = (tensors.pop(f"{site.modulation}.{part}") for part in ("weight", "bias"))
        layer = low_rank(weight, bias, vectors, rank)
        new = {"up.weight": layer.up, "down.weight": layer.down, "bias": layer.bias}
        tensors |= {f"{site.modulation}.{part}": tensor for part, tensor in new.items()}
    return Flux.load(tensors)


def test_vectors_are_what_the_modulation_layers_read_while_it_draws(tiny):
    heard = []
    lin = tiny.flux.get_submodule(tiny.flux.layout.sites[0].modulation)
    handle = lin.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    tiny.sample(["three", "a 7"], tiny.noise(2, 0))
    handle.remove()
    sigmas = FluxTimer(STEPS).sigmas()[:-1].tolist()
    found = [s for _, s in modulation_inputs(tiny.flux, tiny.flux.layout, tiny.words(["three", "a 7"])[1], sigmas)]
    torch.testing.assert_close(torch.stack(found), torch.stack(heard))


def test_moments_are_those_of_all_vectors_at_once(tiny):
    texts = pooled(tiny, range(3))
    s = torch.cat([s for _, s in modulation_inputs(tiny.flux, tiny.flux.layout, texts)]).double()
    weights = torch.tensor(SIGMAS).repeat_interleave(len(texts))
    vectors = Vectors.sample(tiny.flux.state_dict(), tiny.flux.layout, texts, importance=lambda sigma: sigma)
    torch.testing.assert_close(vectors.mean, (weights.double()[:, None] * s).sum(0) / weights.sum())
    covariance = torch.cov(s.T, correction=0, aweights=weights.double())
    torch.testing.assert_close(vectors.spread @ vectors.spread.T, covariance, rtol=1e-6, atol=1e-8)


def test_vectors_of_several_noise_levels_are_mixed_by_their_weights(tiny):
    texts, sigmas, weights = pooled(tiny, range(3)), [0.1, 0.4, 0.9], [3.0, 0.5, 1.0]
    parts = [Vectors.sample(tiny.flux.state_dict(), tiny.flux.layout, texts, None, "cpu", [sigma]) for sigma in sigmas]
    mixed = Vectors.mixed(parts, weights)
    s = torch.cat([s for _, s in modulation_inputs(tiny.flux, tiny.flux.layout, texts, sigmas)]).double()
    weight = torch.tensor(weights).double().repeat_interleave(len(texts))
    torch.testing.assert_close(mixed.mean, (weight[:, None] * s).sum(0) / weight.sum())
    covariance = torch.cov(s.T, correction=0, aweights=weight)
    torch.testing.assert_close(mixed.spread @ mixed.spread.T, covariance, rtol=1e-6, atol=1e-8)


def test_errors_by_rank_are_those_of_the_layers_on_the_vectors_themselves(tiny):
    fit, others = (Vectors.sample(tiny.flux.state_dict(), tiny.flux.layout, pooled(tiny, d)) for d in (range(7), range(7, 10)))
    lin = tiny.flux.get_submodule("double_blocks.1.img_mod.lin")
    errors = rank_errors(lin.weight, fit, others)
    s = torch.cat([s for _, s in modulation_inputs(tiny.flux, tiny.flux.layout, pooled(tiny, range(7, 10)))])
    for rank in (0, 1, 5, 20):
        layer = low_rank(lin.weight, lin.bias, fit, rank)
        lost = lin(s) - (s @ layer.down.T @ layer.up.T + layer.bias)
        assert lost.square().sum(1).mean().item() == pytest.approx(errors[rank].item(), rel=1e-3)


def test_no_layer_of_that_rank_is_nearer_than_the_one_found(tiny):
    vectors = Vectors.sample(tiny.flux.state_dict(), tiny.flux.layout, pooled(tiny, range(10)))
    lin = tiny.flux.get_submodule("single_blocks.2.modulation.lin")
    singular = torch.linalg.svdvals(lin.weight.double() @ vectors.spread)  # Eckart & Young 1936
    expected = singular.square().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(rank_errors(lin.weight, vectors, vectors)[:30], expected[:30], rtol=1e-4, atol=0)


def test_rank_8_costs_next_to_nothing_also_for_digits_that_were_not_sampled(tiny):
    vectors = Vectors.sample(tiny.flux.state_dict(), tiny.flux.layout, pooled(tiny, range(5)))
    prompts = [prompt for digit in range(5, 10) for prompt in digit_prompts(digit)[8:12]]
    points, _ = trajectory(tiny.flux, tiny.noise(20, 5), FluxTimer(STEPS).sigmas(), *tiny.words(prompts))
    assert velocity_error(of_rank(tiny, vectors, 8), points) < 0.0008


def test_a_plain_svd_is_a_hundred_times_worse(tiny):
    texts = pooled(tiny, range(10))
    vectors = Vectors.sample(tiny.flux.state_dict(), tiny.flux.layout, texts)
    white = replace(vectors, mean=torch.zeros(128).double(), spread=torch.eye(128).double())
    points, _ = trajectory(tiny.flux, tiny.noise(8, 5), FluxTimer(STEPS).sigmas(), *tiny.words(["three"] * 8))
    assert velocity_error(of_rank(tiny, white, 8), points) > 100 * velocity_error(of_rank(tiny, vectors, 8), points)


def test_guidance_is_sampled_over_all_that_people_use():
    layout = Layout.of("flux1", 256, 1, 1, context=64, vector=32, guidance=True)
    model = Flux(layout)
    pooled = torch.randn(3, 32)
    found = dict(modulation_inputs(model, layout, pooled))
    assert len(found) == len(SIGMAS)
    assert (min(GUIDANCES), max(GUIDANCES)) == (1, 10)
    heard = []
    model.get_submodule(layout.sites[2].modulation).register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    x, context = torch.randn(3, 16, 4, 4), torch.randn(3, 2, 64)
    with torch.no_grad():
        model(x, torch.full((3,), SIGMAS[4]), context, pooled, torch.full((3,), GUIDANCES[2]))
    torch.testing.assert_close(found[SIGMAS[4]].view(len(GUIDANCES), 3, 256)[2], heard[0])


def test_amplification_of_a_modulation_layer_tells_what_truncating_it_does_to_the_velocity(tiny):
    """At two ranks that were not probed, summed over noise levels; within the factor of 2 that a budget promises."""
    layout, prompts = tiny.flux.layout, [prompt for digit in range(10) for prompt in digit_prompts(digit)[:2]]
    context, texts = tiny.words(prompts)
    points, _ = trajectory(tiny.flux, tiny.noise(20, 3), FluxTimer(STEPS).sigmas(), context, texts)
    probe = AmplificationProbe(layout, known=[site.name for site in layout.sites])
    assert probe.calls == 1 + 8
    for point in points:
        probe.measure(tiny.flux, point.sigma[0].item(), partial(point.run, tiny.flux))
    vectors = Vectors.sample(tiny.flux.state_dict(), layout, texts)
    for site in (layout.site("double-img-1"), layout.site("double-txt-0"), layout.site("single-3")):
        measured = probe.results()[f"{site.name}.modulation"]
        for rank in (2, 6):
            changed = of_rank(tiny, vectors, rank, [site])
            lin = tiny.flux.get_submodule(site.modulation)
            layer = low_rank(lin.weight, lin.bias, vectors, rank)
            predicted, moved = 0.0, 0.0
            for point in points:
                sigma = point.sigma[0].item()
                ((_, s),) = modulation_inputs(tiny.flux, layout, texts, [sigma])
                lost = lin(s) - (s @ layer.down.T @ layer.up.T + layer.bias)
                total, count = measured[sigma]
                predicted += total / count * lost.square().sum(1).mean().item()
                moved += relative_error(point.velocity, point.run(changed))
            assert 0.5 < predicted / moved < 2


def test_pooled_texts_are_recorded_with_the_rows(tiny, tmp_path):
    recording, prompts = Recording.at(tmp_path / "r"), ["three", "a 7", "zero"]
    checkpoint = FOLDER / "flux.safetensors"
    record(checkpoint, prompts, recording, Wanted(internals=False, rows=RowChoice(rows=4, steps=2)), seed=5, steps=4, batch=2)
    store = recording.states()
    (rows,) = store.rows(VECTOR)
    assert store.images(VECTOR).tolist() == [0, 1, 2]
    assert len(rows) == 6
    expected = tiny.words(prompts)[1][rows.image]
    torch.testing.assert_close(rows.x.float(), expected, rtol=2**-8, atol=0)
    assert {f"{site.name}.modulation" for site in tiny.flux.layout.sites} <= store.amplification.keys()
