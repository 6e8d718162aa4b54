"""Pruned files in bf16 and in scaled fp8: numbers, sizes, and what rounding is predicted to do to the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.flux.weights import Plain, full_precision
from flux_poke.pruning.certificate import certificate_text, read_certificate
from flux_poke.pruning.checkpoint import Pruned, save_changed, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.precision import dense_bytes, rank_multiple
from flux_poke.pruning.refit import RepairReport
from flux_poke.pruning.repair import Repairs, report_table
from flux_poke.pruning.rounding import compensated, plain, scale_of
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import trajectory, velocity_error
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CHECKPOINT = FOLDER / "flux.safetensors"
FP8 = torch.float8_e4m3fn


def prompt(number: int, half: int) -> str:
    template = number // 10 % 13
    return digit_prompts(number % 10)[2 * template + (template + half) % 2]


@pytest.fixture(scope="module")
def tiny_recording(tmp_path_factory) -> Recording:
    """Rows, texts and amplifications of the tiny FLUX on sixty prompts."""
    recording = Recording.at(tmp_path_factory.mktemp("precision") / "tiny")
    record(
        CHECKPOINT, [prompt(n, 0) for n in range(60)], recording, Wanted(internals=True, rows=RowChoice(24, 8)), 10_000, 10, 20
    )
    return recording


@pytest.fixture(scope="module")
def exam():
    """Velocities of the tiny FLUX on prompts and seeds that were not recorded."""
    tiny = TinyFlux.load()
    texts = tiny.words([prompt(number, 1) for number in range(20)])
    return trajectory(tiny.flux, tiny.noise(20, 500_000), FluxTimer(10).sigmas(), *texts)[0]


def saved(path: Path, dense: Dense, plan: PruningPlan, precision: str, recording: Recording | None = None) -> Pruned:
    repairs = Repairs(dense, plan, "none" if recording is None else "affine", recording)
    save_pruned(path, Cut(dense, plan, repairs), precision=precision)
    return Pruned.open(path)


def gptq(weight: Tensor, second: Tensor, scale: Tensor, ridge: float) -> Tensor:
    """As IST-DASLab/gptq writes it: with the Cholesky factor of the inverse, column by column; the numbers, float64."""
    order = second.diagonal().argsort(descending=True)
    system = second[order][:, order] + ridge * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(system)), upper=True)
    left, found = weight.double()[:, order], torch.zeros_like(weight, dtype=torch.float64)
    for i in range(len(second)):
        found[:, i] = (left[:, i] / scale).clamp(-448, 448).to(FP8).double() * scale
        error = (left[:, i] - found[:, i]) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
    return found[:, order.argsort()]


def test_rounding_with_compensation_is_gptq_and_leaves_less_error_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(300, 40, generator=generator)
    rows, others = (
        torch.randn(2000, 40, generator=generator) @ mix.T + torch.randn(2000, 300, generator=generator) for _ in range(2)
    )
    weight, second = torch.randn(50, 300, generator=generator), (rows.double().T @ rows.double()) / len(rows)
    scale = scale_of(weight)
    found = compensated(weight, second, scale, 0.01).float() * scale
    expected = gptq(weight, second, scale, 0.01)
    assert (found.double() - expected).abs().gt(1e-6).double().mean() < 1e-3  # float32 decides a few ties otherwise
    simple = plain(weight, scale).float() * scale
    errors = [(others @ (weight - rounded).T).square().mean().item() for rounded in (found, simple)]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_every_tensor_is_rounded_by_no_more_than_its_precision(either, tmp_path, precision):
    dense, plan = either.dense, either.plan
    cut = Cut(dense, plan)
    pruned = saved(tmp_path / "pruned.safetensors", dense, plan, precision)
    numbers = Plain(pruned.tensors)
    assert numbers.keys() == cut.keys()
    for key, expected in cut.items():
        linear = "_blocks." in key and key.endswith(".weight") and expected.ndim == 2
        eight = precision == "fp8" and linear
        assert pruned.tensors[key].dtype == (FP8 if eight else torch.bfloat16), key
        bound = expected.abs() * 2**-8
        if eight:
            scale, config = pruned.tensors[key.replace(".weight", ".weight_scale")], key.replace(".weight", ".comfy_quant")
            assert (scale.dtype, scale.shape) == (torch.float32, ())
            told = json.loads(bytes(pruned.tensors[config].tolist()))
            assert told.pop("full_precision_matrix_mult", False) == ("mod" in key)
            assert told == {"format": "float8_e4m3fn"}
            bound = (expected.abs() * 2**-4).clamp(min=scale.item() * 2**-10)
        assert ((numbers[key].float() - expected).abs() <= bound * 1.0001).all(), key


def test_layers_of_sizes_that_8_bits_do_not_suit_stay_in_16(recorded, tmp_path):
    widths = recorded.plan.widths
    kept = {"double-img-0": torch.arange(100), "single-0": torch.arange(96)}
    plan = PruningPlan("flux1", recorded.dense.fingerprint, kept, widths, "none", "odd")
    tensors = saved(tmp_path / "pruned.safetensors", recorded.dense, plan, "fp8").tensors
    assert tensors["double_blocks.0.img_mlp.0.weight"].dtype == torch.bfloat16
    assert tensors["double_blocks.0.img_mlp.2.weight"].dtype == torch.bfloat16
    assert "double_blocks.0.img_mlp.0.comfy_quant" not in tensors
    assert tensors["single_blocks.0.linear2.weight"].dtype == FP8


def test_rows_lower_the_error_of_rounding_to_8_bits(tiny_recording, exam, tmp_path):
    """Against plain rounding, of the whole tiny FLUX."""
    dense = Dense.open(CHECKPOINT)
    plan = PruningPlan.keeping_all(dense)
    files = [saved(tmp_path / f"{n}.safetensors", dense, plan, "fp8", r) for n, r in enumerate((None, tiny_recording))]
    errors = [velocity_error(Flux.load(dict(Plain(file.tensors)), torch.float32), exam) for file in files]
    assert errors[1] < errors[0] / 2.5
    assert not list((tiny_recording.cache / "rounding").glob("*"))


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.6), ("fp8", 0.95), ("fp8", 0.6)])
def test_a_file_is_of_the_predicted_size_and_error(tiny_recording, exam, tmp_path, precision, share):
    dense = Dense.open(CHECKPOINT)
    size = share * dense_bytes(dense, precision)
    planned = make_plan(dense, tiny_recording, ByBudget(size=size / 1e9, precision=precision, multiple=16))
    path = tmp_path / "pruned.safetensors"
    pruned = saved(path, dense, planned.plan, precision, tiny_recording)
    assert path.stat().st_size == pytest.approx(size, rel=0.01)
    assert path.stat().st_size == pytest.approx(planned.plan.sizes["file"], rel=0.01)
    measured = velocity_error(Flux.load(dict(Plain(pruned.tensors)), torch.float32), exam)
    certified = pruned.certificate
    for predicted in (planned.plan.velocity_error, certified["predicted"], certified["held_out"]):
        assert predicted is not None
        assert measured / 2 < predicted < measured * 2
    assert (certified["precision"], certified["prompts"]) == (precision, 60)
    assert (certified["rounding"] is not None) == (precision == "fp8")


def test_a_quantised_file_keeps_its_numbers_in_8_bits_and_loses_its_scales_in_16(tmp_path, tensors):
    state = {key: tensor.bfloat16() for key, tensor in tensors("flux1").items()}
    weights = [key for key in state if "_blocks." in key and key.endswith(".weight") and state[key].ndim == 2]
    for key in weights[:-1]:  # one is left as it is
        scale = state[key].float().abs().max() / 448
        state[key] = (state[key].float() / scale).to(FP8)
        state[key.replace(".weight", ".scale_weight")] = scale
    state["scaled_fp8"] = torch.empty(2, dtype=FP8)
    save_file(state, tmp_path / "scaled.safetensors")
    dense = Dense.open(tmp_path / "scaled.safetensors")
    plan = PruningPlan.keeping_all(dense)
    for precision in ("stored", "fp8"):
        found = saved(tmp_path / f"{precision}.safetensors", dense, plan, precision).tensors
        assert all(torch.equal(found[key].view(torch.uint8), state[key].view(torch.uint8)) for key in weights[:-1])
        assert (found[weights[-1]].dtype == FP8) == (precision == "fp8")
    plain = saved(tmp_path / "bf16.safetensors", dense, plan, "bf16").tensors
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert not any("scale_weight" in key or key == "scaled_fp8" for key in plain)
    expected = {key: full_precision(dense.tensors, key).bfloat16() for key in weights}
    assert all(torch.equal(plain[key], tensor) for key, tensor in expected.items())


def test_tensors_that_replace_those_of_a_file_in_8_bits_are_rounded_as_they_were(recorded, tmp_path):
    path, key = tmp_path / "pruned.safetensors", "double_blocks.0.img_mlp.2.weight"
    pruned = saved(path, recorded.dense, recorded.plan, "fp8")
    new = 3 * full_precision(pruned.tensors, key)
    save_changed(tmp_path / "changed.safetensors", path, {key: new}, {})
    found = Pruned.open(tmp_path / "changed.safetensors").tensors
    assert found[key].dtype == FP8
    torch.testing.assert_close(full_precision(found, key), new, rtol=2**-4, atol=1e-3)


def test_prune_saves_as_planned_unless_it_is_told_and_inspect_tells_the_certificate(run, tiny_recording, tmp_path):
    plan, pruned = tmp_path / "plan.safetensors", tmp_path / "pruned.safetensors"
    run("plan", tiny_recording.folder, "--checkpoint", CHECKPOINT, "--neurons", 0.3, "--precision", "fp8", "-o", plan)
    run("prune", plan, "-o", pruned)
    told = run("inspect", pruned)
    assert "saved in precision fp8; relative velocity error predicted" in told
    assert "from 60 prompts" in told
    run("prune", plan, "-o", pruned, "--precision", "stored")
    assert all(tensor.dtype == torch.bfloat16 for tensor in Pruned.open(pruned).tensors.values())
    with pytest.raises(UserError, match="one of the precisions stored, bf16, fp8; found 'fp4'"):
        run("prune", plan, "-o", pruned, "--precision", "fp4")


def test_ranks_of_wide_models_suit_8_bits(tensors):
    small = Dense.of(tensors("flux1"))
    assert rank_multiple(small, 64, "fp8") == rank_multiple(small, 64, "bf16") == 8


def test_a_model_of_fp8_weights_without_scales_keeps_its_numbers(tmp_path, tensors):
    state = {key: tensor.to(FP8) for key, tensor in tensors("flux1").items()}
    save_file(state, tmp_path / "plain.safetensors")
    dense = Dense.open(tmp_path / "plain.safetensors")
    found = saved(tmp_path / "fp8.safetensors", dense, PruningPlan.keeping_all(dense), "fp8").tensors
    key = "single_blocks.0.linear1.weight"
    assert torch.equal(found[key].view(torch.uint8), state[key].view(torch.uint8))
    assert found["single_blocks.0.linear1.weight_scale"] == 1
    assert found["img_in.weight"].dtype == torch.bfloat16


def test_headers_of_files_in_16_bits_name_no_quantised_layers(tmp_path, tensors):
    state = {key: tensor.bfloat16() for key, tensor in tensors("flux1").items()}
    key = "single_blocks.0.linear1.weight"
    state[key], state["single_blocks.0.linear1.weight_scale"] = state[key].to(FP8), torch.tensor(2.0)
    layers = {"layers": {"single_blocks.0.linear1": {"format": "float8_e4m3fn"}}}
    save_file(state, tmp_path / "dense.safetensors", {"_quantization_metadata": json.dumps(layers)})
    dense = Dense.open(tmp_path / "dense.safetensors")
    for precision in ("bf16", "fp8"):
        saved(tmp_path / f"{precision}.safetensors", dense, PruningPlan.keeping_all(dense), precision)
        with safe_open(tmp_path / f"{precision}.safetensors", "pt") as file:
            assert ("_quantization_metadata" in file.metadata()) == (precision == "fp8")
    expected = 2 * state[key].float()
    assert torch.equal(load_file(tmp_path / "bf16.safetensors")[key].float(), expected)


SOUND = {
    "precision": "bf16",
    "predicted": 0.1,
    "held_out": 0.1,
    "rounding": 0.0,
    "prompts": 60,
    "rows": 900,
    "scarcest": "single-3",
}


@pytest.mark.parametrize(
    "told",
    [
        [], 3, None, {"precision": 3}, *({**SOUND, name: "x"} for name in SOUND if name not in ("precision", "scarcest")),
        *({key: value for key, value in SOUND.items() if key != name} for name in ("prompts", "rows", "scarcest")),
        SOUND | {"rows": None}, SOUND | {"predicted": 10**400},
    ],
)  # fmt: skip
def test_a_certificate_that_cannot_be_told_is_damage(told):
    assert certificate_text(read_certificate(json.dumps(SOUND)))
    with pytest.raises(ValueError, match=r"it says|no object"):
        read_certificate(json.dumps(told))


@pytest.mark.parametrize("told", [{"after": "x"}, {"energy": []}, {"before": 10**400}, {"more": 1.0}])
def test_a_report_that_cannot_be_told_is_damage(told):
    assert report_table({"single-3": RepairReport.from_header({"method": "affine", "after": None})})
    with pytest.raises((ValueError, TypeError)):
        RepairReport.from_header({"method": "affine", **told})
