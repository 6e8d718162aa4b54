"""What a model can predict at a noise level, one from the other: velocity, x0, noise and score.

    x0 = convert(velocity, x, sigma, "velocity", "x0")

x = (1 - sigma) * x0 + sigma * noise, velocity = noise - x0, and score, the gradient of the log density of x, is -noise / sigma
(Tweedie's formula; Lipman et al. 2024, Flow Matching Guide and Code, table 1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

Prediction = Literal["velocity", "x0", "noise", "score"]


def convert(value: Tensor, x: Tensor, sigma: Tensor | float, source: Prediction, to: Prediction) -> Tensor:
    """`value` [batch, ...], which is `source` at latents `x` of noise level `sigma` ([batch], or one for all), as `to`.

    Raises `UserError` where it does not say what `to` is: x0 at sigma 0 is x itself whatever the velocity, and so are noise
    and score at sigma 1.
    """
    if source == to:
        return value
    level = torch.as_tensor(sigma, device=x.device, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    lowest, highest = level.min().item(), level.max().item()
    if lowest == 0 and (source in ("x0", "score") or to == "score"):
        raise UserError(f"At noise level 0, {source} does not say what the {to} is: expected a level above 0.")
    if highest == 1 and source in ("noise", "score"):
        raise UserError(f"At noise level 1, {source} does not say what the {to} is: expected a level below 1.")
    if source == "score":
        value, source = -level * value, "noise"
        if to == "noise":
            return value
    if source == "velocity":
        velocity = value
    elif source == "x0":
        velocity = (x - value) / level
    else:
        velocity = (value - x) / (1 - level)
    if to == "velocity":
        return velocity
    if to == "x0":
        return x - level * velocity
    noise = x + (1 - level) * velocity
    return noise if to == "noise" else -noise / level
