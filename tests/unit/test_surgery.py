"""Cutting: without repair, outputs equal the dense model's with the cut columns zeroed; and what a file keeps of it."""
# mypy: disable-error-code="union-attr, index"

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.flux.model import Flux
from flux_poke.pruning.checkpoint import Pruned, inspect, save_changed, save_pruned, save_weights
from flux_poke.pruning.dense import KEPT, Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.refit import RepairReport
from flux_poke.pruning.surgery import Cut
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F


def random_plan(dense: Dense, share: float = 0.5, seed: int = 0) -> PruningPlan:
    """Another share of every site, chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for number, site in enumerate(dense.layout.sites):
        count = max(1, int(site.width * share) - 10 * number)
        kept[site.name] = torch.randperm(site.width, generator=generator)[:count].sort().values
    widths = {site.name: site.width for site in dense.layout.sites}
    return PruningPlan(dense.layout.family, dense.fingerprint, kept, widths, "magnitude", "at random")


def zeroed(dense: Dense, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The dense tensors with the columns of cut neurons at zero."""
    tensors = {key: tensor.clone() for key, tensor in dense.tensors.items()}
    for site in dense.layout.sites:
        tensors[f"{site.down}.weight"][:, site.down_column + plan.removed(site.name)] = 0
    return tensors


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_without_repair_the_output_is_the_dense_ones_with_cut_columns_at_zero(family, tensors, inputs):
    dense = Dense.of(tensors(family))
    plan = random_plan(dense)
    cut, expected = Flux.load(Cut(dense, plan)), Flux.load(zeroed(dense, plan))
    given = inputs(expected)
    with torch.no_grad():
        torch.testing.assert_close(cut(**given), expected(**given), rtol=1e-4, atol=1e-4)
    assert cut.double_blocks[0].img_mlp[2].in_features == 512 * (3 if family == "flux2" else 4) // 8


def test_chromas_mlps_compute_the_same_with_cut_columns_at_zero(tensors):
    """State-dict level: each MLP by itself."""
    dense = Dense.of(tensors("chroma"))
    assert dense.layout.family == "chroma"
    plan = random_plan(dense)
    cut, expected = dict(Cut(dense, plan)), zeroed(dense, plan)
    x, attention = torch.randn(2, 9, 128)

    def output(state, site):
        up = F.linear(x, state[f"{site.up}.weight"], state[f"{site.up}.bias"])[:, site.up_row :]
        read = F.gelu(up, approximate="tanh")
        if site.stream == "single":
            read = torch.cat((attention, read), dim=1)
        return F.linear(read, state[f"{site.down}.weight"], state[f"{site.down}.bias"])

    for site in dense.layout.sites:
        torch.testing.assert_close(output(cut, site), output(expected, site), rtol=1e-4, atol=1e-4)
        if site.stream == "single":  # q, k and v are as they were
            assert torch.equal(cut[f"{site.up}.weight"][: site.up_row], dense.tensors[f"{site.up}.weight"][: site.up_row])


@pytest.mark.parametrize("family", ["flux1", "flux2", "chroma"])
def test_a_saved_checkpoint_holds_the_cut_tensors_and_tells_what_was_done(family, tensors, tmp_path):
    state = {f"model.diffusion_model.{key}": tensor.bfloat16() for key, tensor in tensors(family).items()}
    save_file(state, tmp_path / "dense.safetensors", {"modelspec.title": "kept"})
    dense = Dense.open(tmp_path / "dense.safetensors")
    plan = random_plan(dense)
    cut = Cut(dense, plan)
    save_pruned(tmp_path / "pruned.safetensors", cut)
    stored = load_file(tmp_path / "pruned.safetensors")
    for key in cut:
        assert torch.equal(stored[key], cut[key])
        assert stored[key].dtype == torch.bfloat16
    for name, kept in plan.kept.items():
        assert stored[f"flux_poke.kept.{name}"].dtype == torch.int32
        assert stored[f"flux_poke.kept.{name}"].tolist() == kept.tolist()
    pruned = Pruned.open(tmp_path / "pruned.safetensors")
    assert set(pruned.tensors) == set(dense.tensors)
    assert pruned.plan.digest == plan.digest
    assert pruned.metadata["modelspec.title"] == "kept"
    assert [site.width for site in pruned.layout.sites] == [len(plan.kept[site.name]) for site in pruned.layout.sites]
    text = inspect(tmp_path / "pruned.safetensors")
    assert "pruned" in text
    assert f"{plan.neurons[0]:,} of {plan.neurons[1]:,} neurons kept" in text
    assert "pruned" not in inspect(tmp_path / "dense.safetensors")


def test_a_cancelled_save_leaves_the_old_file(tensors, tmp_path):
    dense = Dense.of(tensors("flux1"))
    path = tmp_path / "pruned.safetensors"
    save_pruned(path, Cut(dense, random_plan(dense)))
    before = path.read_bytes()

    def cancel(what, done, total):
        if what.startswith("writing") and done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pruned(path, Cut(dense, random_plan(dense, 0.25)), progress=cancel)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["pruned.safetensors"]


def scaled_fp8(tensors, by_row: bool, naming: str) -> dict[str, torch.Tensor]:
    """As scaled fp8 files are: the blocks' weights in e4m3 with a float32 scale for the tensor or for each row."""
    state = dict(tensors)
    for key, weight in tensors.items():
        if key.endswith(".weight") and "_blocks." in key:
            layer = key.removesuffix(".weight")
            scale = weight.abs().amax(1, keepdim=True) / 448 if by_row else weight.abs().max() / 448
            state[key] = (weight / scale).to(torch.float8_e4m3fn)
            state[f"{layer}.{naming}"] = scale
            if naming == "weight_scale":
                config = json.dumps({"format": "float8_e4m3fn"}).encode()
                state[f"{layer}.comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
    return state


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("naming", ["scale_weight", "weight_scale"])
def test_quantised_weights_are_cut_as_they_are_stored(by_row, naming, tensors, tmp_path):
    full = tensors("flux1")
    state = scaled_fp8(full, by_row, naming)
    save_file(state, tmp_path / "fp8.safetensors")
    dense = Dense.open(tmp_path / "fp8.safetensors")
    assert dense.fingerprint.matches(Dense.of(full).fingerprint)
    plan = random_plan(dense)
    save_pruned(tmp_path / "pruned.safetensors", Cut(dense, plan))
    cut = Checkpoint(tmp_path / "pruned.safetensors")

    def whole(state, key):
        scale = state[f"{key.removesuffix('.weight')}.{naming}"]
        return state[key].float() * scale

    for site in dense.layout.sites:
        kept = plan.kept[site.name]
        rows = torch.cat((torch.arange(site.up_row), site.up_row + kept))
        columns = torch.cat((torch.arange(site.down_column), site.down_column + kept))
        assert torch.equal(whole(cut, f"{site.up}.weight"), whole(state, f"{site.up}.weight")[rows])
        assert torch.equal(whole(cut, f"{site.down}.weight"), whole(state, f"{site.down}.weight")[:, columns])
        assert cut[f"{site.down}.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("config", "scale"),
    [({"format": "nvfp4"}, (4, 8)), ({"format": "mxfp8"}, (4, 8)), ({"format": "int8_tensorwise", "convrot": True}, ())],
)
def test_weights_quantised_in_blocks_are_refused(config, scale, tensors):
    state = tensors("flux1")
    layer = "double_blocks.1.txt_mlp.2"
    dense = Dense.of(state)
    state[f"{layer}.weight_scale"] = torch.ones(scale)
    state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    with pytest.raises(UserError, match=r"double_blocks.1.txt_mlp.2.weight is quantised as .* Use a bf16, fp16 or fp8 file"):
        Cut(Dense.of(state), random_plan(dense))


def test_a_plan_of_another_model_is_refused(tensors):
    plan = random_plan(Dense.of(tensors("flux1")))
    with pytest.raises(UserError, match=r"plan was made for another model than other.safetensors"):
        Cut(Dense.of(tensors("flux1", seed=4), "other.safetensors"), plan)


def test_a_pruned_checkpoint_is_not_pruned_again_and_a_dense_one_is_not_taken_for_one(tensors, tmp_path):
    dense = Dense.of(tensors("flux1"))
    save_pruned(tmp_path / "pruned.safetensors", Cut(dense, random_plan(dense)))
    with pytest.raises(UserError, match="is pruned already"):
        Dense.open(tmp_path / "pruned.safetensors")
    save_file(dict(dense.tensors), tmp_path / "dense.safetensors")
    with pytest.raises(UserError, match="is not a pruned checkpoint"):
        Pruned.open(tmp_path / "dense.safetensors")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_writing_a_pruned_checkpoint_takes_memory_for_a_few_tensors_and_not_for_the_model(tensors, tmp_path):
    def mapped() -> int:
        """Bytes of files in this process's memory."""
        return 1024 * int(re.findall(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    path = tmp_path / "dense.safetensors"
    save_file(tensors("flux1", hidden=384, depth=1, depth_single=4), path)
    before, seen = mapped(), []
    dense = Dense.open(path)
    save_pruned(tmp_path / "pruned.safetensors", Cut(dense, random_plan(dense)), progress=lambda *_: seen.append(mapped()))
    assert max(seen) - before < path.stat().st_size / 4


def test_tensors_that_are_pruned_already_are_written_as_a_checkpoint_that_needs_no_other(tensors, tmp_path):
    """Those of a model in memory with something merged into it, say a LoRA."""
    dense = Dense.of(tensors("flux1"))
    plan = replace(random_plan(dense), checkpoint="/home/somebody/dense.safetensors", recording="/home/somebody/portraits")
    merged = {key: tensor * 1.5 for key, tensor in Cut(dense, plan).items()}
    report = {name: RepairReport("bias", after=0.25) for name in plan.kept}
    save_weights(tmp_path / "merged.safetensors", merged, plan, report, metadata={"made by": "somebody"})
    found = Pruned.open(tmp_path / "merged.safetensors")
    assert found.plan.digest == plan.digest
    assert dict(found.report) == report
    assert found.metadata["made by"] == "somebody"
    assert found.tensors.keys() == merged.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in merged.items())
    Flux.load(found.tensors)
    assert (found.plan.checkpoint, found.plan.recording) == ("dense.safetensors", "portraits")
    assert "/home" not in str(found.metadata)

    changed = {"img_in.bias": torch.ones(128)}
    save_changed(tmp_path / "changed.safetensors", tmp_path / "merged.safetensors", changed, {})
    again = Pruned.open(tmp_path / "changed.safetensors")
    assert torch.equal(again.tensors["img_in.bias"], changed["img_in.bias"])
    assert again.report == found.report
    with pytest.raises(UserError, match="another model"):
        save_changed(tmp_path / "changed.safetensors", tmp_path / "merged.safetensors", {"img_im.bias": torch.ones(1)}, {})


def test_what_does_not_belong_together_or_is_not_finite_is_not_written(tensors, tmp_path):
    dense, path = Dense.of(tensors("flux1")), tmp_path / "out.safetensors"
    plan, other = random_plan(dense), random_plan(dense, 0.25)
    cut = dict(Cut(dense, plan))
    report = {name: RepairReport("none") for name in plan.kept}
    with pytest.raises(UserError, match=r"its plan leaves .* they do not belong together"):
        save_weights(path, cut, other, report)
    for number in (float("nan"), float("inf")):
        cut["single_blocks.1.linear2.bias"] = torch.full((128,), number)
        with pytest.raises(UserError, match=r"single_blocks.1.linear2.bias holds numbers that are not finite"):
            save_weights(path, cut, plan, report)
    broken = Dense.of({**dense.tensors, "img_in.bias": torch.full((128,), float("nan"))})
    with pytest.raises(UserError, match=r"img_in.bias holds numbers that are not finite"):
        save_pruned(path, Cut(broken, replace(plan, fingerprint=broken.fingerprint)))
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda kept: kept * 0, "damaged pruned checkpoint"),
        (lambda kept: kept + 500, "damaged pruned checkpoint"),
        (lambda kept: kept[:0], "damaged pruned checkpoint"),
        (lambda kept: kept[:-1], "do not belong together"),
    ],
)
def test_kept_indices_that_cannot_be_are_refused_in_a_pruned_checkpoint(tensors, tmp_path, change, said):
    dense, path = Dense.of(tensors("flux1")), tmp_path / "pruned.safetensors"
    save_pruned(path, Cut(dense, random_plan(dense)))
    whole, name = {key: tensor.clone() for key, tensor in load_file(path).items()}, f"{KEPT}single-0"
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    save_file({**whole, name: change(whole[name]).contiguous()}, tmp_path / "other.safetensors", header)
    with pytest.raises(UserError, match=said):
        Pruned.open(tmp_path / "other.safetensors")
