"""From block predictions to images, as many at a time as memory allows.

for frame in decode_taps(taps, autoencoder.decode, batch=4):
    frame.tap.title, frame.number, frame.image   # "Step 0 · double block 0", 0, a Pillow image
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .taps import BlockTaps, Tap, View

#: Latents [batch, channels, h, w] to images [batch, 3, height, width] in 0..1.
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    """What one block would have drawn; `number` is the image's in its batch."""

    tap: Tap
    number: int
    image: Image.Image


def decode_taps(taps: BlockTaps, decode: Decode, batch: int = 4, view: View = "x0") -> Iterator[Frame]:
    """All predictions in order (by step, block and image), decoded `batch` at a time.

    Raises `UserError` where nothing was tapped.
    """
    taps.check_not_empty()
    waiting: list[tuple[Tap, int, Tensor]] = []
    for tap in taps:
        latents = taps.to_autoencoder(taps.latent(tap, view))
        waiting += [(tap, number, latent) for number, latent in enumerate(latents)]
        while len(waiting) >= batch:
            yield from _decoded(waiting[:batch], decode)
            del waiting[:batch]
    if waiting:
        yield from _decoded(waiting, decode)


def _decoded(waiting: list[tuple[Tap, int, Tensor]], decode: Decode) -> Iterator[Frame]:
    images = decode(torch.stack([latent for _, _, latent in waiting]))
    for (tap, number, _), image in zip(waiting, images, strict=True):
        yield Frame(tap, number, to_picture(image))


def to_picture(image: Tensor) -> Image.Image:
    """An image [3, height, width] in 0..1 as a picture."""
    return Image.fromarray(image.float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
