"""flux/layout.py: what is read from key names and shapes."""

from typing import Any

import pytest
from flux_poke.errors import UserError
from flux_poke.flux.layout import Layout, Site, canonical_key, read_layout
from flux_poke.flux.model import Flux


def test_flux1_dev_has_the_published_sizes(shapes):
    layout = read_layout(shapes("flux1", hidden=3072, depth=19, depth_single=38, context=4096, vector=768, guidance=True))
    assert (layout.family, layout.hidden, layout.depth, layout.depth_single) == ("flux1", 3072, 19, 38)
    assert (layout.in_channels, layout.out_channels, layout.context, layout.vector) == (64, 64, 4096, 768)
    assert (layout.guidance, layout.heads, layout.patch, layout.theta, layout.axes) == (True, 24, 2, 10_000, (16, 56, 56))
    doubles = [site for site in layout.sites if site.stream != "single"]
    assert (len(doubles), sum(site.width for site in doubles)) == (38, 466_944)
    assert layout.neurons == 2 * 466_944
    assert layout.site("double-txt-18") == Site(
        "double-txt-18", "txt", 18, "double_blocks.18.txt_mlp.0", "double_blocks.18.txt_mlp.1", "double_blocks.18.txt_mlp.2",
        up_row=0, down_column=0, width=12_288, gated=False, biased=True,
    )  # fmt: skip
    assert layout.site("single-37") == Site(
        "single-37", "single", 37, "single_blocks.37.linear1", "single_blocks.37.mlp_act", "single_blocks.37.linear2",
        up_row=9_216, down_column=3_072, width=12_288, gated=False, biased=True,
    )  # fmt: skip
    assert layout.site("double-img-3").block == "double_blocks.3"
    assert layout.site("single-3").block == "single_blocks.3"


def test_flux2_klein_is_gated_and_has_no_biases(shapes):
    layout = read_layout(shapes("flux2", hidden=3072, depth=5, depth_single=20, context=7680))
    assert (layout.family, layout.vector, layout.guidance, layout.context) == ("flux2", None, False, 7680)
    assert (layout.heads, layout.patch, layout.theta, layout.axes) == (24, 1, 2_000, (32, 32, 32, 32))
    assert {(site.width, site.gated, site.biased) for site in layout.sites} == {(9_216, True, False)}
    assert layout.site("single-19").up_row == 9_216


def test_chroma_is_known_by_its_guidance_layer(shapes):
    layout = read_layout(shapes("chroma"))
    assert (layout.family, layout.vector, layout.guidance) == ("chroma", None, False)
    assert [site.name for site in layout.sites] == [
        "double-img-0", "double-txt-0", "double-img-1", "double-txt-1", "single-0", "single-1",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["flux1", "flux2", "chroma"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_a_prefix_and_keys_of_other_parts_change_nothing_else(shapes, family, prefix):
    plain = read_layout(shapes(family))
    others = {"vae.decoder.conv_in.weight": (512, 16, 3, 3), "text_encoders.t5xxl.shared.weight": (32_128, 4_096)}
    whole = read_layout({**others, **{prefix + key: shape for key, shape in shapes(family).items()}})
    assert whole == Layout(**{**vars(plain), "prefix": prefix})


def test_norms_are_known_by_both_names(shapes):
    assert (
        canonical_key("p.double_blocks.0.img_attn.norm.query_norm.weight", "p.")
        == "double_blocks.0.img_attn.norm.query_norm.scale"
    )
    assert canonical_key("single_blocks.1.norm.key_norm.scale") == "single_blocks.1.norm.key_norm.scale"
    assert canonical_key("img_in.weight") == "img_in.weight"
    renamed = {key.replace("_norm.scale", "_norm.weight"): shape for key, shape in shapes("flux2").items()}
    assert read_layout(renamed) == read_layout(shapes("flux2"))


def test_widths_of_a_pruned_checkpoint_are_those_of_its_tensors(shapes):
    pruned = shapes("flux1") | {
        "double_blocks.1.txt_mlp.0.weight": (7, 128), "double_blocks.1.txt_mlp.2.weight": (128, 7),
        "single_blocks.0.linear1.weight": (3 * 128 + 100, 128), "single_blocks.0.linear2.weight": (128, 128 + 100),
    }  # fmt: skip
    layout = read_layout(pruned)
    widths = {site.name: site.width for site in layout.sites}
    assert widths == {
        "double-img-0": 512, "double-txt-0": 512, "double-img-1": 512, "double-txt-1": 7, "single-0": 100, "single-1": 512,
    }  # fmt: skip
    assert not any(site.gated for site in layout.sites)
    gated = shapes("flux2") | {
        "double_blocks.0.img_mlp.0.weight": (2 * 9, 128), "double_blocks.0.img_mlp.2.weight": (128, 9),
    }  # fmt: skip
    assert (read_layout(gated).site("double-img-0").width, read_layout(gated).site("double-img-0").gated) == (9, True)


def test_block_numbers_are_counted_and_not_sorted_as_text(shapes):
    layout = read_layout(shapes("flux1", depth=3, depth_single=12))
    assert [site.index for site in layout.sites if site.stream == "single"] == list(range(12))


def without(shapes, *parts):
    return {key: shape for key, shape in shapes.items() if not any(part in key for part in parts)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {}, r"flux.safetensors is not a FLUX checkpoint: .*double_blocks.0.img_attn.qkv.weight, found 0 others"),
        (lambda s: {"model.layers.0.mlp.weight": (2, 2)}, r"not a FLUX checkpoint: .*model.layers.0.mlp.weight"),
        (lambda s: {"transformer_blocks.0.attn.to_q.weight": (2, 2)}, "diffusers layout"),
        (lambda s: without(s, "txt_in"), "has no p.txt_in.weight: the file is incomplete"),
        (lambda s: without(s, "final_layer"), "has no p.final_layer.linear.weight"),
        (lambda s: without(s, "double_blocks.1.img_mlp.2"), "has no p.double_blocks.1.img_mlp.2.weight"),
        (lambda s: without(s, "single_blocks.0."), "has no p.single_blocks.0.linear1.weight"),
        (lambda s: s | {"p.double_blocks.0.img_mlp.0.weight": (512 * 64, 1)}, "p?.*Packed 4-bit weights"),
        (lambda s: s | {"p.double_blocks.0.img_mlp.2.weight": (128 * 512,)}, r"shape \(65536,\).*expected a matrix"),
        (lambda s: s | {"p.txt_in.weight": (4096,)}, r"p.txt_in.weight.*shape \(4096,\).*expected a matrix"),
        (lambda s: s | {"p.double_blocks.0.img_mlp.gate_proj.weight": (512, 128)}, "three projections"),
    ],
)
def test_what_is_no_whole_flux_is_named_in_one_sentence(shapes, change, sentence):
    prefixed = {f"p.{key}": shape for key, shape in shapes("flux1").items()}
    with pytest.raises(UserError, match=sentence) as raised:
        read_layout(change(prefixed), source="flux.safetensors")
    assert str(raised.value).startswith("flux.safetensors")


def test_a_site_that_is_not_there_is_named_with_those_that_are(shapes):
    with pytest.raises(
        UserError, match=r"no MLP called 'double-img-2'; it has double-img-0 to double-txt-1 and single-0 to single-1"
    ):
        read_layout(shapes("flux1")).site("double-img-2")


@pytest.mark.parametrize("family", ["flux1", "flux2", "chroma"])
def test_a_layout_made_of_sizes_is_that_of_a_checkpoint(shapes, family):
    sizes: dict[str, Any] = {"hidden": 256, "depth": 3, "depth_single": 5, "context": 40}
    assert Layout.of(family, vector=24, **sizes) == read_layout(shapes(family, **sizes))


def test_a_layout_of_other_ratio_and_channels_is_that_of_the_model_made_from_it():
    layout = Layout.of("flux1", 128, 1, 2, context=8, vector=8, guidance=True, ratio=2, channels=16)
    assert read_layout({key: value.shape for key, value in Flux(layout).state_dict().items()}) == layout


def test_chromas_norms_have_the_names_of_its_file():
    """ComfyUI calls them `.weight`."""
    name = "distilled_guidance_layer.norms.3"
    assert canonical_key(f"m.{name}.weight", "m.") == canonical_key(f"{name}.scale") == f"{name}.scale"
    assert canonical_key("distilled_guidance_layer.in_proj.weight") == "distilled_guidance_layer.in_proj.weight"
