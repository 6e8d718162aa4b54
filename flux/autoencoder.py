"""The tiny autoencoder: TAESD's shape with 16 latent channels (madebyollin/taesd), as ComfyUI's VAELoader reads it.

    autoencoder = Autoencoder.load(tensors)
    latents = autoencoder.encode(images)             # [batch, 3, 8h, 8w] in 0..1 to [batch, 16, h, w], about unit variance
    images = autoencoder.decode(latents)

In the file, `vae_scale` and `vae_shift` undo the affine map by which a host brings FLUX latents to unit variance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: FLUX.1's latent format: unit-variance latents are (latents - shift) * scale.
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159
CHANNELS = 16


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder = nn.Sequential(
            conv(3, 64), Block(),
            conv(64, 64, stride=2, bias=False), Block(), Block(), Block(),
            conv(64, 64, stride=2, bias=False), Block(), Block(), Block(),
            conv(64, 64, stride=2, bias=False), Block(), Block(), Block(),
            conv(64, CHANNELS),
        )  # fmt: skip
        self.taesd_decoder = nn.Sequential(
            Clamp(), conv(CHANNELS, 64), nn.ReLU(),
            Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False),
            Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False),
            Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False),
            Block(), conv(64, 3),
        )  # fmt: skip
        self.register_buffer("vae_scale", torch.tensor(LATENT_SCALE))
        self.register_buffer("vae_shift", torch.tensor(LATENT_SHIFT))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor]) -> Autoencoder:
        """An autoencoder in float32 with the given weights, in whatever precision they are stored."""
        model = cls()
        model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        # Convolutions on a CPU take half the time in this order.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.eval().requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        return self.taesd_encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in 0..1 (clamped)."""
        return self.taesd_decoder(latents).clamp(0, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)
