"""Neurons, directions and blocks turned while a FLUX runs: what is changed is what was asked for, and nothing else."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from flux_poke.analysis.sheets import labelled_grid
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.flux.layout import Family
from flux_poke.flux.model import Flux
from flux_poke.poking.comparing import record_prompts
from flux_poke.poking.find import Search, find
from flux_poke.poking.learn import learn
from flux_poke.poking.neurons import Measured, Neurons, SiteDirections, SiteNeurons
from flux_poke.poking.poke import BlockPoke, Moment, Poke, Stream, Where, poked, poking, read_poke
from flux_poke.poking.sweep import factors_of, sweep
from flux_poke.poking.tune import HELD_OUT, Exam, Extent, tune
from flux_poke.pruning.dense import Dense
from flux_poke.recording.call import Call
from flux_poke.recording.neurons import InternalsRecorder
from flux_poke.tiny.model import SHIPPED, TinyFlux
from PIL import Image
from torch import Tensor

FAMILIES: tuple[Family, ...] = ("flux1", "flux2")


class Given:
    """A tiny FLUX, one call of it, and a few neurons of every MLP that are turned about means of their own."""

    def __init__(self, family: Family):
        self.tiny = TinyFlux.load(family=family)
        self.flux, self.layout = self.tiny.flux, self.tiny.flux.layout
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(2, *self.tiny.latent_shape, generator=generator)
        self.args = x, torch.tensor([0.8, 0.3]), *self.tiny.words(["three", "a 7"])
        sites = {
            site.name: SiteNeurons(
                torch.randperm(site.width, generator=generator)[:9].sort().values,
                Measured.about(torch.randn(9, generator=generator) / 10),
            )
            for site in self.layout.sites
        }
        self.fingerprint = Fingerprint.of_tensors(self.flux.state_dict())
        widths = {site.name: site.width for site in self.layout.sites}
        self.neurons = Neurons(self.layout.family, self.fingerprint, widths, sites, "by the test")

    @torch.no_grad()
    def velocity(self, *pokes: Poke | BlockPoke) -> Tensor:
        with poked(self.flux, pokes):
            return self.flux(*self.args)

    @torch.no_grad()
    def inputs(self, *pokes: Poke | BlockPoke) -> dict[str, Tensor]:
        """What each down projection reads while the model is poked."""
        seen: dict[str, Tensor] = {}
        with poked(self.flux, pokes), ExitStack() as hooks:
            for site in self.layout.sites:

                def note(module, args, site=site):
                    seen[site.name] = args[0][..., site.down_column :].clone()

                hooks.enter_context(self.flux.get_submodule(site.down).register_forward_pre_hook(note))
            # poked's own hooks come later, and before these
            self.flux(*self.args)
        return seen

    def weighed(self) -> Neurons:
        """The same neurons, each turned as far as a weight of its own says."""
        generator = torch.Generator().manual_seed(6)
        sites = {
            name: replace(site, measured=replace(site.measured, weight=torch.rand(9, generator=generator) * 4 - 1))
            for name, site in self.neurons.sites.items()
        }
        return replace(self.neurons, sites=sites)

    @torch.no_grad()
    def by_hand(self, factor: float, neurons: Neurons) -> Tensor:
        """The same as a poke of all tokens: one hook for each MLP, written out."""
        with ExitStack() as hooks:
            for site in self.layout.sites:
                chosen = neurons.sites[site.name]

                def hook(module, args, site=site, chosen=chosen):
                    h = args[0].clone()
                    for place, index in enumerate(chosen.indices.tolist()):
                        mean, own = chosen.measured.mean[place], 1 + (factor - 1) * chosen.measured.weight[place]
                        h[:, :, site.down_column + index] = mean + own * (h[:, :, site.down_column + index] - mean)
                    return (h,)

                hooks.enter_context(self.flux.get_submodule(site.down).register_forward_pre_hook(hook))
            return self.flux(*self.args)

    def part(self, *names: str) -> Neurons:
        return replace(self.neurons, sites={name: self.neurons.sites[name] for name in names})


@pytest.fixture(scope="module", params=FAMILIES)
def given(request) -> Given:
    return Given(request.param)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_factor_one_changes_nothing_to_the_bit(given: Given):
    everything = BlockPoke.of(given.layout, "all", factor=1.0)
    assert torch.equal(given.velocity(Poke(given.neurons, 1.0), Poke(given.weighed(), 1.0), everything), given.velocity())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in given.flux.modules())


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_neurons_become_what_the_formula_says(given: Given, factor: float):
    for neurons in (given.neurons, given.weighed()):
        found = given.velocity(Poke(neurons, factor))
        same(found, given.by_hand(factor, neurons))
        assert (found - given.velocity()).abs().max() > 1e-3


def test_neurons_are_cut_or_set_to_a_value(given: Given):
    for value, neurons in ((0.0, given.neurons), (0.7, given.neurons), (0.7, given.weighed())):
        seen = given.inputs(Poke(neurons, 0.0, about=value))
        for name, chosen in neurons.sites.items():
            assert (seen[name][..., chosen.indices] == value).all()


def test_a_poke_is_for_its_noise_levels_alone(given: Given):
    for neurons in (given.neurons, given.weighed()):
        as_it_was, everywhere = given.inputs(), given.inputs(Poke(neurons, -1.0))
        low = given.inputs(Poke(neurons, -1.0, where=Where(sigmas=(0.0, 0.3))))
        for name in as_it_was:
            assert torch.equal(low[name][0], as_it_was[name][0])  # sigma 0.8
            assert torch.equal(low[name][1], everywhere[name][1])  # sigma 0.3


def test_a_mask_is_for_tokens_of_the_image_alone(given: Given):
    """Of the first MLP that has image tokens; what comes later attends to what was changed."""
    rows, columns = (side // given.layout.patch for side in given.args[0].shape[-2:])
    mask = torch.zeros(rows, columns)
    mask[1, 2] = 1
    where = Where(mask=mask.repeat_interleave(16, 0).repeat_interleave(16, 1))
    as_it_was = given.inputs()
    for name, words in (("double-img-0", 0), ("single-0", given.args[2].shape[1])):
        chosen = replace(given.weighed(), sites={name: given.weighed().sites[name]})
        everywhere, found = given.inputs(Poke(chosen, 0.0)), given.inputs(Poke(chosen, 0.0, where=where))
        token = words + columns + 2
        others = torch.arange(found[name].shape[1]) != token
        assert torch.equal(found[name][:, others], as_it_was[name][:, others])
        assert torch.equal(found[name][:, token], everywhere[name][:, token])
        assert not torch.equal(found[name][:, token], as_it_was[name][:, token])
    assert torch.equal(given.velocity(Poke(given.part("double-txt-0"), 0.0, where=where)), given.velocity())


def test_the_negative_prompts_rows_are_left_alone_where_asked(given: Given):
    seen: dict[str, Tensor] = {}

    def note(module, args):
        seen["h"] = args[0].clone()

    site = given.layout.site("double-img-0")
    down = given.flux.get_submodule(site.down)
    found = []
    x, sigma, context, *_ = given.args
    for negative in ((), (False, True)):
        moment = Moment.at(given.layout, x, sigma, context, negative)
        poke = Poke(given.part(site.name), 0.0, where=Where(positive_only=True))
        with torch.no_grad(), down.register_forward_pre_hook(note), poking(given.flux, given.layout, [poke], moment):
            given.flux(*given.args)
        found.append(seen["h"])
    as_it_was = given.inputs()[site.name]
    assert torch.equal(found[1][0], found[0][0])
    assert torch.equal(found[1][1], as_it_was[1])
    assert not torch.equal(found[0][1], as_it_was[1])


def test_directions_along_axes_are_neurons(given: Given):
    directions = {}
    for name, chosen in given.neurons.sites.items():
        vectors = torch.zeros(9, given.neurons.widths[name])
        vectors[torch.arange(9), chosen.indices] = 2.0
        mixed = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1))).Q
        directions[name] = SiteDirections(mixed @ vectors, Measured.about(mixed @ chosen.measured.mean))
    along = replace(given.neurons, sites={}, directions=directions)
    same(given.velocity(Poke(along, -1.0)), given.velocity(Poke(given.neurons, -1.0)))
    assert torch.equal(given.velocity(Poke(along, 1.0)), given.velocity())


def test_recordings_hold_what_was_poked(given: Given):
    recorder = InternalsRecorder(given.layout.sites)
    x, sigma, context, vector = given.args
    call = Call.at(x, sigma, [1.0, 0.0], 0)
    moment = Moment.at(given.layout, x, sigma, context)
    poke = Poke(given.neurons, 0.0, about=0.25)
    # whichever stands first
    with torch.no_grad(), recorder.watching(given.flux, call), poking(given.flux, given.layout, [poke], moment):
        given.flux(x, sigma, context, vector)
    for name, site in recorder.results().items():
        assert (site.mean[given.neurons.sites[name].indices] - 0.25).abs().max() < 1e-6


def test_an_error_leaves_no_hooks(given: Given):
    hook = given.flux.final_layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), hook, poked(given.flux, [Poke(given.neurons, 0.0)]):
        given.flux(*given.args)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in given.flux.modules())


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_skipped_block_is_as_if_it_were_not_there(given: Given):
    """The blocks are taken out of a copy of the model."""
    layout = given.layout
    smaller = Flux.load(dict(given.flux.state_dict()))
    smaller.double_blocks = smaller.double_blocks[:1]
    smaller.single_blocks = torch.nn.ModuleList(block for n, block in enumerate(smaller.single_blocks) if n != 2)
    with torch.no_grad():
        expected = smaller(*given.args)
    same(given.velocity(BlockPoke.of(layout, "double 1, single 2")), expected)


@pytest.mark.parametrize("block", ["double 1", "single 2"])
def test_a_blocks_attention_and_mlp_are_scaled_apart(given: Given, block: str):
    """Each half of what a block adds, times the factor: what differs adds up."""
    index = {"double 1": 1, "single 2": 4}[block]
    x, states = {}, {}

    def after(module, args, kwargs, output):
        states["out"] = output

    module = [*given.flux.double_blocks, *given.flux.single_blocks][index]
    for part in ("none", "attention", "mlp", "both"):
        pokes = [] if part == "none" else [BlockPoke.of(given.layout, block, part, factor=0.5)]  # type: ignore[arg-type]
        with module.register_forward_hook(after, with_kwargs=True):
            given.velocity(*pokes)
        x[part] = states["out"][0] if block == "double 1" else states["out"]
    assert (x["attention"] - x["none"]).abs().max() > 1e-3
    assert (x["mlp"] - x["none"]).abs().max() > 1e-3
    if block == "single 2" and given.layout.family == "flux2":  # without a bias, both are the two together
        same(x["both"], x["attention"] + x["mlp"] - x["none"])


def test_a_stream_of_a_block_is_scaled_alone(given: Given):
    as_it_was = given.inputs()
    text, image = (given.inputs(BlockPoke.of(given.layout, "single 0", stream=stream)) for stream in ("txt", "img"))
    words = given.args[2].shape[1]
    assert torch.equal(as_it_was["single-0"], text["single-0"])
    # block 1 attends to both, so what its own tokens begin with is looked at: without attention
    quiet = [BlockPoke.of(given.layout, "single 1", "attention")]
    before = given.inputs(*quiet)["single-1"]
    streams: dict[Stream, slice] = {"txt": slice(words, None), "img": slice(0, words)}
    for stream, kept in streams.items():
        found = given.inputs(*quiet, BlockPoke.of(given.layout, "single 0", stream=stream))["single-1"]
        assert torch.equal(found[:, kept], before[:, kept])
        assert not torch.equal(found, before)
    assert not torch.equal(text["single-1"], image["single-1"])


def test_what_cannot_be_poked_is_told(given: Given):
    with pytest.raises(UserError, match="Noise levels go from 0 to 1"):
        Where(sigmas=(0.7, 0.2))
    with pytest.raises(UserError, match="A mask is a picture"):
        Where(mask=torch.full((2, 2), float("nan")))
    other = Given("flux2" if given.layout.family == "flux1" else "flux1")
    with pytest.raises(UserError, match="neurons are of another model"), poked(given.flux, [Poke(other.neurons)]):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_digit_is_erased_by_what_is_found_and_tuned(family: Family):
    """A few prompts and steps: the pull of a "3" goes, other prompts keep theirs, and neither is looked at to find out."""
    tiny = TinyFlux.load(family=family)
    dense = Dense.open(SHIPPED[family] / "flux.safetensors")
    with_it, without = ["three", "a 3"], ["one", "7", "a five", "8"]
    own = record_prompts(tiny, dense.fingerprint, with_it, 1, 0, steps=4)
    others = record_prompts(tiny, dense.fingerprint, without, 1, 50, steps=4)
    exam = Exam.of(tiny, with_it, without)
    found = tune(
        exam, lambda spare: find(dense.tensors, dense.layout, own, others, Search(share=0.02, spare=spare, chance=False))
    )
    assert found.factor is not None
    assert found.count <= 0.02 * found.total
    assert exam.pull([]) == pytest.approx(1.0, abs=1e-5)
    assert exam.change([]) == 0.0
    poke = [Poke(found, found.factor)]
    assert exam.pull(poke) < 0.5
    assert exam.change(poke) < 0.05
    # its own numbers again, from velocities: drawings of seed 700,000 with the prompts in turns
    at = exam.concept[0]
    with torch.no_grad(), poked(tiny.flux, poke):
        velocity = tiny.flux(at.x, at.sigma, *tiny.words([with_it[n % 2] for n in range(len(at.x))]))
    assert torch.equal(at.x, tiny.noise(len(at.x), 700_000))
    pull = at.dense - exam.neutral[0]
    left = [float(((a - b) * c).sum() / c.square().sum()) for a, b, c in zip(velocity, exam.neutral[0], pull, strict=True)]
    assert sum(left) / len(left) < 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_a_digit_is_erased_by_what_is_learned(family: Family, monkeypatch):
    """In few steps: the pull of a "3" goes in drawings that nothing was learned on, others stay, with as few as asked."""
    monkeypatch.setattr("flux_poke.poking.learn.STEPS", 40)
    tiny = TinyFlux.load(family=family)
    dense = Dense.open(SHIPPED[family] / "flux.safetensors")
    with_it, without = ["three", "a 3"], ["one", "7", "a five", "8"]
    own = record_prompts(tiny, dense.fingerprint, with_it, 1, 0, steps=4)
    others = record_prompts(tiny, dense.fingerprint, without, 1, 50, steps=4)
    known = find(dense.tensors, dense.layout, own, others, Search(share=1.0, spare=0.0, chance=False))
    exam = Exam.of(tiny, with_it, without, extent=Extent(4, 8, 3, (0.0, 0.3)))
    told: list[tuple[float, float]] = []
    found = learn(exam, known, 50, lambda _, done, total: told.append((done, total)))
    assert told == [(step, 140) for step in range(140)]
    assert found.count == 50
    assert found.own_factor == 0.0
    assert all(site.measured.weight.min() >= -2 and site.measured.weight.max() <= 8 for site in found.sites.values())
    assert not any(parameter.grad is not None for parameter in tiny.flux.parameters())
    held_out = Exam.of(tiny, with_it, without, seed=HELD_OUT)
    assert held_out.pull([Poke(found, 0.0)]) < 0.3
    assert held_out.change([Poke(found, 0.0)]) < 0.02
    again = learn(exam, known, 50)
    assert all(torch.equal(site.measured.weight, again.sites[name].measured.weight) for name, site in found.sites.items())
    with pytest.raises(UserError, match="There are no neurons to learn with"):
        learn(exam, replace(known, sites={}), 50)


def test_the_choice_ends_where_no_neuron_is_left_and_fails_where_none_was_found():
    tiny = TinyFlux.load()
    exam = Exam.of(tiny, ["three"], ["one", "a 7"], extent=Extent(2, 2, 2, (0.0,)))
    layout, tried = tiny.flux.layout, []
    some = Neurons.of(layout, Dense.of(tiny.flux.state_dict()).fingerprint, {"double-txt-0": torch.arange(9)}, "nine")

    def search(spare: float, most: float) -> Neurons:
        tried.append(spare)
        if spare > most:
            raise UserError("none is left")
        return some

    assert tune(exam, lambda spare: search(spare, 3.0)).count == 9
    assert tried == [2.0, 3.0, 5.0]
    with pytest.raises(UserError, match="none is left"):
        tune(exam, lambda spare: search(spare, 1.0))


@pytest.mark.parametrize(
    ("with_it", "without"), [(["three"], ["Three"]), (["a cat"], ["a dog"]), (["a 3", "three"], ["three"])]
)
def test_prompts_that_draw_the_same_are_told_of(with_it, without):
    with pytest.raises(UserError, match=f"With '{with_it[-1]}' this model draws what it does with the prompts without"):
        Exam.of(TinyFlux.load(), with_it, without)


def test_what_is_left_out_of_a_comparison_is_told_of():
    tiny = TinyFlux.load()
    fingerprint = Dense.of(tiny.flux.state_dict()).fingerprint
    with pytest.raises(UserError, match=r"None of the 4 steps is at a noise level from 0\.8 to 0\.81"):
        record_prompts(tiny, fingerprint, ["three"], 1, 0, steps=4, sigmas=(0.8, 0.81))
    with torch.no_grad():
        tiny.flux.get_parameter(f"{tiny.flux.layout.site('double-img-0').up}.weight").mul_(1e30)
    with pytest.raises(UserError, match=r"'three': .*finite"):
        record_prompts(tiny, fingerprint, ["three"], 1, 0, steps=4)


def test_noise_levels_are_recorded_alone_where_asked():
    tiny = TinyFlux.load()
    dense = Dense.open(SHIPPED["flux1"] / "flux.safetensors")
    whole, high = (
        record_prompts(tiny, dense.fingerprint, ["three"], 2, 0, steps=4, sigmas=sigmas)[0]
        for sigmas in ((0.0, 1.0), (0.5, 1.0))
    )
    assert (whole.steps, high.steps) == (4, 3)  # 1, 0.75 and 0.5
    assert high.sites["single-0"].tokens * 4 == whole.sites["single-0"].tokens * 3
    with pytest.raises(UserError, match="at least one of each"):
        Exam.of(tiny, ["three"], [])


def test_a_sweep_names_every_factor_or_every_block(given: Given):
    layout = given.layout
    assert [label for label, _ in sweep(layout, factors_of("-1, 0.5 2,2"), given.neurons)] == [
        "factor -1", "factor 0.5", "factor 2",
    ]  # fmt: skip
    blocks = sweep(layout, (0.0, 2.0), blocks="double 1, single 0", part="mlp")
    assert [label for label, _ in blocks] == [
        "without double-1 mlp", "2 x double-1 mlp", "without single-0 mlp", "2 x single-0 mlp",
    ]  # fmt: skip
    assert len(sweep(layout, (0.0,))) == layout.depth + layout.depth_single
    for text in ("", "a lot", "nan", "1e9"):
        with pytest.raises(UserError, match="names no factors"):
            factors_of(text)
    with pytest.raises(UserError, match="at most 400"):
        sweep(layout, tuple(n / 10 for n in range(100)))


def test_a_poke_is_read_with_its_factor_or_with_the_files_own(given: Given, tmp_path):
    path = tmp_path / "n.safetensors"
    given.neurons.save(path)
    assert [read_poke(text).factor for text in (f"{path}", f"{path}:0", f"{path}:2.5")] == [-1.0, 0.0, 2.5]
    replace(given.neurons, factor=-2.5).save(path)
    assert read_poke(f"{path}").factor == -2.5
    for text in (f"{path}:101", f"{path}:nan", f"{path}:x", f"{path}:"):
        with pytest.raises(UserError, match="from -100 to 100"):
            read_poke(text)
    with pytest.raises(UserError, match="There are no neurons"):
        read_poke("nothing:1")


def test_pictures_of_a_sweep_stand_side_by_side_with_their_labels():
    cells = [(f"factor {n}", "" if n == 1 else "PSNR 12.0 dB", Image.new("RGB", (64, 32), (n * 40, 0, 0))) for n in range(5)]
    grid = labelled_grid(cells, "five", side=96)
    found = {color for _, color in grid.getcolors(1 << 20)}  # type: ignore[union-attr]
    assert {(n * 40, 0, 0) for n in range(5)} <= found
    assert grid.width < 600
