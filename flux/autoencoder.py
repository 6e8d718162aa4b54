"""What is between pictures and latents of a FLUX of the tiny kind: a small autoencoder, or in pixel space none.

    autoencoder = load_autoencoder(tensors, metadata)
    latents = autoencoder.encode(images)             # [batch, 3, side, side] in 0..1 to [batch, *latent_shape]
    images = autoencoder.decode(latents)

`Autoencoder` has TAESD's shape (madebyollin/taesd), as ComfyUI's VAELoader reads it. FLUX.1's has 16 channels, and in its file
`vae_scale` and `vae_shift` undo the affine map by which a host brings FLUX.1's latents to unit variance. FLUX.2's (TAEF2) has
32, of which 2x2 make one pixel of 128 channels: images are [batch, 3, 16h, 16w], and a host takes its latents as they are.
`Pixels` gives squares of pixels as they are; ComfyUI has nothing like it. The header of a file names the side of the pictures
that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm
from torch.nn import functional as F

#: FLUX.1's latent format: unit-variance latents are (latents - shift) * scale.
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159
#: Pixels along a picture of the models that ship, whose files do not say.
SIDE = 64


class Autoencoder(nn.Module):
    """For pictures of `side` pixels along."""

    def __init__(self, family: Literal["flux1", "flux2"] = "flux1", side: int = SIDE) -> None:
        super().__init__()
        self.side = side
        self.patch, self.channels = (2, 32) if family == "flux2" else (1, 16)
        pooled, channels = family == "flux2", self.channels
        self.taesd_encoder = nn.Sequential(
            conv(3, 64), Block(),
            conv(64, 64, stride=2, bias=False), Block(), Block(), Block(),
            conv(64, 64, stride=2, bias=False), Block(), Block(), Block(),
            conv(64, 64, stride=2, bias=False), Block(pooled), Block(pooled), Block(pooled),
            conv(64, channels),
        )  # fmt: skip
        self.taesd_decoder = nn.Sequential(
            Clamp(), conv(channels, 64), nn.ReLU(),
            Block(pooled), Block(pooled), Block(pooled), nn.Upsample(scale_factor=2), conv(64, 64, bias=False),
            Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False),
            Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False),
            Block(), conv(64, 3),
        )  # fmt: skip
        if family == "flux1":
            self.register_buffer("vae_scale", torch.tensor(LATENT_SCALE))
            self.register_buffer("vae_shift", torch.tensor(LATENT_SHIFT))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], side: int = SIDE) -> Autoencoder:
        """An autoencoder in float32 with the given weights, in whatever precision they are stored."""
        model = cls("flux2" if tensors["taesd_decoder.1.weight"].shape[1] == 32 else "flux1", side)
        model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        # Convolutions on a CPU take half the time in this order.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.eval().requires_grad_(False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""
        along = self.side // 8 // self.patch
        return self.channels * self.patch**2, along, along

    def encode(self, images: Tensor) -> Tensor:
        return rearrange(self.taesd_encoder(images), "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in 0..1 (clamped)."""
        return self.raw_decode(latents).clamp(0, 1)

    def raw_decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch))


class Pixels(nn.Module):
    """Squares of `square` x `square` pixels of 1 or 3 `channels`, from -1 to 1, in place of latents."""

    square: Tensor
    channels: Tensor

    def __init__(self, side: int, square: int, channels: int):
        super().__init__()
        self.side = side
        self.register_buffer("square", torch.tensor(square))
        self.register_buffer("channels", torch.tensor(channels))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        square = int(self.square)
        return int(self.channels) * square**2, self.side // square, self.side // square

    def encode(self, images: Tensor) -> Tensor:
        images = images if self.channels == 3 else images.mean(1, keepdim=True)
        return F.pixel_unshuffle(2 * images - 1, int(self.square))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [batch, 3, side, side] in 0..1 (clamped)."""
        return ((F.pixel_shuffle(latents, int(self.square)) + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)


def load_autoencoder(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Autoencoder | Pixels:
    """What a file's tensors and header are of; raises `KeyError`, `ValueError` or `RuntimeError` where they are of neither."""
    side = int((metadata or {}).get("side", SIDE))
    if "square" in tensors:
        return Pixels(side, int(tensors["square"]), int(tensors["channels"]))
    return Autoencoder.load(tensors, side)


class Block(nn.Module):
    """Three convolutions beside the identity; a `pooled` one first adds what it reads from the whole picture, by group norm."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
        self.pool = None
        if pooled:
            inner, outer = Conv2d(64, 256, 1, bias=False), Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(inner, GroupNorm(4, 256), nn.ReLU(inplace=True), outer)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def conv(inputs: int, outputs: int, **options) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1, **options)


def to_picture(image: Tensor) -> Image.Image:
    """An image [3, height, width] in 0..1 as a picture."""
    return Image.fromarray(image.float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
