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
def target(in_process, tmp_path):
    """Where `model` is recorded to."""
    from flux_poke.nodes.models import flux_layout, model_fingerprint
    from flux_poke.nodes.recorders import Recorded
    from flux_poke.recording.recording import Recording

    return lambda model, name="recording": Recorded(Recording.at(tmp_path / name), flux_layout(model), model_fingerprint(model))


@pytest.fixture
def watch(in_process):
    """`model` watched by what `start` returns."""
    from flux_poke.nodes.watching import Watch, sampling_clone

    return lambda model, *starts: sampling_clone(model, Watch(None, lambda: [start() for start in starts]))


@pytest.fixture
def record(target, watch):
    """Samples `model`, recording it: the internals, or None where the run did not end well."""
    from flux_poke.nodes.recorders import InternalsRun

    def run(model, ignore_padding=True, positive_only=False, name="internals", **options):
        where = target(model, name)
        watched = watch(model, lambda: InternalsRun(where, {}, ignore_padding, positive_only))
        return sample(watched, **options), where.recording.internals() if where.recording.internals_file.exists() else None

    return run


@pytest.fixture
def rows(target):
    """A recorder of `model`'s rows, and what starts a run of it."""
    from flux_poke.nodes.recorders import RowsRun
    from flux_poke.recording.rows import RowChoice, RowRecorder
    from flux_poke.recording.store import Limit

    def make(model, probe_steps=0, name="recording"):
        where = target(model, name)
        recorder = RowRecorder(where.layout.sites, where.store(), RowChoice(4, STEPS), Limit(1.0))
        return recorder, lambda: RowsRun(recorder, where.layout, probe_steps, None)

    return make


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
def tap(watch):
    """`model` with every block tapped, and where its runs go."""
    from flux_poke.analysis.taps import BlockTaps, StepChoice, TapRecorder
    from flux_poke.flux.blocks import choose_blocks
    from flux_poke.nodes.models import flux_layout
    from flux_poke.nodes.taps import TappedModel, TappingRun

    def watched(model, steps="all"):
        layout = flux_layout(model)
        recorder = TapRecorder(layout, choose_blocks("all", layout), StepChoice.parse(steps))
        tapped, denoise = TappedModel(), model.get_model_object("model_sampling").calculate_denoised
        return watch(model, lambda: TappingRun(recorder, BlockTaps(denoise), layout, tapped)), tapped

    return watched


def test_the_prompt_is_found_below_a_guider_and_past_what_conditioning_goes_through(in_process):
    from flux_poke.nodes.graph import prompt_below

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
        assert prompt_below(graph, asked) == "a fox"
    assert prompt_below(graph, "sample") == ""


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
def test_what_a_probe_asks_of_the_model_is_not_counted(load, record, target, watch, rows, rows_first: bool):
    from flux_poke.nodes.recorders import InternalsRun

    model = load(FLUX1)
    drawn, alone = record(model, name="alone")
    where, (recorder, start) = target(model), rows(model, probe_steps=2)
    starts = [lambda: InternalsRun(where, {}), start]
    watched = model
    for one in reversed(starts) if rows_first else starts:
        watched = watch(watched, one)
    assert torch.equal(sample(watched), drawn)
    store = recorder.store
    assert alone.sites.keys() <= store.amplification.keys()
    assert {store.count(name) for name in alone.sites} == {4 * STEPS * 2}
    for name, site in where.recording.internals().sites.items():
        assert site.tokens == alone.sites[name].tokens
        assert torch.equal(site.fires, alone.sites[name].fires)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_samplers_that_call_more_often_are_probed_once_a_step(load, watch, rows, sampler):
    from flux_poke.recording.amplification import probed_steps

    model = load(FLUX1)
    recorder, start = rows(model, probe_steps=2)
    sample(watch(model, start), sampler=sampler)
    for levels in recorder.store.manifest.amplification.values():
        assert [times for _, times in levels.values()] == [1] * len(probed_steps(STEPS, 2))


@pytest.fixture
def guided(in_process):
    """`model` with guidance that calls it once more in every step, by a node of ComfyUI's own."""
    import comfy_extras.nodes_pag
    import comfy_extras.nodes_slg

    def make(model, kind: str):
        if kind == "PAG":
            return comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0).result[0]
        node = comfy_extras.nodes_slg.SkipLayerGuidanceDiT
        return node.execute(model, 3.0, 0.0, 1.0, double_layers="0", single_layers="0").result[0]

    return make


@pytest.mark.parametrize("first", ["guidance first", "recorded first"])
@pytest.mark.parametrize("kind", ["skip layers", "PAG"])
def test_passes_of_guidance_are_left_out_of_everything_that_is_recorded(load, guided, target, watch, tap, rows, kind, first):
    """What is recorded is of the steps that the sampler makes, whatever guidance makes of them."""
    from flux_poke.flux.blocks import choose_blocks
    from flux_poke.nodes.recorders import InternalsRun, StoreRun
    from flux_poke.recording.block_states import BlockStates
    from flux_poke.recording.lens_rows import LensRecorder, LensRows
    from flux_poke.recording.rows import RowChoice
    from flux_poke.recording.states import StateChoice, StateRecorder, indices_around

    def recorded(name: str, kind: str | None):
        model = load(FLUX1)
        where = target(model, name)
        store = where.store()
        _, start_rows = rows(model, name=name)
        lens = LensRecorder(where.layout, store, RowChoice(4, STEPS))
        indices = indices_around(choose_blocks("all", where.layout), where.layout)
        states = [
            StateRecorder("blocks", store, StateChoice(STEPS), indices=indices),
            StateRecorder("trajectories", store, StateChoice(STEPS)),
        ]
        start = [lambda: InternalsRun(where, {}), start_rows, *(lambda one=one: StoreRun(one) for one in (lens, *states))]
        if kind and first == "guidance first":
            model = guided(model, kind)
        watched, tapped = tap(watch(model, *start))
        drawn = sample(guided(watched, kind) if kind and first == "recorded first" else watched, cfg=2.0)
        return drawn, where.recording, tapped.runs[None].taps

    drawn, plain, taps = recorded("plain", None)
    guided_drawn, found, guided_taps = recorded("guided", kind)
    if kind == "skip layers":
        assert not torch.equal(drawn, guided_drawn), "guidance does something"
    assert found.internals().steps == plain.internals().steps
    for name, site in plain.internals().sites.items():
        assert found.internals().sites[name].tokens == site.tokens
        assert found.states().count(name) == plain.states().count(name) > 0
    assert len(BlockStates.open(found.states_folder)) == len(BlockStates.open(plain.states_folder)) == 2 * STEPS
    shards = [shard for shard in found.states().manifest.shards if shard.kind == "trajectories"]
    assert [sum(len(shard.captures) for shard in shards)] == [2 * STEPS]
    assert len(LensRows(found.states_folder).images) == len(LensRows(plain.states_folder).images) == 4 * 2 * STEPS
    assert list(guided_taps) == list(taps)


def test_a_model_without_some_of_its_blocks_is_drawn_with_and_not_recorded(load, target, watch, tap, rows):
    from flux_poke.nodes.recorders import InternalsRun, StoreRun
    from flux_poke.recording.lens_rows import LensRecorder
    from flux_poke.recording.rows import RowChoice

    model = load(FLUX1)
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
    expected, where = sample(model), target(model)
    lens = LensRecorder(where.layout, where.store(), RowChoice(4, STEPS))
    watched, tapped = tap(watch(model, lambda: InternalsRun(where, {}), rows(model)[1], lambda: StoreRun(lens)))
    assert torch.equal(sample(watched), expected)
    assert not where.recording.kinds & {"internals", "rows", "lens"}
    assert len(tapped.runs[None].taps) == 0
    assert tapped.runs[None].taps.skipping == STEPS


def test_a_compiled_model_is_recorded_uncompiled_and_says_so(load, watch, target, monkeypatch):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from flux_poke.nodes import host
    from flux_poke.nodes.recorders import InternalsRun
    from flux_poke.nodes.watching import UNCOMPILED

    said: list[str] = []
    monkeypatch.setattr(host, "say", lambda node_id, text: said.append(text))
    model = load(FLUX1)
    where = target(model)
    compiled = watch(model, lambda: InternalsRun(where, {}))
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": None})
    sample(compiled)
    (text,) = said
    assert text.splitlines() == [f"{where.recording.folder}: 1 run, 3 model calls", UNCOMPILED]
    said.clear()
    sample(watch(model, lambda: InternalsRun(where, {})))
    assert said == [f"{where.recording.folder}: 2 runs, 6 model calls"]


def test_what_two_nodes_record_to_one_recording_is_kept_apart_by_kind(load, target, in_process):
    from flux_poke.errors import UserError
    from flux_poke.nodes.recorders import InternalsRun
    from flux_poke.nodes.watching import Watch, sampling_clone

    model = load(FLUX1)
    where, other = target(model), target(model, "other")

    def watch(model, where, kind):
        records = frozenset([(where.recording.folder, kind)])
        return sampling_clone(model, Watch(None, lambda: [InternalsRun(where, {})], records))

    once = watch(model, where, "internals")
    watch(watch(once, where, "rows"), other, "internals")
    with pytest.raises(UserError, match="every run would count twice"):
        watch(once, where, "internals")


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
    drawn = sample(watched, cfg=cfg, references=references)
    taps = tapped.runs[None].taps
    last = max(entry.block for entry in taps)
    assert (last.name, taps.steps, len(taps), taps.images) == ("single-1", (0, 1, 2), 9, 2)
    for step, expected in enumerate(own):
        assert torch.equal(taps.latent(Tap(step, last)), expected)
    assert not torch.equal(taps.latent(Tap(0, min(entry.block for entry in taps))), own[0])
    assert torch.equal(drawn, sample(model, cfg=cfg, references=references))
    assert tapped.runs[None].seed == 0
    assert tapped.runs[None].timesteps == pytest.approx(sigmas_of(model))


def sigmas_of(model) -> list[float]:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS).tolist()


def test_taps_leave_no_trace_and_a_run_that_fails_leaves_no_predictions(load, tap):
    model = load(FLUX2)
    sample(model)
    before = traces(model)
    watched, tapped = tap(model, steps="0, 2")
    sample(watched, sampler="heun")
    assert tapped.runs[None].taps.steps == (0, 2)
    assert traces(model) == before

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(watched, callback=stop)
    assert not tapped.runs
    assert traces(model) == before


def test_guidance_and_noise_levels_are_those_of_the_latest_run(load, tap):
    watched, tapped = tap(load(FLUX1))
    for guidance, sampler in ((2.25, "euler"), (3.5, "heun")):
        sample(watched, guidance=guidance, sampler=sampler)
        (run,) = tapped.runs.values()
        assert (run.guidance, run.layout.guidance) == (guidance, True)
        assert len(run.timesteps) == STEPS + 1
        assert [run.taps.sigma(step) for step in range(STEPS)] == list(run.timesteps[:-1])


def test_a_lora_does_not_make_it_another_model(load, in_process):
    import comfy.model_management
    from flux_poke.nodes.models import model_fingerprint

    model = load(FLUX1)
    before = model_fingerprint(model)
    patched = model.clone()
    patched.add_patches(
        {key: (torch.randn_like(w),) for key, w in model.model.state_dict().items() if key.endswith("mlp.0.weight")}
    )
    comfy.model_management.load_models_gpu([patched])
    changed = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    assert not torch.equal(changed, torch.zeros_like(changed))
    assert model_fingerprint(model) == model_fingerprint(patched) == before
    comfy.model_management.unload_all_models()
