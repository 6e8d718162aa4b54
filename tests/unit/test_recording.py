"""recording/neurons.py against activations computed by hand, without hooks, block by block."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from flux_poke.flux.model import Flux, attention, modulate, timestep_embedding
from flux_poke.recording.call import Call, TokenMask
from flux_poke.recording.neurons import InternalsRecorder
from torch import Tensor
from torch.nn import functional as F


def activate(up: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """An MLP's activation, and the number whose sign tells whether it fires."""
    if not gated:
        h = F.gelu(up, approximate="tanh")
        return h, h
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value, gate


def by_hand(model: Any, x, sigma, context, vector=None, guidance=None) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation and sign of every MLP [batch, tokens, width], with the model's projections and none of its forwards.

    The velocity is kept under "velocity", to show that this is the computation which the model does.
    """
    layout = model.layout
    found: dict[str, tuple[Tensor, Tensor]] = {}
    gated, p, (height, width) = layout.family == "flux2", layout.patch, x.shape[-2:]
    patches = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    img, txt = model.img_in(patches), model.txt_in(context)
    vec = model.time_in(timestep_embedding(sigma, 256))
    if guidance is not None:
        vec = vec + model.guidance_in(timestep_embedding(guidance, 256))
    if vector is not None:
        vec = vec + model.vector_in(vector)
    words = txt.shape[1]
    pe = model.positions(words, [(height // p, width // p)], x.device)
    for index, block in enumerate(model.double_blocks):
        streams = {"txt": txt, "img": img}
        mods = {
            stream: (getattr(model, f"double_stream_modulation_{stream}") if gated else getattr(block, f"{stream}_mod"))(vec)
            for stream in streams
        }
        parts = [getattr(block, f"{stream}_attn")(modulate(tokens, mods[stream][0])) for stream, tokens in streams.items()]
        q, k, v = (torch.cat(pair, dim=-2) for pair in zip(*parts, strict=True))
        out = attention(q, k, v, pe)
        for stream, attended in (("txt", out[:, :words]), ("img", out[:, words:])):
            before, after = mods[stream]
            tokens = streams[stream] + before.gate * getattr(block, f"{stream}_attn").proj(attended)
            up, _, down = getattr(block, f"{stream}_mlp")
            h, sign = activate(up(modulate(tokens, after)), gated)
            found[f"double-{stream}-{index}"] = h, sign
            streams[stream] = tokens + after.gate * down(h)
        txt, img = streams["txt"], streams["img"]
    tokens = torch.cat((txt, img), dim=1)
    for index, block in enumerate(model.single_blocks):
        (mod,) = (model.single_stream_modulation if gated else block.modulation)(vec)
        qkv, up = block.linear1(modulate(tokens, mod)).split(
            [3 * layout.hidden, block.linear1.out_features - 3 * layout.hidden], -1
        )
        q, k, v = (part.unflatten(-1, (layout.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        h, sign = activate(up, gated)
        found[f"single-{index}"] = h, sign
        q, k = block.norm(q, k, v)
        tokens = tokens + mod.gate * block.linear2(torch.cat((attention(q, k, v, pe), h), dim=-1))
    out = model.final_layer(tokens[:, words:], vec).unflatten(1, (height // p, -1)).unflatten(3, (-1, p, p))
    found["velocity"] = out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), out
    return found


def check(recorder: InternalsRecorder, expected: Mapping[str, Sequence[Tensor]], keep: Mapping[str, Tensor] | None = None):
    """Counts are equal, sums within the rounding of float32; `keep` [batch, tokens] by stream."""
    results = recorder.results()
    assert results.keys() == expected.keys() - {"velocity"} == {site.name for site in recorder.sites}
    for site in recorder.sites:
        h, sign = (tensor.flatten(0, 1) for tensor in expected[site.name])
        if keep is not None:
            rows = keep[site.stream].flatten()
            h, sign = h[rows], sign[rows]
        found = results[site.name]
        assert found.tokens == len(h)
        assert torch.equal(found.fires, (sign > 0).sum(0))
        torch.testing.assert_close(found.sum, h.double().sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.sum_sq, h.double().square().sum(0), rtol=1e-4, atol=1e-4)


def call_of(given, mask=None) -> Call:
    return Call.at(given["x"], given["sigma"], (1.0, 0.0), mask=mask)


def hooks(model):
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def test_counts_equal_those_computed_by_hand(model, inputs):
    given = inputs(model)
    expected = by_hand(model, **given)
    torch.testing.assert_close(expected["velocity"][0], model(**given), rtol=1e-5, atol=1e-5)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given)):
        model(**given)
    check(recorder, expected)


def test_counting_asks_no_device_for_the_noise_level(model, inputs):
    given = inputs(model)
    recorder = InternalsRecorder(model.layout.sites)
    unread = Call.at(given["x"], torch.empty(len(given["x"]), device="meta"), (1.0, 0.0))
    with pytest.raises(RuntimeError):
        _ = unread.step
    with recorder.watching(model, unread):
        model(**given)
    check(recorder, by_hand(model, **given))


def test_counts_add_up_over_two_calls(model, inputs):
    first, second = inputs(model), inputs(model, batch=3, words=9, seed=8)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(first)):
        model(**first)
    with recorder.watching(model, call_of(second)):
        model(**second)
    parts = by_hand(model, **first), by_hand(model, **second)
    joined = {}
    for name, (h, sign) in parts[0].items():
        h2, sign2 = parts[1][name]
        joined[name] = tuple(torch.cat((x.flatten(0, 1), y.flatten(0, 1)))[None] for x, y in ((h, h2), (sign, sign2)))
    check(recorder, joined)
    assert recorder.results()["double-txt-0"].tokens == 2 * 5 + 3 * 9


@pytest.mark.parametrize("masked", ["img", "txt", "img txt"])
def test_tokens_outside_the_mask_do_not_count(model, inputs, masked):
    given = inputs(model, batch=2, words=5)
    generator = torch.Generator().manual_seed(2)
    all_of = {"txt": torch.ones(2, 5, dtype=torch.bool), "img": torch.ones(2, 24, dtype=torch.bool)}
    keep = {s: torch.rand(t.shape, generator=generator) < 0.5 if s in masked else t for s, t in all_of.items()}
    keep["single"] = torch.cat((keep["txt"], keep["img"]), dim=1)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given, TokenMask(**{stream: keep[stream] for stream in masked.split()}))):
        model(**given)
    check(recorder, by_hand(model, **given), keep)


def test_an_empty_mask_counts_everything(model, inputs):
    given = inputs(model)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given)):
        model(**given)
    check(recorder, by_hand(model, **given))


def test_the_output_is_bit_identical_and_the_model_untouched(model, inputs):
    given = inputs(model)
    before = model(**given)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given)):
        assert hooks(model)
        during = model(**given)
    assert torch.equal(before, during)
    assert torch.equal(before, model(**given))
    assert hooks(model) == []
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("stop", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_no_hook_is_left_after_an_exception_in_the_middle_of_a_call(model, inputs, stop):
    given = inputs(model)
    before = model(**given)

    def fail(*_):
        raise stop

    failing = model.single_blocks[0].register_forward_hook(fail)
    recorder = InternalsRecorder(model.layout.sites)
    with pytest.raises(type(stop)), recorder.watching(model, call_of(given)):
        model(**given)
    failing.remove()
    assert hooks(model) == []
    assert torch.equal(before, model(**given))


def test_no_hook_is_left_where_the_model_lacks_a_site(tensors, inputs):
    large, small = Flux.load(tensors("flux2", depth_single=3)), Flux.load(tensors("flux2"))
    recorder = InternalsRecorder(large.layout.sites)
    with pytest.raises(AttributeError), recorder.watching(small, call_of(inputs(small))):
        pass
    assert hooks(small) == []


def test_nothing_is_recorded_outside_of_the_with(model, inputs):
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(inputs(model))):
        pass
    model(**inputs(model))
    assert recorder.results() == {}


def test_only_the_sites_that_were_asked_for_are_recorded(model, inputs):
    given = inputs(model)
    recorder = InternalsRecorder([model.layout.site("double-txt-1"), model.layout.site("single-0")])
    with recorder.watching(model, call_of(given)):
        model(**given)
    expected = by_hand(model, **given)
    check(recorder, {name: expected[name] for name in ("double-txt-1", "single-0")})


def test_recordings_of_one_mlp_add_up(model, inputs):
    recorders = [InternalsRecorder(model.layout.sites) for _ in range(3)]
    for seed, recorder in enumerate(recorders[:2]):
        given = inputs(model, seed=seed)
        with recorder.watching(model, call_of(given)), recorders[2].watching(model, call_of(given)):
            model(**given)
    a, b, both = (recorder.results()["single-1"] for recorder in recorders)
    total = a + b
    assert torch.equal(total.fires, both.fires)
    assert total.tokens == both.tokens == a.tokens + b.tokens
    torch.testing.assert_close(total.sum_sq, both.sum_sq)


def test_a_call_that_skips_a_block_does_not_count_and_is_said_to_be_left_out(model, inputs, skipping):
    given = inputs(model)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given)):
        model(**given)
    with recorder.watching(model, call_of(given)), skipping(model, 1):
        model(**given)
    check(recorder, by_hand(model, **given))
    assert recorder.calls == 1
    assert recorder.note.startswith("1 model call that skips blocks")


def test_a_call_that_was_interrupted_does_not_count(model, inputs):
    given = inputs(model)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given)):
        model(**given)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.single_blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), recorder.watching(model, call_of(given)):
        model(**given)
    handle.remove()
    check(recorder, by_hand(model, **given))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_run_whose_activations_are_not_finite_is_left_out_with_the_count(model, inputs, wrong):
    given = inputs(model)
    recorder = InternalsRecorder(model.layout.sites)
    with recorder.watching(model, call_of(given)):
        model(**given)
    given["context"] = torch.full_like(given["context"], wrong)
    with recorder.watching(model, call_of(given)):
        model(**given)
    assert recorder.results() == {}
    assert re.search(r"The activations of \d of 6 MLPs are not finite \(first double-\w+-\d: \d+ neurons\)", recorder.note)


def test_a_mask_holds_for_calls_without_the_reference_tokens_at_the_end():
    img, txt = torch.tensor([[True, True, False, False]]), torch.tensor([[False, True]])
    mask = TokenMask(img, txt)

    def rows(stream: str, tokens: int) -> list[bool]:
        found = mask.rows(stream, 1, tokens)
        assert found is not None
        return found.tolist()

    assert rows("single", 6) == [False, True, True, True, False, False]
    assert rows("single", 4) == [False, True, True, True]
    assert rows("img", 2) == [True, True]
