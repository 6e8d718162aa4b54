"""The digits the tiny FLUX learns from, and the reader that tells how well it draws them.

1,797 handwritten digits of 8x8 pixels (scikit-learn's copy of UCI's Optical Recognition of Handwritten Digits),
enlarged to 64x64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

SIDE = 64


def digit_images() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 64, 64] in 0..1 and the digits [1797] they show."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


@cache
def _reader() -> KNeighborsClassifier:
    images, digits = digit_images()
    return KNeighborsClassifier(n_neighbors=3).fit(_shrunk(images), digits.numpy())


def _shrunk(images: Tensor):
    return F.avg_pool2d(images.float().mean(1, keepdim=True), SIDE // 8).flatten(1).numpy()


def read_digits(images: Tensor) -> Tensor:
    """The digit that three nearest neighbours among the real ones see in each image [batch, 3, 64, 64]."""
    return torch.tensor(_reader().predict(_shrunk(images)))


def digit_accuracy(images: Tensor, digits: Sequence[int]) -> float:
    """Share of `images` that read as the digit they were asked to show."""
    return (read_digits(images) == torch.tensor(digits)).float().mean().item()
