"""How to retrain, as one value: the same for rows, block states and whole models.

    Options(method="gradient", steps=400, learning_rate=1e-3)

Raises `UserError` where a number or a name cannot be used, before any work is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError

Method = Literal["both", "closed form", "gradient"]
Optimizer = Literal["adamw", "adafactor"]
SaveDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]


@dataclass(frozen=True)
class TrainingStatus:
    """How far a training is: losses are relative to the mean square of what is to be predicted."""

    layer: str
    step: int
    steps: int
    train_loss: float | None
    held_out_loss: float
    seconds_left: float
    layers_done: int = 0
    layers: int = 1


#: Told at every evaluation and a few times a second in between; an exception from it cancels, and finished layers stay.
Report = Callable[[TrainingStatus], None]


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        method: closed form (least squares, `pruning/refit.py`), gradient, or both: gradient steps from the closed form on.
        steps, learning_rate, batch: of the gradient; the rate rises over the first tenth and falls to zero along a cosine.
        eval_every: steps between evaluations on the held-out images. patience: evaluations without progress before it stops, in
            the second half of the steps.
        eval_share: of the images that are held out; all tokens of an image are on one side.
        thickness: consecutive blocks that are trained together against what leaves the last of them.
        sequential: a layer is trained on what the already retrained layers before it give, not on the dense model's states.
        save_dtype: of the retrained tensors; 8-bit ones get a scale each.
        just_evaluate: measure the layers as they start, train and write nothing.
        mixed_precision: products in bfloat16, weights and their updates in float32.
        optimizer: adafactor keeps row and column means in place of AdamW's two numbers a weight (Shazeer & Stern 2018).
        recompute: gradient checkpointing: blocks run twice, their activations are not kept (`distill` only).
        graph: of ComfyUI, that the headers of the layers hold.
        tensorboard: folder for event files, where wanted; needs the package tensorboard.
    """

    method: Method = "both"
    steps: int = 32
    learning_rate: float = 5e-4
    batch: int = 8
    eval_every: int = 16
    patience: int = 4
    eval_share: float = 0.2
    seed: int = 0
    thickness: int = 1
    sequential: bool = False
    save_dtype: SaveDtype = "bfloat16"
    just_evaluate: bool = False
    mixed_precision: bool = False
    device: str = "cpu"
    optimizer: Optimizer = "adamw"
    recompute: bool = False
    tensorboard: Path | None = None
    graph: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every", "patience", "thickness"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is at least 1; found {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"The learning rate is a number above 0; found {self.learning_rate:g}.")
        if not 0 < self.eval_share <= 0.5:
            raise UserError(f"The share of held-out images lies between 0 and 0.5; found {self.eval_share:g}.")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"The seed is a whole number from 0 to {2**31 - 1:,}; found {self.seed}.")
        for name, kind in (("method", Method), ("optimizer", Optimizer), ("save_dtype", SaveDtype)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"There is no {name} {getattr(self, name)!r}; there are {', '.join(get_args(kind))}.")
        if self.sequential and self.thickness > 1:
            raise UserError("Sequential training goes layer by layer: use it with thickness 1.")

    @property
    def dtype(self) -> torch.dtype:
        """What retrained tensors are saved as."""
        return getattr(torch, self.save_dtype)


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A copy of `weight` as `dtype`; 8-bit floats with a scale [] that brings the largest number to the end of their range."""
    if dtype.itemsize > 1:
        return weight.to(dtype, copy=True), None
    limit = torch.finfo(dtype).max
    scale = (weight.abs().amax().float() / limit).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).clamp(-limit, limit).to(dtype), scale


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of `weight` after storing it: in `dtype`, or float32 where that is an 8-bit one."""
    value, scale = stored(weight, dtype)
    return value if scale is None else value.float() * scale
