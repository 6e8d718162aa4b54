"""Loading FLUX of any widths inside ComfyUI, as a library: quantised files, sizes, clones, torch.compile."""

from __future__ import annotations

import pytest
import torch
from flux_poke.flux.tiny import FOLDER
from safetensors.torch import load_file, save_file


@pytest.fixture
def plan(tmp_path):
    """Every third neuron of the tiny FLUX, cut."""
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.plan import PruningPlan

    dense = Dense.open(FOLDER / "flux.safetensors")
    kept = {site.name: torch.tensor([j for j in range(site.width) if j % 3]) for site in dense.layout.sites}
    widths = {site.name: site.width for site in dense.layout.sites}
    return PruningPlan("flux1", dense.fingerprint, kept, widths, "none", "every third")


@pytest.fixture
def load(in_process, plan):
    """The file at a path, cut as `plan` says, as a MODEL."""
    from dataclasses import replace

    from flux_poke.nodes import loading
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.surgery import Cut

    def make(path=FOLDER / "flux.safetensors", weight_dtype="default"):
        dense = Dense.open(path)
        return loading.load_flux(Cut(dense, replace(plan, fingerprint=dense.fingerprint)), weight_dtype, dense.metadata)

    return make


def sample(model) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 16, 8, 8, generator=generator)
    text = [[torch.randn(1, 8, 64, generator=generator), {"pooled_output": torch.randn(1, 64, generator=generator)}]]
    return comfy.sample.sample(
        model, noise, 4, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), seed=0, disable_pbar=True
    )


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - expected).square().sum() / expected.square().sum()).item()


def scaled_fp8(folder) -> tuple:
    """The tiny FLUX with scaled 8-bit block weights, as scaled-fp8 files hold them, and the same numbers in bf16."""
    tensors = load_file(FOLDER / "flux.safetensors")
    quantised, plain = dict(tensors), dict(tensors)
    for key, weight in tensors.items():
        if "_blocks." in key and key.endswith(".weight") and weight.ndim == 2:
            scale = weight.float().abs().max() / 448
            quantised[key] = (weight.float() / scale).to(torch.float8_e4m3fn)
            quantised[key.replace(".weight", ".scale_weight")] = scale
            plain[key] = (quantised[key].float() * scale).float()
    quantised["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(quantised, folder / "scaled.safetensors")
    save_file({key: tensor.float() for key, tensor in plain.items()}, folder / "plain.safetensors")
    return folder / "scaled.safetensors", folder / "plain.safetensors"


def test_a_scaled_fp8_file_is_cut_and_draws_what_its_numbers_say(load, tmp_path):
    scaled, plain = scaled_fp8(tmp_path)
    expected = sample(load(plain))
    assert expected.std() > 0.1
    assert relative(expected, sample(load(scaled))) < 1e-3


def test_the_size_that_the_host_reckons_with_is_the_pruned_one(load, in_process):
    import comfy.sd

    pruned = load()
    dense = comfy.sd.load_diffusion_model(str(FOLDER / "flux.safetensors"))
    assert pruned.model_size() == sum(t.nbytes for t in pruned.model.state_dict().values())
    assert pruned.model_size() < 0.9 * dense.model_size()
    assert pruned.clone().model_size() == pruned.model_size()


def test_a_pruned_model_draws_the_same_after_it_was_unloaded_and_made_anew(load, in_process):
    import comfy.model_management

    model = load()
    first = sample(model)
    comfy.model_management.unload_all_models()
    assert torch.equal(first, sample(model))
    factory, arguments = model.cached_patcher_init
    assert torch.equal(first, sample(factory(*arguments, disable_dynamic=True)))


def test_a_pruned_model_draws_the_same_through_torch_compile(load, in_process):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = load()
    expected = sample(model)
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": None})
    assert relative(expected, sample(compiled)) < 1e-6
