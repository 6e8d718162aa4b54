"""Loading FLUX of any widths inside ComfyUI, as a library: quantised files, sizes, clones, torch.compile, partial loading.

ComfyUI loads nothing partially on a CPU by itself, so these tests tell its ModelPatcher to, as --lowvram does with a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_poke.tiny.model import FOLDER
from safetensors.torch import load_file, save_file

#: Bytes of room for weights that the host gives a model with --novram.
NO_VRAM = 0.1


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


def velocity(model) -> torch.Tensor:
    """One call of a model as it lies in memory: sampling would load it as a whole."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 8, 8, generator=generator)
    text, pooled = torch.randn(2, 8, 64, generator=generator), torch.randn(2, 64, generator=generator)
    with torch.inference_mode():
        return model.model.apply_model(x, torch.tensor([0.7, 0.3]), c_crossattn=text, y=pooled)


def loaded_layers(model) -> set[str]:
    """Names of the layers that lie where they are computed."""
    layers = model.model.diffusion_model.named_modules()
    return {name for name, layer in layers if getattr(layer, "comfy_patched_weights", False)}


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


@pytest.mark.parametrize(("weight_dtype", "size"), [("default", 4), ("fp8_e5m2", 1)])
def test_the_size_that_the_host_reckons_with_is_that_of_the_pruned_tensors(load, plan, weight_dtype, size):
    dense = sum(tensor.numel() for tensor in load_file(FOLDER / "flux.safetensors").values())
    neurons = sum(plan.widths[name] - len(kept) for name, kept in plan.kept.items())
    model = load(weight_dtype=weight_dtype)
    schedule = model.model.model_sampling.sigmas.nbytes
    # Each neuron takes a row and a column of 128, and a bias.
    assert model.model_size() == size * (dense - 257 * neurons) + schedule
    assert model.clone().model_size() == model.model_size()


def test_layers_are_empty_until_they_are_loaded_and_only_those_of_mlps_change_their_width(in_process):
    import comfy.ops
    from flux_poke.nodes.loading import of_any_width

    operations: Any = of_any_width(comfy.ops.manual_cast, {"mlp"})
    layers = torch.nn.ModuleDict({name: operations.Linear(8, 6) for name in ("mlp", "qkv")})
    assert sum(parameter.numel() for parameter in layers.parameters()) == 0
    weights = {"mlp.weight": torch.randn(4, 8), "mlp.bias": torch.randn(4), "qkv.weight": torch.randn(6, 8)}
    layers.load_state_dict(weights | {"qkv.bias": torch.randn(6)})
    x = torch.randn(3, 8)
    assert torch.equal(layers["mlp"](x), torch.nn.functional.linear(x, weights["mlp.weight"], weights["mlp.bias"]))
    assert (layers["mlp"].out_features, layers["qkv"].out_features) == (4, 6)
    with pytest.raises(RuntimeError, match=r"size mismatch for qkv\.weight"):
        layers.load_state_dict(weights | {"qkv.weight": torch.randn(6, 4), "qkv.bias": torch.randn(6)})


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


@pytest.mark.parametrize("kind", ["default", "fp8_e4m3fn", "scaled fp8"])
def test_a_partly_loaded_model_gives_what_the_whole_one_gives(load, tmp_path, kind):
    model = load(scaled_fp8(tmp_path)[0]) if kind == "scaled fp8" else load(weight_dtype=kind)
    size, half = model.model_size(), model.model_size() // 2
    model.partially_load(model.load_device, extra_memory=2 * size)
    assert model.loaded_size() == size
    expected = velocity(model)
    assert expected.std() > 0.1

    freed = model.partially_unload(model.offload_device, half)
    assert half <= freed == size - model.loaded_size()
    assert "double_blocks.0.img_mlp.0" not in loaded_layers(model)
    assert torch.equal(expected, velocity(model))

    model.partially_load(model.load_device, extra_memory=2 * size)
    assert model.loaded_size() == size
    assert torch.equal(expected, velocity(model))

    for room in (half, NO_VRAM):
        model.detach()
        model.partially_load(model.load_device, extra_memory=room)
        assert model.loaded_size() <= room
        assert bool(loaded_layers(model)) == (room == half)
        assert torch.equal(expected, velocity(model))


@pytest.mark.parametrize("kind", ["default", "scaled fp8"])
def test_a_lora_acts_on_layers_that_are_not_loaded(load, tmp_path, kind):
    from flux_poke.nodes.loading import load_lora

    model = load(scaled_fp8(tmp_path)[0]) if kind == "scaled fp8" else load()
    plain = velocity(model)
    generator = torch.Generator().manual_seed(2)
    lora = {}
    for name, layer in model.model.diffusion_model.named_modules():
        if name in ("double_blocks.0.img_mlp.0", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear2"):
            rows, columns = layer.out_features, layer.in_features
            lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
            lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.1
    styled = load_lora(model, lora, 1.0)
    styled.partially_load(styled.load_device, extra_memory=2 * styled.model_size())
    expected = velocity(styled)
    assert relative(plain, expected) > 1e-2

    styled.detach()
    styled.partially_load(styled.load_device, extra_memory=NO_VRAM)
    assert "double_blocks.0.img_mlp.0" not in loaded_layers(styled)
    assert styled.lowvram_patch_counter() > 0
    # In 8 bits, what is loaded is rounded again after the LoRA; what is not is never.
    assert relative(expected, velocity(styled)) < (1e-10 if kind == "default" else 1e-3)

    styled.detach()
    assert torch.equal(plain, velocity(model))


def test_a_pruned_file_is_read_as_the_host_reads_its_own_for_dynamic_memory(plan, in_process, tmp_path, monkeypatch):
    """With it the weights of a model are the file's own pages, which the host fetches from disk when a layer runs."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control
    from flux_poke.nodes import loading
    from flux_poke.pruning.checkpoint import Pruned, save_pruned
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.surgery import Cut

    path = tmp_path / "pruned.safetensors"
    save_pruned(path, Cut(Dense.open(FOLDER / "flux.safetensors"), plan))
    expected = velocity(loading.load_pruned(Pruned.open(path), "default"))
    assert comfy_aimdo.control.init()
    with monkeypatch.context() as dynamic:
        dynamic.setattr(comfy.memory_management, "aimdo_enabled", True)
        # On a GPU it is; there a layer's weights are assigned, here they would be copied.
        dynamic.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
        model = loading.load_pruned(Pruned.open(path), "default")
    down = model.model.diffusion_model.double_blocks[0].img_mlp[2].weight
    assert down.shape == (128, len(plan.kept["double-img-0"]))
    assert down.untyped_storage()._comfy_tensor_file_slice.size == down.nbytes
    model.partially_load(model.load_device, extra_memory=NO_VRAM)
    assert torch.equal(expected, velocity(model))
