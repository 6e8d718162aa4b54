"""Block taps on ComfyUI's own transformer: its blocks work in place, cut text off and append reference tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from flux_poke.analysis.taps import BlockTaps, Tap, TapRecorder
from flux_poke.flux.blocks import blocks_of, choose_blocks
from flux_poke.flux.layout import read_layout
from flux_poke.recording.call import Call

SIZES = {
    "context_in_dim": 32,
    "hidden_size": 128,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 3,
    "guidance_embed": False,
}
FLUX1 = SIZES | {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "axes_dim": [16, 56, 56], "theta": 10_000, "patch_size": 2,
    "qkv_bias": True, "mlp_ratio": 4.0, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = SIZES | {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [32] * 4, "theta": 2_000, "patch_size": 1,
    "qkv_bias": False, "mlp_ratio": 3.0, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True,
    "ops_bias": False,
}  # fmt: skip
WORDS = 5


@pytest.fixture
def comfy_flux(in_process):
    """ComfyUI's class, on the CPU."""
    import comfy.ldm.flux.model
    import comfy.ops

    def build(**config):
        model = comfy.ldm.flux.model.Flux(dtype=torch.float32, operations=comfy.ops.manual_cast, **config)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return model.eval().requires_grad_(False)

    return build


@pytest.mark.parametrize("images", [(None, 0, None), (None, 0, 1), (0, None, 1)], ids=["one", "last two", "apart"])
@pytest.mark.parametrize(
    ("config", "references", "method"),
    [(FLUX1, 0, None), (FLUX1, 2, "offset"), (FLUX2, 0, None), (FLUX2, 1, "index"), (FLUX2, 2, "index_timestep_zero")],
    ids=["flux1", "flux1-references", "flux2", "flux2-reference", "flux2-references-clean"],
)
@torch.inference_mode()
def test_every_block_goes_through_the_hosts_final_layer(comfy_flux, config, references, method, images):
    """Against the final layer on all rows and all tokens of what each block gave; latents are no whole patches for FLUX.1."""
    model = comfy_flux(**config)
    layout = read_layout({key: tensor.shape for key, tensor in model.state_dict().items()})
    channels, (height, width) = config["in_channels"], (7, 6)
    x, sigma = torch.randn(3, channels, height, width), torch.full((3,), 0.5)
    given: dict[str, Any] = {"context": torch.randn(3, WORDS, 32), "y": torch.randn(3, 64) if config is FLUX1 else None}
    if references:
        sizes = ((4, 4), (6, 2))[:references]
        given |= {"ref_latents": [torch.randn(3, channels, *size) for size in sizes], "ref_latents_method": method}
    plain = model(x, sigma, **given)

    states, final = [], []
    for block in model.double_blocks:
        block.register_forward_hook(lambda _, __, out: states.append(out[0].clone()))
    for block in model.single_blocks:
        block.register_forward_hook(lambda _, __, out: states.append(out[:, WORDS:].clone()))
    model.final_layer.register_forward_hook(lambda _, args, named, out: final.append((args[1:], named)), with_kwargs=True)
    rows = [row for row, image in enumerate(images) if image is not None]
    taps, recorder = BlockTaps(), TapRecorder(layout, choose_blocks("all", layout))
    with recorder.watching(model, Call.at(x, sigma, torch.tensor([0.5, 0.0]), images=images), taps):
        out = model(x, sigma, **given)

    assert torch.equal(out, plain)
    assert torch.equal(taps.latent(Tap(0, blocks_of(layout)[-1])), (x - 0.5 * out)[rows])
    assert len(taps) == len(states) == 5
    patch = layout.patch
    h, w = -(-height // patch), -(-width // patch)
    (args, named), *_ = final
    for tap, state in zip(taps, states, strict=True):
        velocity = model.final_layer.forward(state, *args, **named)[:, : h * w]
        velocity = rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=patch, q=patch)[..., :height, :width]
        torch.testing.assert_close(taps.latent(tap), (x - 0.5 * velocity)[rows], rtol=1e-5, atol=1e-5)
