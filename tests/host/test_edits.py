"""Edits of reference pictures on ComfyUI: which tokens count, recorded trajectories, and training on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.recording import Recording
from flux_poke.recording.trajectories import Trajectories, velocity_error
from flux_poke.retrain.distill import distill_layers
from flux_poke.retrain.options import Options
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from small_family import MEMBERS, TEXT

WORDS, STEPS, IMAGES = 9, 2, 6
#: Two reference pictures, of other sizes than the image (32 tokens).
SIDES = ((4, 4), (2, 6))


@dataclass(frozen=True)
class Edited:
    """A model's file, and what was recorded of edits that it drew."""

    path: Path
    recording: Recording
    dense: Dense

    @property
    def points(self) -> list:
        samples = Trajectories.open(self.recording.states())
        return [samples.batch(group) for group in samples.groups]


@pytest.fixture
def edited(in_process, tmp_path) -> Callable[..., Edited]:
    """Draws edits with a small FLUX of random weights, recorded by all that records."""
    import comfy.sample
    import comfy.sd
    from flux_poke.nodes.models import flux_layout, model_fingerprint
    from flux_poke.nodes.recorders import InternalsRun, Recorded, RowsRun, StoreRun
    from flux_poke.nodes.watching import Watch, sampling_clone
    from flux_poke.recording.rows import RowChoice, RowRecorder
    from flux_poke.recording.states import StateChoice, StateRecorder

    def draw(name: str, cache: bool = False, with_rows: bool = True, **told) -> Edited:
        (member,) = (member for member in MEMBERS if member.name == name)
        path = tmp_path / "dense.safetensors"
        member.save(path)
        model = comfy.sd.load_diffusion_model(str(path))
        if cache:
            from comfy_extras.nodes_flux import FluxKVCache

            model = FluxKVCache.execute(model).result[0]
        where = Recorded(Recording.at(tmp_path / "edits"), flux_layout(model), model_fingerprint(model))
        trajectories = StateRecorder("trajectories", where.store(), StateChoice(STEPS, dtype=torch.float32))
        rows = RowRecorder(where.layout.sites, where.store(), RowChoice(8, STEPS))

        def start() -> list:
            sampled = [RowsRun(rows, where.layout, 0, None)] if with_rows else []
            return [InternalsRun(where, {}), *sampled, StoreRun(trajectories)]

        watched = sampling_clone(model, Watch(None, start))
        patch, channels = where.layout.patch, model.get_model_object("latent_format").latent_channels
        generator = torch.Generator().manual_seed(0)

        def latents(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(1, channels, rows * patch, columns * patch, generator=generator)

        for seed in range(IMAGES):
            told = {"pooled_output": torch.randn(1, TEXT, generator=generator), **told}
            told["reference_latents"] = [latents(*side) for side in SIDES]
            text = [[torch.randn(1, WORDS, TEXT, generator=generator), told]]
            noise = latents(4, 8)
            comfy.sample.sample(
                watched, noise, STEPS, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), seed=seed, disable_pbar=True
            )
        return Edited(path, where.recording, Dense.open(path))

    return draw


@pytest.mark.parametrize("name", ["FLUX.2 klein 4B", "FLUX.1 Kontext"])
def test_recorded_velocities_of_edits_are_those_of_the_reference_transformer(edited, name: str):
    found = edited(name)
    flux = Flux.load(found.dense.tensors)
    assert sum(len(point.x) for point in found.points) == IMAGES * STEPS
    for point in found.points:
        assert [tuple(picture.shape[-2:]) for picture in point.references] == [
            (rows * found.dense.layout.patch, columns * found.dense.layout.patch) for rows, columns in SIDES
        ]
        expected = point.run(flux)
        assert (point.velocity - expected).abs().max() < 1e-4 * expected.abs().max()
        without = replace(point, references=()).run(flux)
        assert (point.velocity - without).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", ["FLUX.2 klein 4B", "FLUX.1 Kontext"])
@torch.no_grad()
def test_what_counts_of_an_edit_is_counted_by_hand_on_image_and_words_alone(edited, name: str):
    found = edited(name)
    layout, flux = found.dense.layout, Flux.load(found.dense.tensors)
    fires = {site.name: torch.zeros(site.width, dtype=torch.int64) for site in layout.sites}

    def count(site, padding: int):
        def hook(module, inputs):
            gates = inputs[0][..., : site.width]
            tokens = {"img": gates[:, :32], "txt": gates[:, padding:], "single": gates[:, padding : padding + WORDS + 32]}
            fires[site.name] += (tokens[site.stream] > 0).sum((0, 1))

        return hook

    def slice_off(site, padding: int):
        return lambda module, inputs: count(site, padding)(module, (inputs[0][..., site.down_column :],))

    padding = 512 - WORDS if layout.family == "flux2" else 0
    for site in layout.sites:
        if site.gated:
            flux.get_submodule(site.act).register_forward_pre_hook(count(site, padding))
        else:  # the activation is above 0 where the neuron fires
            flux.get_submodule(site.down).register_forward_pre_hook(slice_off(site, padding))
    for point in found.points:
        assert point.context.shape[1] == padding + WORDS
        point.run(flux)
    counted, store, calls = found.recording.internals(), found.recording.states(), IMAGES * STEPS
    tokens = {"img": 32, "txt": WORDS, "single": 32 + WORDS}
    for site in layout.sites:
        assert counted.sites[site.name].tokens == calls * tokens[site.stream]
        different = (counted.sites[site.name].fires - fires[site.name]).abs().sum()
        assert different <= 1e-4 * calls * tokens[site.stream] * site.width
        assert fires[site.name].sum() > 0
        assert store.count(site.name) == 8 * calls


def test_rows_of_an_edit_are_of_no_reference_picture(edited):
    """What enters the first image MLP is compared with what the reference transformer has there, for all its tokens."""
    found = edited("FLUX.2 klein 4B")
    flux, inputs = Flux.load(found.dense.tensors), []
    flux.get_submodule(found.dense.layout.sites[0].up).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for point in found.points:
            point.run(flux)
    own = torch.cat([values[:, :32].flatten(0, 1) for values in inputs])
    references = torch.cat([values[:, 32:].flatten(0, 1) for values in inputs])
    rows = torch.cat([piece.x.float() for piece in found.recording.states().rows("double-img-0")])
    assert torch.cdist(rows, own).min(1).values.max() < 0.1 < torch.cdist(rows, references).min(1).values.min()


@pytest.mark.parametrize("name", ["FLUX.2 klein 4B", "FLUX.1 Kontext"])
def test_what_was_cut_is_trained_on_recorded_edits(edited, tmp_path, name: str):
    found = edited(name, with_rows=False)
    sites = found.dense.layout.sites
    kept = {site.name: torch.arange(site.width // 2) for site in sites}  # the other half is near it
    plan = PruningPlan(
        found.dense.layout.family, found.dense.fingerprint, kept, {site.name: site.width for site in sites}, "none", "by hand"
    )
    options = Options(steps=24, learning_rate=2e-3, batch=4, eval_every=12, save_dtype="float32")
    (first, *_) = distill_layers(found.dense, plan, found.recording, tmp_path / "trained", options)
    assert first.relative_final < 0.8 * first.relative_cut
    layers = RetrainedLayers.open(tmp_path / "trained", found.dense)
    trained = Flux.load({key: value.float() for key, value in Replaced(found.dense, layers).items()})
    cut = Flux.load(dict(Cut(found.dense, plan)))
    assert velocity_error(trained, found.points) < 0.8 * velocity_error(cut, found.points)


def test_edits_by_another_method_are_recorded_and_refused_for_training(edited):
    found = edited("FLUX.2 klein 4B", reference_latents_method="uxo")
    with pytest.raises(UserError, match="by the method 'uxo', which cannot be trained on"):
        Trajectories.open(found.recording.states())


def test_edits_with_cached_reference_tokens_are_counted_alike(edited):
    """From the second call on, the model has no tokens of references."""
    found = edited("FLUX.2 klein 4B", cache=True)
    sites = found.recording.internals().sites
    assert {name: site.tokens for name, site in sites.items()} == {
        site.name: IMAGES * STEPS * {"img": 32, "txt": WORDS, "single": 32 + WORDS}[site.stream]
        for site in found.dense.layout.sites
    }
