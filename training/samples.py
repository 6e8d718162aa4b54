"""Pictures that a model draws while it is trained, with their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..files import write_picture
from ..flux.autoencoder import to_picture
from ..tiny.model import TinyFlux
from .config import Samples

#: Pixels of a picture in the grid at least, and of the line with its prompt.
SHOWN, LINE = 128, 16


def write_samples(path: Path, tiny: TinyFlux, prompts: Sequence[str], options: Samples) -> Tensor:
    """Draws `prompts` from the same noise at every call and writes the grid to `path`, which comes back [3, height, width].

    The model is as it was before, and so is torch's random state.
    """
    device, training = tiny.flux.img_in.weight.device, tiny.flux.training
    tiny.flux.eval()
    noise = tiny.noise(len(prompts), options.seed).to(device)
    with torch.no_grad():
        latents = tiny.sample(prompts, noise, tiny.sigmas(options.steps), guidance=options.guidance)
        images = tiny.autoencoder.decode(latents).float().cpu()
    tiny.flux.train(training)
    picture = grid(images, prompts)
    write_picture(path, picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def grid(images: Tensor, prompts: Sequence[str]) -> Image.Image:
    """Images [n, 3, height, width] in 0..1, each above its prompt."""
    across = math.ceil(math.sqrt(len(images)))
    times = max(1, SHOWN // images.shape[-1])
    side = images.shape[-1] * times
    found = Image.new("RGB", (across * (side + 4), math.ceil(len(images) / across) * (side + LINE + 4)), "white")
    draw = ImageDraw.Draw(found)
    for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        y, x = (place // across) * (side + LINE + 4), (place % across) * (side + 4)
        one = to_picture(image)
        found.paste(one.resize((side, side), Image.Resampling.NEAREST), (x, y))
        said = prompt if draw.textlength(prompt) <= side else f"{prompt[: max(1, int(side / 7))]}..."
        draw.text((x + 2, y + side + 2), said, fill="black")
    return found
