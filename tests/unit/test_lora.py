"""LoRAs for the dense model on a pruned one: against merging into the dense weights first, and cutting with the same repair."""

import re

import pytest
import torch
from flux_poke.flux.weights import SiteWeights
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.lora import convert_lora
from flux_poke.pruning.moments import gather
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.refit import RepairReport, affine, bias, none
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.store import Rows

RANK = 3


def pruned_sites(tensors, family, method):
    """Dense tensors, plan, and every site repaired from random rows."""
    dense = Dense.of(tensors(family, depth=1, depth_single=1))
    generator = torch.Generator().manual_seed(1)
    widths = {site.name: site.width for site in dense.layout.sites}
    kept = {name: torch.randperm(width, generator=generator)[: width // 3].sort().values for name, width in widths.items()}
    plan = PruningPlan(family, dense.fingerprint, kept, widths, "obs", "at random")
    repaired = {}
    for site in dense.layout.sites:
        weights = SiteWeights.read(dense.tensors, site)
        x, attn = torch.randn(2, 700, 128, generator=generator)
        moments = gather(weights, [Rows(x, attn if site.down_column else None, *torch.zeros(3, 700))])
        if method == "affine":
            repaired[site.name] = affine(weights, kept[site.name], moments, 1e-2, fold=True)
        elif method == "bias":
            repaired[site.name] = bias(weights, kept[site.name], moments.mean[moments.attn :])
        else:
            repaired[site.name] = none(weights, kept[site.name])
    return dense, plan, repaired


def factors(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=generator) / 10, torch.randn(RANK, columns, generator=generator) / 10


def delta(lora, module):
    """What ComfyUI would add to `module`'s weight and bias."""
    base = f"diffusion_model.{module}"
    alpha = lora.get(f"{base}.alpha")
    up = lora[f"{base}.lora_up.weight"]
    scale = 1.0 if alpha is None else alpha.item() / up.shape[1]
    return scale * up @ lora[f"{base}.lora_down.weight"], lora.get(f"{base}.diff_b", torch.zeros(()))


def converted(lora, dense, plan, repaired):
    folds = {name: site.fold for name, site in repaired.items()}
    reports = {name: site.report for name, site in repaired.items()}
    return convert_lora(lora, dense.layout, plan, folds, reports, None, dense.tensors)


@pytest.mark.parametrize("method", ["none", "bias", "affine"])
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_a_converted_lora_equals_merging_before_cutting_and_repairing(family, method, tensors):
    dense, plan, repaired = pruned_sites(tensors, family, method)
    for site in dense.layout.sites:
        kept, removed = plan.kept[site.name], plan.removed(site.name)
        fold = repaired[site.name].fold
        up, down = dense.tensors[f"{site.up}.weight"], dense.tensors[f"{site.down}.weight"]
        lora: dict[str, torch.Tensor] = {}
        for module, weight in ((site.up, up), (site.down, down)):
            b, a = factors(*weight.shape)
            lora |= {f"lora_unet_{module.replace('.', '_')}.lora_{n}.weight": t for n, t in (("up", b), ("down", a))}
            lora[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(1.5)
        found = converted(lora, dense, plan, repaired)
        assert [module.outcome for module in found.modules] == ["converted"] * 2

        b, a = factors(*up.shape)
        rows = [*range(site.up_row), *(site.up_row + j for j in kept.tolist())]
        rows += [site.up_row + site.width + j for j in kept.tolist()] if site.gated else []
        torch.testing.assert_close(delta(found.tensors, site.up)[0], (1.5 / RANK * b @ a)[rows])

        b, a = factors(*down.shape)
        merged = down + 1.5 / RANK * b @ a  # repaired with the same regression as the dense weights were
        columns = [*range(site.down_column), *(site.down_column + j for j in kept.tolist())]
        cut = [site.down_column + j for j in removed.tolist()]
        expected = merged[:, columns] + (0 if fold.matrix is None else merged[:, cut] @ fold.matrix)
        weight, moved = delta(found.tensors, site.down)
        torch.testing.assert_close(repaired[site.name].down + weight, expected, rtol=1e-4, atol=1e-4)
        if site.biased:
            shift = 0 if fold.offset is None else merged[:, cut] @ fold.offset
            expected_bias = dense.tensors[f"{site.down}.bias"] + shift
            torch.testing.assert_close(repaired[site.name].bias + moved, expected_bias, rtol=1e-4, atol=1e-4)
        else:
            assert f"diffusion_model.{site.down}.diff_b" not in found.tensors


#: Names of each module after what they have in common.
NAMES = [
    ("double_blocks.0.img_mlp.0", "transformer.transformer_blocks.0.ff.net.0.proj"),
    ("double_blocks.0.img_mlp.0", "lycoris_transformer_blocks_0_ff_net_0_proj"),
    ("double_blocks.0.img_mlp.2", "double_blocks.0.img_mlp.2"),
    ("double_blocks.0.img_mlp.2", "lora_transformer_transformer_blocks_0_ff_net_2"),
    ("double_blocks.0.txt_mlp.0", "diffusion_model.double_blocks.0.txt_mlp.0"),
    ("double_blocks.0.txt_mlp.0", "transformer.transformer_blocks.0.ff_context.linear_in"),
    ("double_blocks.0.txt_mlp.2", "transformer_blocks.0.ff_context.net.2"),
    ("double_blocks.0.txt_mlp.2", "base_model.model.double_blocks.0.txt_mlp.2"),
    ("single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1"),
    ("single_blocks.0.linear1", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
    ("single_blocks.0.linear2", "transformer.single_transformer_blocks.0.proj_out"),
    ("single_blocks.0.linear2", "single_transformer_blocks.0.attn.to_out"),
]


@pytest.mark.parametrize(
    "suffixes", [("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"), ("lora_B", "lora_A")]
)
@pytest.mark.parametrize(("module", "name"), NAMES)
def test_all_names_of_a_module_are_known(module, name, suffixes, tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "none")
    b, a = factors(*dense.tensors[f"{module}.weight"].shape)
    found = converted({f"{name}.{suffixes[0]}": b, f"{name}.{suffixes[1]}": a}, dense, plan, repaired)
    cut = Cut(dense, plan)
    assert delta(found.tensors, module)[0].shape == cut[f"{module}.weight"].shape
    assert [(entry.name, entry.outcome) for entry in found.modules] == [(name, "converted")]


def test_diffusers_mlp_part_of_linear1_leaves_qkv_alone(tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "none")
    b, a = factors(512, 128)
    name = "transformer.single_transformer_blocks.0.proj_mlp"
    found = converted({f"{name}.lora_B.weight": b, f"{name}.lora_A.weight": a}, dense, plan, repaired)
    weight, _ = delta(found.tensors, "single_blocks.0.linear1")
    assert not weight[:384].any()
    torch.testing.assert_close(weight[384:], (b @ a)[plan.kept["single-0"]])


def test_full_differences_and_biases_are_cut_too(tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "affine")
    site = dense.layout.site("double-img-0")
    base_up, base_down = f"diffusion_model.{site.up}", f"diffusion_model.{site.down}"
    lora = {
        f"{base_up}.diff": torch.randn(512, 128),
        f"{base_up}.diff_b": torch.randn(512),
        f"{base_down}.diff": torch.randn(128, 512),
    }
    found = converted(lora, dense, plan, repaired).tensors
    kept, cut, fold = plan.kept[site.name], plan.removed(site.name), repaired[site.name].fold
    assert torch.equal(found[f"{base_up}.diff"], lora[f"{base_up}.diff"][kept])
    assert torch.equal(found[f"{base_up}.diff_b"], lora[f"{base_up}.diff_b"][kept])
    wide = lora[f"{base_down}.diff"]
    torch.testing.assert_close(found[f"{base_down}.diff"], wide[:, kept] + wide[:, cut] @ fold.matrix)
    torch.testing.assert_close(found[f"{base_down}.diff_b"], wide[:, cut] @ fold.offset)


@pytest.mark.parametrize("suffix", ["hada_w1_a", "lokr_w1", "dora_scale", "set_weight"])
def test_what_cannot_follow_a_cut_is_skipped_and_said(suffix, tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "none")
    name = "lora_unet_double_blocks_0_img_mlp_0"
    found = converted({f"{name}.{suffix}": torch.zeros(3, 3)}, dense, plan, repaired)
    assert found.tensors == {}
    assert found.modules[0].outcome == "skipped"
    assert re.search(rf"skipped +{name}: .*merge it into the dense model before pruning", found.table())


def test_modules_that_were_not_cut_pass_unchanged(tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "affine")
    lora = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(384, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 128),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 128),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(()),
        "something else": torch.ones(1),
    }
    found = converted(lora, dense, plan, repaired)
    assert found.tensors == lora
    assert {module.outcome for module in found.modules} == {"applied"}


def test_a_lora_of_another_width_is_skipped(tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "none")
    b, a = factors(100, 128)
    name = "diffusion_model.double_blocks.0.txt_mlp.0"
    found = converted({f"{name}.lora_B.weight": b, f"{name}.lora_A.weight": a}, dense, plan, repaired)
    assert found.modules[0].why.startswith("it has 100 rows where the dense model has 512")


def test_without_the_fold_it_is_said_that_a_part_is_lost(tensors):
    dense, plan, repaired = pruned_sites(tensors, "flux1", "bias")
    report = dict.fromkeys(plan.kept, RepairReport("affine"))
    b, a = factors(128, 512)
    name = "diffusion_model.double_blocks.0.txt_mlp.2"
    lora = {f"{name}.lora_B.weight": b, f"{name}.lora_A.weight": a}
    folds = {name: site.fold for name, site in repaired.items()}
    found = convert_lora(lora, dense.layout, plan, folds, report, None, dense.tensors)
    assert "without its fold" in found.modules[0].why
