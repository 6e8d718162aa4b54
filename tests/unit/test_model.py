"""flux/model.py: facts that hold for any FLUX. That it equals ComfyUI's own model is held by tests/host."""

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux, apply_rope, rope, run_blocks, timestep_embedding


def test_the_velocity_has_the_shape_of_the_latents(model, inputs):
    given = inputs(model)
    velocity = model(**given)
    assert velocity.shape == given["x"].shape
    assert velocity.isfinite().all()
    assert velocity.std() > 0.01


def test_each_image_of_a_batch_is_computed_on_its_own(model, inputs):
    given = inputs(model, batch=3)
    together = model(**given)
    for number in range(3):
        alone = model(**{name: value[number : number + 1] for name, value in given.items()})
        torch.testing.assert_close(alone, together[number : number + 1], rtol=1e-4, atol=1e-5)


def test_every_input_matters(model, inputs):
    given = inputs(model)
    reference = model(**given)
    for name, value in given.items():
        changed = model(**{**given, name: value * 0.5 + 0.1})
        assert (changed - reference).abs().max() > 1e-3 * reference.abs().max(), name


def test_guidance_and_vector_are_ignored_by_a_model_that_takes_none(tensors, inputs):
    model = Flux.load(tensors("flux2"))
    given = inputs(model)
    assert torch.equal(model(**given), model(**given, vector=torch.ones(2, 24), guidance=torch.tensor([3.5, 2.0])))


def test_guidance_and_vector_are_asked_for_by_a_model_that_takes_them(tensors, inputs):
    model = Flux.load(tensors("flux1", guidance=True))
    given = inputs(model)
    for missing, said in (("vector", "takes pooled text"), ("guidance", "takes distilled guidance")):
        with pytest.raises(UserError, match=said):
            model(**{name: value for name, value in given.items() if name != missing})


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_image_tokens_are_known_by_their_position_and_not_by_their_order(tensors, family):
    model = Flux.load(tensors(family))
    generator = torch.Generator().manual_seed(0)
    words, rows, columns = 3, 4, 5
    img, txt = (torch.randn(2, n, 128, generator=generator) for n in (rows * columns, words))
    vec, order = torch.randn(2, 128, generator=generator), torch.randperm(rows * columns, generator=generator)
    pe = model.positions(words, [(rows, columns)], torch.device("cpu"))
    straight, _ = run_blocks(model, img, txt, vec, pe)
    shuffled, _ = run_blocks(model, img[:, order], txt, vec, torch.cat((pe[:words], pe[words:][order])))
    torch.testing.assert_close(shuffled, straight[:, order], rtol=1e-4, atol=1e-4)
    assert (run_blocks(model, img[:, order], txt, vec, pe)[0] - straight[:, order]).abs().max() > 1e-2


def test_attention_sees_the_distance_of_two_positions_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=generator)

    def product(q_at: int, k_at: int) -> torch.Tensor:
        turns = rope(torch.tensor([float(q_at), float(k_at)]), 32, 10_000)
        return (apply_rope(q, turns[:1]) * apply_rope(k, turns[1:])).sum()

    for distance in (0, 1, 7):
        products = torch.stack([product(at, at + distance) for at in (0, 3, 50)])
        torch.testing.assert_close(products, products[:1].expand(3), rtol=1e-4, atol=1e-4)
    assert abs(product(0, 7) - product(0, 0)) > 0.1


def test_positions_of_flux2_number_the_words_and_those_of_flux1_do_not(tensors):
    for family, same in (("flux1", True), ("flux2", False)):
        pe = Flux.load(tensors(family)).positions(4, [(2, 3)], torch.device("cpu"))
        assert pe.shape == (4 + 6, 64, 2, 2)
        assert torch.equal(pe[0], pe[3]) == same
        assert len({tuple(token.flatten().tolist()) for token in pe[4:]}) == 6, "every image token stands elsewhere"


def test_time_is_embedded_as_cosines_and_sines_of_1000_t():
    t = torch.tensor([0.0, 0.25, 1.0])
    embedded = timestep_embedding(t, 8)
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = 1000 * t.double()[:, None] * frequencies
    expected = torch.cat((angle.cos(), angle.sin()), dim=1)
    torch.testing.assert_close(embedded.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_a_prefix_and_the_other_name_of_the_norms_load_the_same_model(tensors, inputs, family):
    plain = Flux.load(tensors(family))
    renamed = {f"model.diffusion_model.{key.replace('_norm.scale', '_norm.weight')}": t for key, t in tensors(family).items()}
    given = inputs(plain)
    assert torch.equal(Flux.load(renamed | {"vae.encoder.weight": torch.ones(2)})(**given), plain(**given))


def pruned(tensors, layout, kept):
    """The checkpoint with only the neurons `kept[site]` of every MLP, cut out row by row and column by column."""
    cut = dict(tensors)
    for site in layout.sites:
        keep = kept[site.name]
        rows = [*range(site.up_row), *(site.up_row + j for j in keep)]
        if site.gated:
            rows += [site.up_row + site.width + j for j in keep]
        cut[f"{site.up}.weight"] = cut[f"{site.up}.weight"][rows]
        if site.biased:
            cut[f"{site.up}.bias"] = cut[f"{site.up}.bias"][rows]
        columns = [*range(site.down_column), *(site.down_column + j for j in keep)]
        cut[f"{site.down}.weight"] = cut[f"{site.down}.weight"][:, columns]
    return cut


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_pruned_model_runs_and_equals_the_dense_one_with_those_neurons_silenced(model, inputs):
    """Every MLP keeps another number of neurons, one of them none at all."""
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    kept = {}
    for number, site in enumerate(model.layout.sites):
        keep = sorted(torch.randperm(site.width, generator=generator)[: 50 * number].tolist())
        kept[site.name] = keep
        silent = torch.ones(site.width, dtype=torch.bool)
        silent[keep] = False
        dense[f"{site.down}.weight"][:, site.down_column :][:, silent] = 0
    given = inputs(model)
    small = Flux.load(pruned(model.state_dict(), model.layout, kept))
    assert [site.width for site in small.layout.sites] == [len(keep) for keep in kept.values()]
    torch.testing.assert_close(small(**given), Flux.load(dense)(**given), rtol=1e-4, atol=1e-5)


def test_weights_keep_their_precision_unless_another_is_asked_for(tensors, inputs):
    half = {key: tensor.bfloat16() for key, tensor in tensors("flux1").items()}
    assert {p.dtype for p in Flux.load(half).parameters()} == {torch.bfloat16}
    model, full = Flux.load(half, torch.float32), Flux.load(tensors("flux1"))
    given = inputs(full)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    error = (model(**given) - full(**given)).norm() / full(**given).norm()
    assert 0 < error < 0.05
    low = Flux.load(half)(**{name: value.bfloat16() for name, value in given.items()})
    assert low.dtype == torch.bfloat16
    assert (low.float() - full(**given)).norm() / full(**given).norm() < 0.2


def test_missing_tensors_are_counted_and_the_first_is_named(tensors):
    lacking = {key: t for key, t in tensors("flux1").items() if not key.startswith(("time_in", "single_blocks.1.norm"))}
    with pytest.raises(UserError, match=r"tiny lacks 6 tensors of a FLUX.1 model, first single_blocks.1.norm.key_norm.scale"):
        Flux.load(lacking, source="tiny")


@pytest.mark.parametrize("beside", ["scale_weight", "weight_scale", "comfy_quant"])
def test_numbers_that_want_a_scale_are_not_run_without_it(tensors, beside):
    quantised = tensors("flux1") | {f"double_blocks.1.img_mlp.0.{beside}": torch.ones(1)}
    with pytest.raises(UserError, match=r"tiny has double_blocks.1.img_mlp.0.weight quantised"):
        Flux.load(quantised, source="tiny")


def test_chroma_is_left_to_the_host(tensors):
    with pytest.raises(UserError, match="load Chroma in ComfyUI"):
        Flux.load(tensors("chroma"))


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_reference_pictures_change_what_is_drawn(tensors, inputs, family):
    model = Flux.load(tensors(family))
    given = inputs(model)
    reference = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(3))
    plain, referred = model(**given), model(**given, references=[reference])
    assert referred.shape == plain.shape
    assert (referred - plain).abs().max() > 1e-3
