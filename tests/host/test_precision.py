"""Files in scaled fp8 in ComfyUI: they run through the host's own quantised layers, which take half of the memory of bf16."""

from __future__ import annotations

import pytest
import torch
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts

from .test_loading import NO_VRAM, relative, sample, velocity

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Rows, texts and amplifications of the tiny FLUX on forty prompts."""
    from flux_poke.recording.drawing import Wanted, record
    from flux_poke.recording.recording import Recording
    from flux_poke.recording.rows import RowChoice

    found = Recording.at(tmp_path_factory.mktemp("precision") / "tiny")
    prompts = [digit_prompts(number % 10)[number // 10] for number in range(40)]
    record(FOLDER / "flux.safetensors", prompts, found, Wanted(internals=True, rows=RowChoice(24, 8)), 10_000, 10, 20)
    return found


@pytest.fixture(params=["dense modulation", "low-rank modulation", "low-rank modulation in 8 bits"])
def files(request, in_process, recording, tmp_path, monkeypatch):
    """The tiny FLUX at half of its neurons, or of all parameters, by precision."""
    from flux_poke.pruning import precision
    from flux_poke.pruning.checkpoint import Pruned, save_pruned
    from flux_poke.pruning.dense import Dense
    from flux_poke.pruning.planning import ByBudget, make_plan
    from flux_poke.pruning.repair import Repairs
    from flux_poke.pruning.surgery import Cut

    dense = Dense.open(FOLDER / "flux.safetensors")
    what = ByBudget(neurons=0.5, multiple=16) if request.param == "dense modulation" else ByBudget(share=0.4, multiple=16)
    if request.param.endswith("8 bits"):  # as in a model of full width
        monkeypatch.setattr(precision, "WIDE", dense.layout.hidden)
        what = ByBudget(share=0.4, precision="fp8")
    plan = make_plan(dense, recording, what).plan
    found = {}
    for name in precision.PRECISIONS:
        path = tmp_path / f"{name}.safetensors"
        save_pruned(path, Cut(dense, plan, Repairs(dense, plan, "affine", recording)), precision=name)
        found[name] = Pruned.open(path)
    thin = [key for key in found["fp8"].tensors if key.endswith((".lin.up.weight", ".lin.down.weight"))]
    assert bool(thin) == request.param.startswith("low")
    assert {found["fp8"].tensors[key].dtype for key in thin} <= {FP8 if request.param.endswith("8 bits") else torch.bfloat16}
    return found


def load(pruned, weight_dtype: str = "default"):
    from flux_poke.nodes import loading

    return loading.load_pruned(pruned, weight_dtype)


def test_a_file_in_fp8_runs_through_the_hosts_quantised_layers_and_draws_what_its_numbers_say(files):
    from comfy.quant_ops import QuantizedTensor
    from flux_poke.flux.model import Flux
    from flux_poke.flux.weights import Plain

    model = load(files["fp8"])
    layers = dict(model.model.diffusion_model.named_modules())
    names = [key.removesuffix(".comfy_quant") for key in files["fp8"].tensors if key.endswith(".comfy_quant")]
    assert {"double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.3.linear1"} <= set(names)
    for name in names:
        weight = layers[name].weight
        assert isinstance(weight, QuantizedTensor), name
        assert weight._qdata.dtype == FP8
        assert layers[name]._full_precision_mm_config == ("mod" in name)
        assert torch.equal(weight._qdata.view(torch.uint8), files["fp8"].tensors[f"{name}.weight"].view(torch.uint8))
    generator = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.7, 0.3])
    text, pooled = torch.randn(2, 8, 64, generator=generator), torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        expected = Flux.load(dict(Plain(files["fp8"].tensors)), torch.float32)(x, sigma, text, pooled)
    assert relative(x - sigma[:, None, None, None] * expected, velocity(model)) < 1e-3


def test_what_fp8_draws_is_near_to_what_bf16_draws_in_half_of_the_memory(files):
    stored, bf16, fp8 = (load(files[precision]) for precision in ("stored", "bf16", "fp8"))
    expected = sample(stored)
    assert expected.std() > 0.1
    assert relative(expected, sample(bf16)) < 1e-4
    assert relative(expected, sample(fp8)) < 1e-2
    eight = sum(tensor.numel() for tensor in files["fp8"].tensors.values() if tensor.dtype == FP8)
    others = sum(tensor.numel() for tensor in files["fp8"].tensors.values() if tensor.dtype == torch.bfloat16)
    # On a CPU the host computes in float32, and keeps what is not quantised in that.
    assert fp8.model_size() == pytest.approx(eight + 4 * others, rel=0.01)
    assert bf16.model_size() == pytest.approx(4 * (eight + others), rel=0.01)


def test_a_partly_loaded_file_in_fp8_gives_what_the_whole_one_gives(files):
    model = load(files["fp8"])
    model.partially_load(model.load_device, extra_memory=2 * model.model_size())
    expected = velocity(model)
    model.detach()
    model.partially_load(model.load_device, extra_memory=NO_VRAM)
    assert model.loaded_size() <= NO_VRAM
    assert torch.equal(expected, velocity(model))


def test_a_model_of_a_file_in_fp8_is_saved_in_it_again(files, tmp_path):
    from flux_poke.nodes.models import MergedWeights
    from flux_poke.pruning.checkpoint import Pruned, save_weights

    model = load(files["fp8"])
    save_weights(tmp_path / "again.safetensors", MergedWeights(model), files["fp8"].plan, files["fp8"].report)
    again = Pruned.open(tmp_path / "again.safetensors")
    assert again.tensors.keys() == files["fp8"].tensors.keys()
    assert {key: tensor.dtype for key, tensor in again.tensors.items() if tensor.dtype == FP8}.keys() == {
        key for key, tensor in files["fp8"].tensors.items() if tensor.dtype == FP8
    }
    assert torch.equal(velocity(load(again)), velocity(model))
    assert TinyFlux.load(tmp_path / "again.safetensors").flux.layout.neurons == again.layout.neurons
