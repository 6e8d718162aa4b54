"""Stopping a training and going on as if nothing had happened.

    save_training(path, model, optimizer, step)
    step = load_training(path, model, optimizer, steps)          # the same numbers follow, bit for bit on a CPU

Weights, optimiser state and random state are tensors of one safetensors file; its header has the number of steps done, the
optimiser's name, a checksum, and the caller's notes (`saved_notes`). Learning rates follow from the step, and are the caller's.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_safetensors
from .checkpoint import open_safetensors, require_format

FORMAT = "flux-poke training 2"
_ANEW = "remove it, and the training begins anew."


def save_training(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, notes: Mapping[str, str] | None = None
) -> None:
    """Writes the state after `step` steps, in place of an older one."""
    tensors: dict[str, Tensor] = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["rng"] = torch.get_rng_state()
    header = {"format": FORMAT, "step": str(step), "optimizer": type(optimizer).__name__, **(notes or {})}
    write_safetensors(path, tensors, {**header, "checksum": _checksum(tensors, header)})


def saved_notes(path: Path) -> dict[str, str]:
    """The header of a saved training, the caller's notes in it; `UserError` where the file is none."""
    with open_safetensors(path) as file:
        return require_format(file.metadata(), path, FORMAT, "saved training", "Remove it.")


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> int:
    """Brings everything to the saved state; the number of steps it has done, of `steps`.

    Raises `UserError` where the file is damaged, holds something else or another model's training, or has done more steps.
    """
    with open_safetensors(path) as file:
        header = require_format(file.metadata(), path, FORMAT, "saved training", "Remove it.")
        try:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} is a damaged training state ({error}): {_ANEW}") from error
    expected, found = header.pop("checksum", "none"), _checksum(tensors, header)
    if found != expected:
        raise UserError(f"{path} is a damaged training state (checksum {found}, expected {expected}): {_ANEW}")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path} holds numbers in {key} that are not finite: remove it, and choose a lower learning rate.")
    state: dict[int, dict[str, Tensor]] = {}
    try:
        if header["optimizer"] != type(optimizer).__name__:
            raise ValueError(f"its optimizer is {header['optimizer']}, not {type(optimizer).__name__}")
        model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
        for key in (key for key in tensors if key.startswith("optimizer.")):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensors[key]
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng"])
        done = int(header["step"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} is the training of another model ({why}): remove it or choose another folder.") from error
    if done > steps:
        raise UserError(
            f"{path} is a training of which {done:,} steps are done, more than the {steps:,} asked for: ask for at least "
            f"{done:,} steps, or remove the file to begin anew."
        )
    return done


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Hexadecimal; tells a file that was written whole from one whose numbers or header were changed since."""
    found = zlib.crc32(repr(sorted(header.items())).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        found = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
