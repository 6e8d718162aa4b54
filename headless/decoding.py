"""Decoding latents with an autoencoder that ComfyUI has.

decode = server_decoder(client, "ae.safetensors")
images = decode(latent_format(checkpoint)(latents))  # [batch, 3, height, width] in 0..1
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..analysis.decoding import Decode
from ..errors import UserError
from ..flux.autoencoder import LATENT_SCALE, LATENT_SHIFT
from ..flux.checkpoint import Checkpoint
from .client import ComfyClient
from .families import node


def latent_format(checkpoint: Path) -> Callable[[Tensor], Tensor]:
    """From a model's latents to its autoencoder's, as ComfyUI does it: FLUX.1's have another scale, FLUX.2's the same."""
    if Checkpoint(checkpoint).layout.family == "flux2":
        return lambda latents: latents
    return lambda latents: latents / LATENT_SCALE + LATENT_SHIFT


def server_decoder(client: ComfyClient, vae: str) -> Decode:
    """Images by the autoencoder that the server has under this name; raises `UserError` where it has none."""
    there = client.models("vae")
    if vae not in there:
        raise UserError(f"ComfyUI has no {vae} in models/vae: found {', '.join(there) or 'none'}.")

    def decode(latents: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory(prefix="flux_poke_decode_") as folder:
            path = Path(folder) / f"flux_poke_{uuid.uuid4().hex}.latent"
            save_file({"latent_tensor": latents.float().contiguous(), "latent_format_version_0": torch.zeros(0)}, path)
            name = client.upload(path)
        graph = {
            "vae": node("VAELoader", vae_name=vae),
            "latents": node("LoadLatent", latent=name),
            "decode": node("VAEDecode", samples=["latents", 0], vae=["vae", 0]),
            "pictures": node("PreviewImage", images=["decode", 0]),
        }
        files = client.run(graph).files("images", "pictures")
        pictures = [np.array(client.picture(file)) for file in files]
        return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255

    return decode
