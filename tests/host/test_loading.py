"""Loading FLUX of any widths and ranks inside ComfyUI, as a library: quantised files, sizes, torch.compile, partial loading.

What holds of a pruned model is tested on one whose modulation layers are dense and on one where they are of low rank.
ComfyUI loads nothing partially on a CPU by itself, so these tests tell its ModelPatcher to, as --lowvram does with a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flux_poke.tiny.model import FOLDER
from safetensors.torch import load_file, save_file

#: Bytes of room for weights that the host gives a model with --novram.
NO_VRAM = 0.1
#: Layers that a model of low-rank modulation alone has.
LOW_RANK = ("double_blocks.0.img_mod.lin.up", "double_blocks.1.txt_mod.lin.down", "single_blocks.1.modulation.lin.up")


def low_rank_tensors() -> dict[str, torch.Tensor]:
    """The tiny FLUX with every modulation layer of another rank."""
    from flux_poke.flux.layout import read_layout
    from flux_poke.pruning.low_rank import Vectors, low_rank

    tensors = load_file(FOLDER / "flux.safetensors")
    layout = read_layout({key: tensor.shape for key, tensor in tensors.items()})
    pooled = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    vectors = Vectors.sample(tensors, layout, pooled)
    for rank, site in enumerate(layout.sites, start=4):
        weight, bias = (tensors.pop(f"{site.modulation}.{part}") for part in ("weight", "bias"))
        layer = low_rank(weight.float(), bias.float(), vectors, rank)
        new = {"up.weight": layer.up, "down.weight": layer.down, "bias": layer.bias}
        tensors |= {f"{site.modulation}.{part}": tensor.to(weight.dtype) for part, tensor in new.items()}
    return tensors


@pytest.fixture(params=["dense modulation", "low-rank modulation"])
def source(request, tmp_path):
    """A file of the tiny FLUX."""
    if request.param == "dense modulation":
        return FOLDER / "flux.safetensors"
    save_file(low_rank_tensors(), tmp_path / "low_rank.safetensors")
    return tmp_path / "low_rank.safetensors"


@pytest.fixture
def plan(source):
    """Every third neuron of the tiny FLUX, cut."""
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.plan import PruningPlan

    dense = Dense.open(source)
    kept = {site.name: torch.tensor([j for j in range(site.width) if j % 3]) for site in dense.layout.sites}
    widths = {site.name: site.width for site in dense.layout.sites}
    return PruningPlan("flux1", dense.fingerprint, kept, widths, "none", "every third")


@pytest.fixture
def load(in_process, source, plan):
    """The file at a path, cut as `plan` says, as a MODEL."""
    from flux_poke.nodes import loading
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.surgery import Cut

    def make(path=source, weight_dtype="default"):
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


def scaled_fp8(source, folder) -> tuple:
    """A file with scaled 8-bit block weights, as scaled-fp8 files hold them, and the same numbers in bf16."""
    tensors = load_file(source)
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


def test_a_scaled_fp8_file_is_cut_and_draws_what_its_numbers_say(load, source, tmp_path):
    scaled, plain = scaled_fp8(source, tmp_path)
    expected = sample(load(plain))
    assert expected.std() > 0.1
    assert relative(expected, sample(load(scaled))) < 1e-3


@pytest.mark.parametrize(("weight_dtype", "size"), [("default", 4), ("fp8_e5m2", 1)])
def test_the_size_that_the_host_reckons_with_is_that_of_the_pruned_tensors(load, source, plan, weight_dtype, size):
    tensors = load_file(source)
    thin = {key for key in tensors if ".lin." in key} if any(".lin.down." in key for key in tensors) else set()
    dense = sum(tensor.numel() for tensor in tensors.values())
    kept = sum(tensors[key].numel() for key in thin)  # never in less than the 2 bytes they have in the file
    neurons = sum(plan.widths[name] - len(kept) for name, kept in plan.kept.items())
    model = load(weight_dtype=weight_dtype)
    schedule = model.model.model_sampling.sigmas.nbytes
    # Each neuron takes a row and a column of 128, and a bias.
    assert model.model_size() == size * (dense - kept - 257 * neurons) + max(size, 2) * kept + schedule
    assert model.clone().model_size() == model.model_size()


def test_low_rank_modulation_gives_what_the_reference_and_dense_weights_give(in_process):
    from flux_poke.flux.model import Flux
    from flux_poke.nodes import loading

    tensors = {key: tensor.float() for key, tensor in low_rank_tensors().items()}
    products = dict(tensors)
    for key in tensors:
        if key.endswith(".down.weight"):
            layer = key.removesuffix(".down.weight")
            down, up = products.pop(f"{layer}.down.weight"), products.pop(f"{layer}.up.weight")
            products[f"{layer}.weight"] = up @ down
    found = velocity(loading.load_flux(tensors, "default"))
    generator = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.7, 0.3])
    text, pooled = torch.randn(2, 8, 64, generator=generator), torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        reference = Flux.load(tensors)(x, sigma, text, pooled)
    assert relative(x - sigma[:, None, None, None] * reference, found) < 1e-9
    assert relative(velocity(loading.load_flux(products, "default")), found) < 1e-9
    assert relative(velocity(loading.load_flux(load_file(FOLDER / "flux.safetensors"), "default")), found) > 1e-6


@pytest.mark.parametrize(
    ("weight_dtype", "stored"),
    [("fp8_e4m3fn", torch.float8_e4m3fn), ("fp8_e4m3fn_fast", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_in_8_bits_all_is_rounded_but_the_thin_factors(in_process, weight_dtype, stored):
    from flux_poke.nodes import loading

    tensors = low_rank_tensors()
    model = loading.load_flux(tensors, weight_dtype)
    weights = dict(model.model.diffusion_model.named_parameters())
    assert {name for name, weight in weights.items() if weight.dtype != stored} == {key for key in weights if ".lin." in key}
    # newer hosts leave a file's numbers as they are, and cast them to this when a layer runs
    thin, others = (
        {model.get_model_object(f"diffusion_model.{name}").weight_comfy_model_dtype for name in names}
        for names in (LOW_RANK, ("double_blocks.0.img_mlp.0", "img_in"))
    )
    assert (thin, others) == ({torch.bfloat16}, {stored})
    rounded = {key: (tensor if ".lin." in key else tensor.to(stored)).float() for key, tensor in tensors.items()}
    assert relative(velocity(loading.load_flux(rounded, "default")), velocity(model)) < 1e-6


def test_every_layer_of_low_rank_modulation_is_a_linear_layer_of_the_host(in_process):
    import comfy.ops
    from flux_poke.nodes import loading

    transformer = loading.load_flux(low_rank_tensors(), "default").model.diffusion_model
    lin = transformer.double_blocks[0].img_mod.lin
    assert type(lin) is torch.nn.Sequential
    assert [isinstance(layer, comfy.ops.CastWeightBiasOp) for layer in lin] == [True, True]
    with_biases = {name for name, layer in transformer.named_modules() if getattr(layer, "bias", None) is not None}
    assert set(LOW_RANK) & with_biases == {name for name in LOW_RANK if name.endswith("up")}
    layers = [layer for layer in transformer.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(list(layer.children()) == [] and layer.weight.numel() > 0 for layer in layers)


def test_what_is_saved_of_low_rank_modulation_has_the_names_of_the_file_and_its_loras(in_process):
    from flux_poke.nodes import loading
    from flux_poke.nodes.models import MergedWeights

    tensors = low_rank_tensors()
    model = loading.load_flux(tensors, "default")
    saved = MergedWeights(model)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensor.float()) for key, tensor in tensors.items())
    up, down, bias = torch.randn(768, 2), torch.randn(2, 4), torch.randn(768)
    lora = {"lora_up.weight": up, "lora_down.weight": down, "diff_b": bias}
    layer = "double_blocks.0.img_mod.lin"
    styled = loading.load_lora(model, {f"diffusion_model.{layer}.up.{part}": tensor for part, tensor in lora.items()}, 0.5)
    saved = MergedWeights(styled)
    torch.testing.assert_close(saved[f"{layer}.up.weight"], tensors[f"{layer}.up.weight"].float() + 0.5 * up @ down)
    torch.testing.assert_close(saved[f"{layer}.bias"], tensors[f"{layer}.bias"].float() + 0.5 * bias)
    assert torch.equal(saved[f"{layer}.down.weight"], tensors[f"{layer}.down.weight"].float())


def test_a_model_with_rotary_axes_of_its_own_is_refused_since_the_host_would_turn_it_otherwise(in_process):
    from flux_poke.errors import UserError
    from flux_poke.nodes.loading import load_flux

    tensors = {**load_file(FOLDER / "flux.safetensors"), "rope_axes": torch.empty(0, 8, 60, 60)}
    with pytest.raises(UserError, match=r"axes of its own \(8, 60, 60\); ComfyUI runs a family's own axes only"):
        load_flux(tensors, "default")


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
def test_a_partly_loaded_model_gives_what_the_whole_one_gives(load, source, tmp_path, kind):
    model = load(scaled_fp8(source, tmp_path)[0]) if kind == "scaled fp8" else load(weight_dtype=kind)
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
def test_a_lora_acts_on_layers_that_are_not_loaded(load, source, tmp_path, kind):
    from flux_poke.nodes.loading import load_lora

    model = load(scaled_fp8(source, tmp_path)[0]) if kind == "scaled fp8" else load()
    plain = velocity(model)
    generator = torch.Generator().manual_seed(2)
    lora = {}
    for name, layer in model.model.diffusion_model.named_modules():
        if name in ("double_blocks.0.img_mlp.0", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear2", *LOW_RANK):
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


def test_a_pruned_file_is_read_as_the_host_reads_its_own_for_dynamic_memory(source, plan, in_process, tmp_path, monkeypatch):
    """With it the weights of a model are the file's own pages, which the host fetches from disk when a layer runs."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control
    from flux_poke.nodes import loading
    from flux_poke.pruning.checkpoint import Pruned, save_weights
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.surgery import Cut

    path = tmp_path / "pruned.safetensors"
    dense = Dense.open(source)
    save_weights(path, Cut(dense, plan), replace(plan, ranks=dense.layout.ranks), {})
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
