"""flux/fingerprint.py: the same model in any precision matches, any other does not."""

import itertools
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.fingerprint import Fingerprint
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn


def stored_as(tensors: dict[str, Tensor], dtype: torch.dtype, layers: str = "") -> dict[str, Tensor]:
    """The matrices whose key contains `layers` in another precision."""
    return {key: t.to(dtype) if t.ndim == 2 and layers in key else t for key, t in tensors.items()}


def scaled(
    tensors: dict[str, Tensor], scale_name: str, layers: str = "blocks", by_row: bool = False, dtype: torch.dtype = FP8
) -> dict[str, Tensor]:
    """As quantisers write it: matrices divided so that their largest value ends the range, and the divisor beside them."""
    stored = dict(tensors)
    for key, tensor in tensors.items():
        if tensor.ndim == 2 and layers in key:
            largest = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().max()
            scale = largest.float() / (448 if dtype == FP8 else 127)
            stored[key] = (tensor.float() / scale).to(dtype) if dtype == FP8 else (tensor.float() / scale).round().to(dtype)
            stored[scale_name.format(key.removesuffix(".weight"))] = scale
    return stored


def versions(tensors: dict[str, Tensor], original: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Tensor]]:
    """One model as people publish it, converted mostly by way of bf16; mixed where only some layers are in 8 bits."""
    first = {key: tensor.to(original) for key, tensor in tensors.items()}
    bf16 = {key: tensor.bfloat16() for key, tensor in first.items()}
    return {
        "bf16": bf16,
        "fp32": {key: tensor.float() for key, tensor in first.items()},
        "fp16": {key: tensor.half() for key, tensor in first.items()},
        "fp8": stored_as(bf16, FP8),
        "fp8 mixed": stored_as(bf16, FP8, "mlp"),
        "fp8 e5m2": stored_as(bf16, torch.float8_e5m2),
        "fp8 scaled": scaled(bf16, "{}.weight_scale"),
        "fp8 scaled, older names": scaled(bf16, "{}.scale_weight"),
        "fp8 scaled by row": scaled(bf16, "{}.weight_scale", by_row=True),
        "fp8 scaled, mixed": scaled(bf16, "{}.weight_scale", "mlp"),
        "int8 scaled": scaled(first, "{}.weight_scale", dtype=torch.int8),
        "with a prefix": {f"model.diffusion_model.{key}": tensor for key, tensor in bf16.items()},
    }


@pytest.fixture
def fingerprint(tmp_path):
    """The fingerprint of tensors, by way of a file."""
    numbers = itertools.count()

    def of(tensors: dict[str, Tensor]) -> Fingerprint:
        path = Path(tmp_path / f"{next(numbers)}.safetensors")
        save_file(tensors, path)
        return Fingerprint.of_checkpoint(Checkpoint(path))

    return of


@pytest.mark.parametrize("original", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_one_model_matches_in_every_precision(tensors, fingerprint, family, original):
    found = {name: fingerprint(version) for name, version in versions(tensors(family), original).items()}
    for (a, first), (b, second) in itertools.product(found.items(), repeat=2):
        assert first.matches(second), f"{a} and {b}: {first.difference(second)}"


def test_a_model_in_memory_matches_its_file(tensors, fingerprint):
    assert Fingerprint.of_tensors(tensors("flux1")) == fingerprint(tensors("flux1"))
    with_prefix = fingerprint(versions(tensors("flux1"))["with a prefix"])
    assert with_prefix == fingerprint(versions(tensors("flux1"))["bf16"])


@pytest.mark.parametrize("change", [0.3, 0.01])
def test_a_fine_tune_does_not_match_in_any_precision(tensors, fingerprint, change):
    """Every weight differs by a share of its size, some up and some down, as after training."""
    base = tensors("flux1")
    generator = torch.Generator().manual_seed(5)
    tuned = {key: t * (1 + change * torch.randn(t.shape, generator=generator)) for key, t in base.items()}
    # e5m2 is left out: beside another 8-bit format its numbers, a quarter of their size apart, hide a change of 1 %.
    ours = {name: fingerprint(version) for name, version in versions(base).items() if name != "fp8 e5m2"}
    others = {name: fingerprint(version) for name, version in versions(tuned).items() if name != "fp8 e5m2"}
    pairs = itertools.chain(itertools.product(ours.items(), others.items()), itertools.product(others.items(), ours.items()))
    for (a, first), (b, second) in pairs:
        assert not first.matches(second), f"{a} and {b} of the fine-tune"
    assert "as a fine-tune's do" in ours["bf16"].difference(others["bf16"])


@pytest.mark.parametrize("version", ["bf16", "fp32", "fp16", "fp8 mixed", "fp8 scaled, mixed"])
def test_a_small_change_of_a_few_layers_is_seen_where_they_are_stored_finely(tensors, fingerprint, version):
    """As a LoRA on one block's attention, merged into the weights, leaves them."""
    base = tensors("flux1")
    generator = torch.Generator().manual_seed(6)
    tuned = dict(base)
    for key in ("double_blocks.1.img_attn.qkv.weight", "double_blocks.1.img_attn.proj.weight"):
        down, up = torch.randn(4, 128, generator=generator), torch.randn(len(base[key]), 4, generator=generator)
        tuned[key] = base[key] + 0.001 * up @ down  # 0.002 beside weights of 0.08
    ours, other = versions(base), versions(tuned)[version]
    for name in ("bf16", "fp32", "fp16", "fp8 mixed"):
        assert not fingerprint(ours[name]).matches(fingerprint(other)), name


def test_another_seed_and_other_shapes_do_not_match(tensors, fingerprint):
    base = fingerprint(tensors("flux1"))
    for name, version in versions(tensors("flux1", seed=1)).items():
        assert not base.matches(fingerprint(version)), name
    deeper = fingerprint(tensors("flux1", depth_single=3))
    assert not base.matches(deeper)
    assert base.difference(deeper) == "its layers have other shapes"


def test_a_model_with_weights_that_are_no_numbers_matches_nothing(tensors, fingerprint):
    broken = fingerprint({key: torch.full_like(t, float("nan")) for key, t in tensors("flux1").items()})
    assert not broken.matches(fingerprint(tensors("flux1")))


def test_it_comes_back_from_json_as_it_was(tensors, fingerprint):
    found = fingerprint(versions(tensors("flux1"))["fp8 scaled"])
    assert Fingerprint.from_json(found.to_json()) == found


def test_weights_quantised_in_blocks_are_refused_in_one_sentence(tensors, fingerprint):
    key = "single_blocks.0.linear1"
    blocks = tensors("flux1") | {f"{key}.weight_scale": torch.ones(896, 8)}
    with pytest.raises(UserError, match=rf"{key}.weight is quantised in blocks \(scale of shape \(896, 8\)\)"):
        fingerprint(blocks)
