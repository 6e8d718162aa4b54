"""Watching a model inside ComfyUI, as a library: which tokens count, and that nothing is left behind in the model."""

from __future__ import annotations

import copy

import pytest
import torch

FLUX1 = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "axes_dim": [16, 56, 56], "theta": 10_000, "patch_size": 2,
    "qkv_bias": True, "mlp_ratio": 4.0, "txt_ids_dims": [], "guidance_embed": True,
}  # fmt: skip
FLUX2 = {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [32] * 4, "theta": 2_000, "patch_size": 1,
    "qkv_bias": False, "mlp_ratio": 3.0, "txt_ids_dims": [3], "guidance_embed": False, "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False,
}  # fmt: skip
WORDS, STEPS = 5, 3


@pytest.fixture
def load(in_process):
    """A MODEL of random weights, through ComfyUI's own loader."""
    import comfy.ldm.flux.model
    import comfy.ops
    import comfy.sd

    def build(family: dict):
        sizes = {"context_in_dim": 64, "hidden_size": 128, "num_heads": 1, "depth": 1, "depth_single_blocks": 2}
        shapes = comfy.ldm.flux.model.Flux(
            dtype=torch.float32, operations=comfy.ops.manual_cast, **sizes, **family
        ).state_dict()
        generator = torch.Generator().manual_seed(0)
        weights = {
            key: torch.randn(tensor.shape, generator=generator) * 0.08 + (1 if "norm" in key else 0)
            for key, tensor in shapes.items()
        }
        return comfy.sd.load_diffusion_model_state_dict(weights)

    return build


@pytest.fixture
def record(in_process, tmp_path):
    """Samples `model`, recording it: the internals, or None where the run did not end well."""
    from flux_poke.nodes import watching
    from flux_poke.nodes.record import InternalsRun
    from flux_poke.recording.internals import Internals

    def run(model, ignore_padding=True, positive_only=False, name="internals", **options):
        path = tmp_path / f"{name}.safetensors"
        layout, fingerprint = watching.flux_layout(model), watching.model_fingerprint(model)
        watched = watching.sampling_clone(
            model, lambda: InternalsRun(path, layout, fingerprint, ignore_padding, positive_only, None, {})
        )
        return sample(watched, **options), Internals.load(path) if path.exists() else None

    return run


def sample(
    model, cfg: float = 1.0, sampler: str = "euler", references: bool = False, callback=None, **condition
) -> torch.Tensor:
    import comfy.sample

    channels = model.model.diffusion_model.params.in_channels
    side = 4 if channels == 128 else 8  # 16 image tokens either way
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, WORDS, 64, generator=generator)
    extra = {"pooled_output": torch.randn(1, 64, generator=generator), **condition}
    if references:
        extra["reference_latents"] = [torch.randn(1, channels, side, side, generator=generator)]
    noise = torch.randn(2, channels, side, side, generator=generator)
    return comfy.sample.sample(
        model, noise, STEPS, cfg, sampler, "simple", [[context, extra]], [[-context, dict(extra)]], torch.zeros_like(noise),
        seed=0, callback=callback, disable_pbar=True,
    )  # fmt: skip


@pytest.fixture
def tap(in_process):
    """`model` with every block tapped, and where its predictions go."""
    from flux_poke.analysis.taps import BlockTaps, StepChoice, TapRecorder
    from flux_poke.flux.blocks import choose_blocks
    from flux_poke.nodes import watching
    from flux_poke.nodes.see import TappedRun, TappingRun

    def watched(model, steps="all"):
        layout = watching.flux_layout(model)
        recorder = TapRecorder(layout, choose_blocks("all", layout), StepChoice.parse(steps))
        tapped = TappedRun(BlockTaps(model.get_model_object("model_sampling").calculate_denoised), layout)
        return watching.sampling_clone(model, lambda: TappingRun(recorder, tapped, None)), tapped

    return watched


def test_the_prompt_is_found_below_a_guider_and_past_what_conditioning_goes_through(in_process):
    from flux_poke.nodes import host

    def node(**inputs):
        return {"inputs": inputs}

    graph = {
        "loader": node(unet_name="flux1-dev.safetensors"), "clip": node(clip_name="t5xxl.safetensors"),
        "record": node(model=["loader", 0], folder="hidden_states"), "rows": node(model=["record", 0], folder="rows"),
        "no": node(clip=["clip", 0], text="blurred"), "yes": node(clip=["clip", 0], t5xxl="a fox", clip_l="fox"),
        "strength": node(conditioning=["yes", 0], guidance=3.5),
        "one": node(model=["rows", 0], conditioning=["strength", 0]),
        "two": node(model=["record", 0], negative=["no", 0], positive=["strength", 0]),
        "sample": node(guider=["one", 0]),
    }  # fmt: skip
    for asked in ("record", "rows"):
        assert host.prompt_below(graph, asked) == "a fox"
    assert host.prompt_below(graph, "sample") == ""


def tokens(internals) -> dict[str, int]:
    return {name: site.tokens // (2 * STEPS) for name, site in internals.sites.items()}


def test_padding_and_reference_tokens_are_left_out_of_flux2(load, record):
    model = load(FLUX2)
    _, some = record(model, references=True, name="some")
    _, every = record(model, references=True, name="every", ignore_padding=False)
    assert tokens(some) == {"double-img-0": 16, "double-txt-0": WORDS, "single-0": 16 + WORDS, "single-1": 16 + WORDS}
    assert tokens(every) == {"double-img-0": 32, "double-txt-0": 512, "single-0": 544, "single-1": 544}
    for name, site in some.sites.items():
        assert 0 < int(site.fires.sum()) < int(every.sites[name].fires.sum())


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=["flux1", "flux2"])
def test_the_positive_rows_alone_count_as_a_run_without_guidance_begins(load, record, family):
    model = load(family)
    _, both = record(model, cfg=3.0, name="both")
    _, positive = record(model, cfg=3.0, positive_only=True, name="positive")
    assert {name: 2 * count for name, count in tokens(positive).items()} == tokens(both)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=["flux1", "flux2"])
def test_what_is_drawn_is_bit_identical(load, record, family, sampler):
    model = load(family)
    plain = sample(model, sampler=sampler, cfg=2.0)
    recorded, _ = record(model, sampler=sampler, cfg=2.0)
    assert torch.equal(plain, recorded)
    assert plain.std() > 0.1


@pytest.mark.parametrize("rows_first", [False, True], ids=["internals first", "rows first"])
def test_what_a_probe_asks_of_the_model_is_not_counted(load, record, tmp_path, rows_first: bool):
    from flux_poke.nodes import watching
    from flux_poke.nodes.hidden_states import RowsRun
    from flux_poke.nodes.record import InternalsRun
    from flux_poke.recording.internals import Internals
    from flux_poke.recording.rows import RowChoice, RowRecorder
    from flux_poke.recording.store import HiddenStates, Limit

    model = load(FLUX1)
    drawn, alone = record(model, name="alone")
    layout, fingerprint, path = watching.flux_layout(model), watching.model_fingerprint(model), tmp_path / "both.safetensors"
    store = HiddenStates.for_model(tmp_path / "rows", layout.family, fingerprint)
    recorder = RowRecorder(layout.sites, store, RowChoice(4, STEPS), Limit(1.0))
    starts = [
        lambda: InternalsRun(path, layout, fingerprint, True, False, None, {}),
        lambda: RowsRun(recorder, layout, 2, None),
    ]
    watched = model
    for start in reversed(starts) if rows_first else starts:
        watched = watching.sampling_clone(watched, start)
    assert torch.equal(sample(watched), drawn)
    assert store.amplification.keys() == alone.sites.keys()
    assert {store.count(name) for name in alone.sites} == {4 * STEPS * 2}
    for name, site in Internals.load(path).sites.items():
        assert site.tokens == alone.sites[name].tokens
        assert torch.equal(site.fires, alone.sites[name].fires)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_samplers_that_call_more_often_are_probed_once_a_step(load, tmp_path, sampler):
    from flux_poke.nodes import watching
    from flux_poke.nodes.hidden_states import RowsRun
    from flux_poke.recording.rows import RowChoice, RowRecorder
    from flux_poke.recording.store import HiddenStates, Limit

    model = load(FLUX1)
    layout, fingerprint = watching.flux_layout(model), watching.model_fingerprint(model)
    store = HiddenStates.for_model(tmp_path / "rows", layout.family, fingerprint)
    recorder = RowRecorder(layout.sites, store, RowChoice(4, STEPS), Limit(1.0))
    sample(watching.sampling_clone(model, lambda: RowsRun(recorder, layout, 2, None)), sampler=sampler)
    for levels in store.manifest.amplification.values():
        assert [times for _, times in levels.values()] == [1, 1]


def traces(model) -> list:
    """Everything a hook, a patch or a wrapper could have left in the model."""
    found = [copy.copy(model.model_options["transformer_options"]), list(model.wrappers), list(model.object_patches)]
    for name, module in model.model.named_modules():
        found.append((name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks)))
    return found


def test_the_model_is_untouched_after_a_run_and_after_a_failure(load, record):
    model = load(FLUX1)
    sample(model)
    before = traces(model)
    record(model)
    assert traces(model) == before

    class Stopped(BaseException):
        """As ComfyUI's interrupt: no Exception."""

    def stop(*_):
        raise Stopped

    with pytest.raises(Stopped):
        record(model, callback=stop, name="stopped")
    assert traces(model) == before


@pytest.mark.parametrize("references", [False, True], ids=["", "references"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=["flux1", "flux2"])
def test_the_last_blocks_prediction_is_the_models_own_to_the_bit(load, tap, family, cfg, references):
    from flux_poke.analysis.taps import Tap

    model, own = load(family), []

    def keep(result):
        own.append(result["cond_denoised"].clone())
        return result["denoised"]

    asked = model.clone()
    asked.set_model_sampler_post_cfg_function(keep)
    watched, tapped = tap(asked)
    drawn, taps = sample(watched, cfg=cfg, references=references), tapped.taps
    last = max(entry.block for entry in taps)
    assert (last.name, taps.steps, len(taps), taps.images) == ("single-1", (0, 1, 2), 9, 2)
    for step, expected in enumerate(own):
        assert torch.equal(taps.latent(Tap(step, last)), expected)
    assert not torch.equal(taps.latent(Tap(0, min(entry.block for entry in taps))), own[0])
    assert torch.equal(drawn, sample(model, cfg=cfg, references=references))
    assert tapped.seed == 0
    assert tapped.timesteps == pytest.approx(sigmas_of(model))


def sigmas_of(model) -> list[float]:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS).tolist()


def test_taps_leave_no_trace_and_a_run_that_fails_leaves_no_predictions(load, tap):
    model = load(FLUX2)
    sample(model)
    before = traces(model)
    watched, tapped = tap(model, steps="0, 2")
    sample(watched, sampler="heun")
    assert tapped.taps.steps == (0, 2)
    assert traces(model) == before

    def stop(*_):
        assert len(tapped.taps) == 3  # those of the step that has just ended, and none of the run before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(watched, callback=stop)
    assert len(tapped.taps) == 0
    assert traces(model) == before


def test_guidance_and_noise_levels_are_those_of_the_latest_run(load, tap):
    watched, tapped = tap(load(FLUX1))
    for guidance, sampler in ((2.25, "euler"), (3.5, "heun")):
        sample(watched, guidance=guidance, sampler=sampler)
        assert (tapped.guidance, tapped.layout.guidance) == (guidance, True)
        assert len(tapped.timesteps) == STEPS + 1
        assert [tapped.taps.sigma(step) for step in range(STEPS)] == list(tapped.timesteps[:-1])


def test_a_lora_does_not_make_it_another_model(load, in_process):
    import comfy.model_management
    from flux_poke.nodes import watching

    model = load(FLUX1)
    before = watching.model_fingerprint(model)
    patched = model.clone()
    patched.add_patches(
        {key: (torch.randn_like(w),) for key, w in model.model.state_dict().items() if key.endswith("mlp.0.weight")}
    )
    comfy.model_management.load_models_gpu([patched])
    changed = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    assert not torch.equal(changed, torch.zeros_like(changed))
    assert watching.model_fingerprint(model) == watching.model_fingerprint(patched) == before
    comfy.model_management.unload_all_models()
