"""FLUX.2 klein's own ways on ComfyUI: 8-bit files of every kind, LoRAs on gated MLPs without biases, a block of full width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux_poke.flux.layout import Layout, read_layout
from flux_poke.flux.model import Flux
from flux_poke.flux.weights import SiteWeights
from flux_poke.pruning.checkpoint import Pruned, save_pruned, save_weights
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import convert_lora
from flux_poke.pruning.moments import gather
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.refit import affine, none
from flux_poke.pruning.surgery import Cut, up_rows
from flux_poke.recording.store import Rows
from safetensors.torch import load_file, save_file
from small_family import MEMBERS, TEXT
from torch import Tensor

KLEIN = next(member for member in MEMBERS if member.name == "FLUX.2 klein 4B")


def third_cut(dense: Dense) -> PruningPlan:
    kept = {site.name: torch.tensor([j for j in range(site.width) if j % 3]) for site in dense.layout.sites}
    widths = {site.name: site.width for site in dense.layout.sites}
    return PruningPlan("flux2", dense.fingerprint, kept, widths, "none", "every third")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise levels and text of one call."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 128, 4, 4, generator=generator), torch.randn(2, 8, TEXT, generator=generator)
    return x, torch.tensor([0.7, 0.3]), text


def velocity(model) -> Tensor:
    """What a MODEL makes of that call, as the host makes it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    x, sigma, text = inputs()
    with torch.inference_mode():
        denoised = model.model.apply_model(x, sigma, c_crossattn=text)
    return (x - denoised) / sigma[:, None, None, None]


def relative(expected: Tensor, found: Tensor) -> float:
    return ((found.double() - expected.double()).square().sum() / expected.double().square().sum()).item()


def eighth(tensors: dict[str, Tensor], kind: str, path: Path) -> dict[str, Tensor]:
    """Writes the blocks' weights in 8 bits with scales, in one of the three ways there are; the numbers that it stands for."""
    stored, numbers, layers = dict(tensors), dict(tensors), {}
    told, header = {"format": "float8_e4m3fn"}, None
    for key, weight in tensors.items():
        if "_blocks." in key and key.endswith(".weight") and weight.ndim == 2:
            layer, scale = key.removesuffix(".weight"), weight.abs().max() / 448
            stored[key] = (weight / scale).to(torch.float8_e4m3fn)
            numbers[key] = stored[key].float() * scale
            stored[f"{layer}.scale_weight" if kind == "scaled fp8" else f"{layer}.weight_scale"] = scale
            layers[layer] = told
            if kind == "comfy_quant":
                stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
            if kind == "in the header":  # as FLUX.2-klein-4b-fp8, with a scale for what comes in
                stored[f"{layer}.input_scale"] = torch.tensor(1.0)
    if kind == "scaled fp8":
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    if kind == "in the header":
        header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, path, header)
    return numbers


@pytest.fixture
def klein(tmp_path) -> dict[str, Tensor]:
    KLEIN.save(tmp_path / "klein.safetensors")
    return load_file(tmp_path / "klein.safetensors")


@pytest.mark.parametrize("kind", ["scaled fp8", "comfy_quant", "in the header"])
def test_an_8_bit_klein_is_cut_saved_and_loaded_twice_and_gives_what_its_numbers_say(klein, in_process, tmp_path, kind: str):
    from flux_poke.nodes import loading
    from flux_poke.nodes.models import MergedWeights, model_fingerprint

    path = tmp_path / "eighth.safetensors"
    numbers = eighth(klein, kind, path)
    plain, dense = Dense.of(numbers), Dense.open(path)
    assert dense.fingerprint.matches(plain.fingerprint)
    whole = loading.load_flux(dense.tensors, "default", dense.metadata)
    assert model_fingerprint(whole).matches(dense.fingerprint)

    plan = third_cut(dense)
    expected = velocity(loading.load_flux(Cut(plain, third_cut(plain)), "default"))
    assert expected.std() > 0.1
    cut = loading.load_flux(Cut(dense, plan), "default", dense.metadata)
    save_pruned(tmp_path / "once.safetensors", Cut(dense, plan))
    once = loading.load_pruned(Pruned.open(tmp_path / "once.safetensors"), "default")
    save_weights(tmp_path / "twice.safetensors", MergedWeights(once), plan, {})
    twice = loading.load_pruned(Pruned.open(tmp_path / "twice.safetensors"), "default")
    for model in (cut, once, twice):
        weight = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
        assert weight.shape == (2 * 256, 128)
        assert getattr(weight, "_qdata", weight).dtype == torch.float8_e4m3fn
        assert relative(expected, velocity(model)) < 1e-3
    size = (tmp_path / "once.safetensors").stat().st_size
    assert size == pytest.approx((tmp_path / "twice.safetensors").stat().st_size, rel=0.02)
    assert size < 0.5 * sum(4 * tensor.numel() for tensor in numbers.values())


def test_a_lora_on_gated_mlps_without_biases_is_the_dense_models_lora_cut(klein, in_process):
    """The same as the host's own LoRA on the dense model, whose cut neurons are then zero."""
    from flux_poke.nodes import loading

    dense = Dense.of(klein)
    plan = third_cut(dense)
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for site in dense.layout.sites:
        for layer in (site.up, site.down):
            rows, columns = klein[f"{layer}.weight"].shape
            lora[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
            lora[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
    merged = dict(klein)
    for site in dense.layout.sites:
        gone = torch.ones(site.width, dtype=torch.bool).index_fill(0, plan.kept[site.name], False)
        for layer in (site.up, site.down):
            up, down = (lora[f"diffusion_model.{layer}.lora_{name}.weight"] for name in "BA")
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + up @ down
        merged[f"{site.down}.weight"][:, site.down_column :][:, gone] = 0
    expected = velocity(loading.load_flux(merged, "default"))

    cut = Cut(dense, plan)
    pruned = loading.load_flux(cut, "default")
    repaired = {site.name: none(SiteWeights.read(klein, site), plan.kept[site.name]) for site in dense.layout.sites}
    folds, reports = ({name: getattr(site, part) for name, site in repaired.items()} for part in ("fold", "report"))
    converted = convert_lora(lora, dense.layout, plan, folds, reports, None, cut)
    styled = velocity(loading.load_lora(pruned, converted.tensors, 1.0))
    assert relative(expected, styled) < 1e-9
    assert relative(expected, velocity(pruned)) > 1e-3


def test_a_klein_block_of_full_width_is_cut_repaired_and_run(in_process):
    """Hidden 3,072 and 9,216 gated neurons, as in klein 4B: of three quarters of them, the rest makes up for most."""
    from flux_poke.nodes import loading

    layout = Layout.of("flux2", 3072, 1, 0, context=TEXT)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Flux(layout).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.ones(shape) if key.endswith("scale") else torch.randn(shape, generator=generator, dtype=torch.bfloat16) / 50
        for key, shape in shapes.items()
    }
    assert read_layout(shapes).sites[0].width == 9216
    site = layout.site("double-img-0")
    weights = SiteWeights.read(tensors, site)
    plane = torch.randn(12, 3072, generator=generator)

    def rows(count: int) -> Tensor:
        """What is normalised as the block does it, and lies in few directions, as what a trained one reads does."""
        return torch.nn.functional.layer_norm(torch.randn(count, 12, generator=generator) @ plane, (3072,))

    kept = torch.arange(0, 9216, 4)
    moments = gather(weights, [Rows(rows(600), None, *torch.zeros(3, 600))])
    repaired, cut = affine(weights, kept, moments, 1e-4), none(weights, kept)
    x = rows(100)
    neurons = weights.activations(x)
    expected = neurons @ weights.down.T
    errors = [relative(expected, neurons[:, kept] @ one.down.T) for one in (cut, repaired)]
    assert errors[1] < 0.1 * errors[0]

    pruned = dict(tensors)
    pruned[f"{site.up}.weight"] = tensors[f"{site.up}.weight"][up_rows(site, kept)].clone()
    pruned[f"{site.down}.weight"] = repaired.down.bfloat16()
    model = loading.load_flux(pruned, "default")
    assert model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.shape == (2 * 2304, 3072)
    found = velocity(model)
    del model
    reference = Flux.load(pruned, torch.float32)
    x, sigma, text = inputs()
    with torch.inference_mode():
        assert relative(reference(x, sigma, text), found) < 1e-3
