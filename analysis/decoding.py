"""From block predictions to images, as many at a time as memory allows.

for frame in decode_taps(taps, autoencoder.decode, batch=4):
    frame.tap.title, frame.number, frame.image   # "Step 0 · double block 0", 0, a Pillow image
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..flux.autoencoder import to_picture
from ..parsing import read_image
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
    places = ((tap, number) for tap in taps for number in range(taps.images))
    latents = (latent for tap in taps for latent in taps.to_autoencoder(taps.latent(tap, view)))
    while some := list(islice(latents, batch)):
        for image in decode(torch.stack(some)):
            yield Frame(*next(places), to_picture(image))


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB; raises `UserError` where the file is none."""
    try:
        return read_image(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): name a picture, or make it again.") from error
