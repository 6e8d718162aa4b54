"""Block predictions against a model whose later blocks are left out, and against the model's own x0."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
import torch
from flux_poke.analysis.taps import BlockTaps, StepChoice, Tap, TapRecorder
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block, blocks_of, choose_blocks
from flux_poke.flux.integrators import euler
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.recording.call import Call


def layout_of(family: str) -> Layout:
    layout = Layout.of("flux1", 128, 2, 3, context=32, vector=32, ratio=2)
    if family == "flux1":
        return layout
    gated = tuple(replace(site, gated=True, biased=False) for site in layout.sites)
    return replace(layout, family="flux2", vector=None, sites=gated)


class Run:
    """A model of random weights, and one sampling run of it with everything tapped."""

    def __init__(self, family: str, batch: int = 2, steps: int = 2):
        torch.manual_seed(0)
        self.layout = layout_of(family)
        self.flux = Flux(self.layout).eval().requires_grad_(False)
        self.context = torch.randn(batch, 5, 32)
        self.vector = torch.randn(batch, 32) if family == "flux1" else None
        patch = self.layout.patch
        self.noise = torch.randn(batch, self.layout.in_channels // patch**2, 4 * patch, 6 * patch)
        self.sigmas = FluxTimer(steps).sigmas()

    def plain(self):
        return euler(lambda x, sigma: self.flux(x, sigma, self.context, self.vector), self.noise, self.sigmas)

    def sample(self, recorder: TapRecorder, taps: BlockTaps, images=None, on_step=None):
        def velocity(x, sigma):
            with recorder.watching(self.flux, Call.at(x, sigma, self.sigmas, images=images), taps):
                return self.flux(x, sigma, self.context, self.vector)

        return euler(velocity, self.noise, self.sigmas, on_step)

    def truncated_velocity(self, block: Block, x, sigma):
        """The model's velocity when it ends after `block`."""
        short = Flux(self.layout).eval().requires_grad_(False)
        short.load_state_dict(self.flux.state_dict())
        doubles = block.index + 1 if block.kind == "double" else self.layout.depth
        singles = block.index + 1 if block.kind == "single" else 0
        short.double_blocks, short.single_blocks = short.double_blocks[:doubles], short.single_blocks[:singles]
        return short(x, sigma, self.context, self.vector)


@pytest.fixture(params=["flux1", "flux2"])
def run(request) -> Run:
    return Run(request.param)


def recorder_of(run: Run, blocks: str = "all", steps: str = "all") -> TapRecorder:
    return TapRecorder(run.layout, choose_blocks(blocks, run.layout), StepChoice.parse(steps))


def test_every_block_predicts_what_the_model_would_if_it_ended_there(run):
    taps, seen = BlockTaps(), []
    run.sample(recorder_of(run), taps, on_step=lambda step, x, v: seen.append((x, v)))
    assert len(taps) == 2 * 5
    for tap in taps:
        x, _ = seen[tap.step]
        sigma = run.sigmas[tap.step].expand(2)
        x0 = x - run.sigmas[tap.step] * run.truncated_velocity(tap.block, x, sigma)
        torch.testing.assert_close(taps.latent(tap), x0, rtol=1e-5, atol=1e-5)


def test_the_last_block_predicts_the_models_own_x0_exactly(run):
    taps, own = BlockTaps(), []
    run.sample(recorder_of(run), taps, on_step=lambda step, x, v: own.append(x - run.sigmas[step] * v))
    for step, x0 in enumerate(own):
        assert torch.equal(taps.latent(Tap(step, Block("single", 2))), x0)


def test_an_euler_step_of_the_last_block_leads_to_the_next_latents(run):
    taps, seen = BlockTaps(), []
    image = run.sample(recorder_of(run), taps, on_step=lambda step, x, v: seen.append(x))
    for step, x in enumerate([*seen[1:], image]):
        torch.testing.assert_close(taps.latent(Tap(step, Block("single", 2)), "euler"), x, rtol=1e-5, atol=1e-5)


def test_the_image_is_bit_identical_with_and_without_taps(run):
    plain = run.plain()
    assert torch.equal(run.sample(recorder_of(run), BlockTaps()), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.flux.modules())


def test_taps_come_by_step_then_double_then_single_blocks_in_numeric_order():
    layout = replace(layout_of("flux1"), depth=12, depth_single=11)
    taps = [Tap(step, block) for step in (9, 10) for block in blocks_of(layout)]
    assert sorted(sorted(taps, key=lambda tap: tap.title)) == taps
    assert [tap.title for tap in taps[8:14]] == [
        *(f"Step 9 · double block {index}" for index in range(8, 12)),
        *(f"Step 9 · single block {index}" for index in range(2)),
    ]


def test_only_the_chosen_rows_are_kept(run):
    both, second = BlockTaps(), BlockTaps()
    run.sample(recorder_of(run), both)
    run.sample(recorder_of(run), second, images=(None, 0))
    for tap in both:
        torch.testing.assert_close(second.latent(tap), both.latent(tap)[1:])
        torch.testing.assert_close(second.change(tap), both.change(tap)[1:])


def test_only_the_chosen_steps_and_blocks_are_tapped(run):
    taps = BlockTaps()
    run.sample(recorder_of(run, "double 1, single 0-1", "0, 5"), taps)
    assert [tap.title for tap in taps] == [
        f"Step {step} · {block}" for step in (0,) for block in ("double block 1", "single block 0", "single block 1")
    ]


def test_change_is_that_of_the_blocks_image_tokens():
    run, taps = Run("flux1"), BlockTaps()
    states = {}

    def keep(module, args, kwargs, output):
        states["before"], states["after"] = kwargs["img"].clone(), output[0].clone()

    run.flux.double_blocks[1].register_forward_hook(keep, with_kwargs=True)
    run.sample(recorder_of(run, "double 1", "1"), taps)
    before, after = states["before"].flatten(1), states["after"].flatten(1)
    expected = (after - before).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(taps.change(Tap(1, Block("double", 1))), expected)


def test_steps_beyond_the_memory_limit_go_to_disk_and_read_the_same(tmp_path):
    run = Run("flux1")
    memory, disk = BlockTaps(), BlockTaps(memory_limit=0, folder=tmp_path)
    run.sample(recorder_of(run), memory)
    run.sample(recorder_of(run), disk)
    assert disk.bytes_in_memory == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    for tap in memory:
        assert torch.equal(memory.latent(tap), disk.latent(tap))
    del disk
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_visited_again_is_replaced():
    run, taps = Run("flux1"), BlockTaps()
    run.sample(recorder_of(run, "single 2", "0"), taps)
    before = taps.latent(Tap(0, Block("single", 2)))
    run.noise = torch.randn_like(run.noise)
    run.sample(recorder_of(run, "single 2", "0"), taps)
    assert len(taps) == 1
    assert not torch.equal(taps.latent(Tap(0, Block("single", 2))), before)


def test_an_interrupted_step_leaves_no_taps_and_no_hooks():
    run, taps = Run("flux1"), BlockTaps()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = run.flux.single_blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.sample(recorder_of(run), taps)
    handle.remove()
    assert len(taps) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.flux.modules())


def test_a_model_that_was_compiled_before_is_tapped_too():
    run, taps, compiled = Run("flux1"), BlockTaps(), BlockTaps()
    run.sample(recorder_of(run), taps)
    run.flux = torch.compile(run.flux, backend="eager")  # type: ignore[assignment]
    plain = run.plain()
    for steps in ("0", "1"):
        assert torch.equal(run.sample(recorder_of(run, steps=steps), compiled), plain)
    assert list(compiled) == list(taps)
    assert all(torch.equal(compiled.latent(tap), taps.latent(tap)) for tap in taps)


def test_sizes_that_are_no_whole_patches_are_cut_as_the_host_cuts_them():
    """A host pads the latents to whole patches and cuts the output back to size."""
    run, taps = Run("flux1"), BlockTaps()
    odd = run.noise[..., :-1, :]
    sigma = torch.ones(2)
    padded = torch.nn.functional.pad(odd, (0, 0, 0, 1))
    with recorder_of(run, "single 2").watching(run.flux, Call.at(odd, sigma, run.sigmas), taps):
        velocity = run.flux(padded, sigma, run.context, run.vector)[..., :-1, :]
    assert torch.equal(taps.latent(Tap(0, Block("single", 2))), odd - velocity)


WRONG = ["", "triple", "double 5", "single 3-1", "double 0-9", "single-", "single0", "5", "2-1", "1,,2", "triple 1", "-", "-1"]


@pytest.mark.parametrize("text", WRONG)
def test_blocks_that_the_model_does_not_have_are_refused(text):
    with pytest.raises(UserError, match=r"Blocks"):
        choose_blocks(text, layout_of("flux1"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("single 1-2, double", ["double-0", "double-1", "single-1", "single-2"]),
        ("0-1, 3", ["double-0", "double-1", "single-1"]),
        ("double 1, single", ["double-1", "single-0", "single-1", "single-2"]),
        ("All", ["double-0", "double-1", "single-0", "single-1", "single-2"]),
    ],
)
def test_blocks_are_chosen_by_kind_and_range_or_by_numbers(text, names):
    assert [block.name for block in choose_blocks(text, layout_of("flux1"))] == names


@pytest.mark.parametrize("blocks", ["all", "single 0", "double 1"])
def test_a_call_that_skips_a_block_is_not_tapped(skipping, blocks):
    run, taps, without = Run("flux1"), BlockTaps(), BlockTaps()
    x, sigma = run.noise, torch.ones(2)
    call = Call.at(x, sigma, run.sigmas)
    recorder = recorder_of(run, blocks)
    with recorder.watching(run.flux, call, without):
        run.flux(x, sigma, run.context, run.vector)
    with recorder.watching(run.flux, call, taps):
        run.flux(x, sigma, run.context, run.vector)
    for index in (0, 1):
        with recorder.watching(run.flux, call, taps), skipping(run.flux, index):
            run.flux(x, sigma, run.context, run.vector)
    assert taps.skipping == 2
    assert list(taps) == list(without)
    assert all(torch.equal(taps.latent(tap), without.latent(tap)) for tap in taps)


def test_taps_of_one_run_stay_as_they_are_while_another_runs(tmp_path):
    run, first, second = Run("flux1"), BlockTaps(memory_limit=0, folder=tmp_path), BlockTaps(memory_limit=0, folder=tmp_path)
    recorder = recorder_of(run, "single 2")
    run.sample(recorder, first)
    before = [first.latent(tap) for tap in first]
    run.noise = torch.randn_like(run.noise)
    run.sample(recorder, second)
    assert all(torch.equal(first.latent(tap), latent) for tap, latent in zip(first, before, strict=True))
    assert not any(torch.equal(second.latent(tap), latent) for tap, latent in zip(second, before, strict=True))


@pytest.mark.parametrize("text", ["0-20000000", "0-999999999", "every 999999999"])
def test_a_range_of_steps_takes_no_memory(text):
    tracemalloc.start()
    chosen = StepChoice.parse(text)
    assert [step for step in (0, 7, 19) if step in chosen] == ([0] if "every" in text else [0, 7, 19])
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["", "every 0", "every", "some", "5-2", "-1", "1" * 5000])
def test_steps_that_are_not_understood_are_refused(text):
    with pytest.raises(UserError, match=r"Steps"):
        StepChoice.parse(text)


def test_steps_are_chosen_by_list_and_stride():
    assert [step for step in range(12) if step in StepChoice.parse("0, 4, 9-20")] == [0, 4, 9, 10, 11]
    assert [step for step in range(12) if step in StepChoice.parse("every 5")] == [0, 5, 10]


def test_a_step_is_told_from_the_noise_level_between_two_levels_too():
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    x = torch.zeros(1, 16, 4, 4)
    assert [Call.at(x, torch.tensor([s]), sigmas).step for s in (1.0, 0.8, 0.6, 0.3, 0.1)] == [0, 0, 1, 2, 2]
