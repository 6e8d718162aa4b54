"""Stopping a training and going on as if nothing had happened.

    save_training(path, model, optimizer, schedule, step)
    step = load_training(path, model, optimizer, schedule)       # the same numbers follow, bit for bit on a CPU

Weights, optimiser state and random state are tensors of one safetensors file; numbers of the optimiser and the
schedule are in its header.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_safetensors
from .checkpoint import open_safetensors, require_format

FORMAT = "flux-poke training 1"


def save_training(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, step: int
) -> None:
    """Writes the state after `step` steps, in place of an older one."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    for index, moments in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["rng"] = torch.get_rng_state()
    header = {
        "format": FORMAT,
        "step": str(step),
        "param_groups": json.dumps(state["param_groups"]),
        "schedule": json.dumps(schedule.state_dict()),
    }
    write_safetensors(path, tensors, header)


def load_training(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> int:
    """Brings everything to the saved state; the number of steps it has done.

    Raises `UserError` where the file holds something else or another model's training.
    """
    with open_safetensors(path) as file:
        header = require_format(file.metadata(), path, FORMAT, "saved training", "Remove it.")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    try:
        model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
    except RuntimeError as error:
        raise UserError(f"{path} is the training of a model of other shapes: remove it or choose another folder.") from error
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": json.loads(header["param_groups"])})
    schedule.load_state_dict(json.loads(header["schedule"]))
    torch.set_rng_state(tensors["rng"])
    return int(header["step"])
