"""flux/model.py equals ComfyUI's own transformer on the same weights."""

import pytest
import torch
from flux_poke.flux.model import Flux

FLUX1 = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "axes_dim": [16, 56, 56], "theta": 10_000, "patch_size": 2,
    "qkv_bias": True, "mlp_ratio": 4.0, "txt_ids_dims": [], "guidance_embed": False,
}  # fmt: skip
FLUX2 = {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [32] * 4, "theta": 2_000, "patch_size": 1,
    "qkv_bias": False, "mlp_ratio": 3.0, "txt_ids_dims": [3], "guidance_embed": False, "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip


@pytest.fixture
def comfy_flux(in_process):
    """ComfyUI's class."""
    import comfy.ldm.flux.model
    import comfy.ops

    def build(**config):
        return comfy.ldm.flux.model.Flux(dtype=torch.float32, operations=comfy.ops.manual_cast, **config)

    return build


@pytest.mark.parametrize(
    ("family", "references"),
    [(FLUX1, 0), (FLUX1 | {"guidance_embed": True}, 0), (FLUX2, 0), (FLUX2 | {"guidance_embed": True}, 0), (FLUX2, 2)],
    ids=["flux1", "flux1-guidance", "flux2", "flux2-guidance", "flux2-references"],
)
@torch.no_grad()
def test_the_velocity_equals_that_of_the_host(comfy_flux, family, references):
    sizes = {"context_in_dim": 64, "hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 3}
    host = comfy_flux(**sizes, **family)
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(tensor.shape, generator=generator) * 0.08 + (1 if "norm" in key else 0)
        for key, tensor in host.state_dict().items()
    }
    host.load_state_dict(weights)
    ours = Flux.load({f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()})

    x = torch.randn(2, family["in_channels"], 8, 12, generator=generator)
    sigma, guidance = torch.tensor([0.3, 0.9]), torch.tensor([3.5, 2.0])
    context = torch.randn(2, 7, 64, generator=generator)
    vector = torch.randn(2, 64, generator=generator) if family["vec_in_dim"] else None
    pictures = [torch.randn(2, family["in_channels"], 8 + 2 * n, 6, generator=generator) for n in range(references)]
    expected = host(x, sigma, context, vector, guidance if family["guidance_embed"] else None, pictures or None)
    assert expected.abs().max() > 0.1
    error = (ours(x, sigma, context, vector, guidance, pictures) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    if pictures:
        assert (ours(x, sigma, context, vector, guidance, pictures[::-1]) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=["flux1", "flux2"])
@torch.no_grad()
def test_the_velocity_of_an_edit_equals_that_of_the_host(comfy_flux, family):
    """Its reference pictures are of several sizes and shapes."""
    host = comfy_flux(context_in_dim=64, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, **family)
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(tensor.shape, generator=generator) * 0.08 + (1 if "norm" in key else 0)
        for key, tensor in host.state_dict().items()
    }
    host.load_state_dict(weights)
    ours = Flux.load(weights)
    sides = [(8, 12), (8, 8), (4, 12), (12, 4)]
    x, *references = (torch.randn(2, family["in_channels"], *side, generator=generator) for side in sides)
    sigma, context = torch.tensor([0.3, 0.9]), torch.randn(2, 7, 64, generator=generator)
    vector = torch.randn(2, 64, generator=generator) if family["vec_in_dim"] else None
    expected = host(x, sigma, context, vector, ref_latents=references)
    found = ours(x, sigma, context, vector, references=references)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (ours(x, sigma, context, vector) - expected).abs().max() > 1e-2 * expected.abs().max()
