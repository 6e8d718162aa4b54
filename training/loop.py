"""The steps of a training: AdamW, learning rates, an average of the weights, and a state from which it goes on exactly.

    trained = optimise(accelerator, model, loss, course, saved, notes, watch, progress)

A state is saved at every `course.save_every` steps, every half minute, and on Ctrl-C. What follows it is the same, bit for
bit on a CPU, as without the stop.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from ..errors import UserError
from ..flux.resume import load_training, save_training, saved_notes
from ..progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Seconds between two saved states; where saving takes long, `SAVE_SHARE` of the time goes to it at most.
SAVE_SECONDS, SAVE_SHARE = 30.0, 0.05
#: Of AdamW; the norm that gradients are clipped to.
WEIGHT_DECAY, CLIPPED = 0.01, 1.0


@dataclass(frozen=True)
class Course:
    """How many steps, at which learning rates; `ema` is how much of the weights' average stays at a step (0 = no average)."""

    name: str
    steps: int
    learning_rate: float
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    warmup: int = 0
    ema: float = 0.0
    save_every: int = 250


#: Told after a step: how many are done, the loss, the learning rate, and the model that would be the result now.
Watch = Callable[[int, float, float, nn.Module], None]


def optimise(
    accelerator: Accelerator,
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    course: Course,
    saved: Path,
    notes: Mapping[str, str],
    watch: Watch,
    progress: Progress,
) -> nn.Module:
    """The model, or the average of its weights, after all steps; goes on from the state in `saved`.

    `loss(model, step)` is what a step makes smaller; `model` there may be wrapped for several processes. `notes` go into the
    state. Raises `UserError` on Ctrl-C, once the state is saved, and where the state cannot be gone on from.
    """
    steps, rate = course.steps, course.learning_rate
    model.to(accelerator.device)
    averaged = AveragedModel(model, multi_avg_fn=_average(course.ema)) if course.ema else None
    state = nn.ModuleDict({"model": model, "average": averaged}) if averaged else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    first = _loaded(accelerator, saved, state, optimizer, steps) if saved.exists() else 0
    schedule = _schedule(optimizer, course)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule is brought to where it was, which no optimizer step goes with
        for _ in range(first):
            schedule.step()
    if first == steps:
        return averaged.module if averaged else model
    prepared, stepping = accelerator.prepare(model, optimizer)
    prepared.train()

    def save(done: int) -> None:
        if accelerator.is_main_process:
            scaler = {"scaler": json.dumps(accelerator.scaler.state_dict())} if accelerator.scaler else {}
            save_training(saved, state, optimizer, done, {**notes, **scaler})

    kept, saving_took = time.monotonic(), 0.0
    with _interrupts_noted() as interrupted:
        for step in range(first, steps):
            stepping.zero_grad(set_to_none=True)
            value = loss(prepared, step)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), CLIPPED)
            stepping.step()
            schedule.step()
            if averaged:
                averaged.update_parameters(model)
            done, stop, found = step + 1, _anywhere(accelerator, interrupted.is_set()), value.item()
            watch(done, found, optimizer.param_groups[0]["lr"], averaged.module if averaged else model)
            due = time.monotonic() - kept >= max(SAVE_SECONDS, saving_took / SAVE_SHARE)
            if stop or done == steps or done % course.save_every == 0 or due:
                began = time.monotonic()
                save(done)
                kept = time.monotonic()
                saving_took = kept - began
            if stop and done < steps:
                raise UserError(
                    f"Stopped after {done:,} of {steps:,} steps of {course.name}, which are saved in {saved.parent}: the same "
                    "command goes on from there."
                )
            progress(f"{course.name}: loss {found:.4f}", done, steps)
    return averaged.module if averaged else model


def _loaded(accelerator: Accelerator, saved: Path, state: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> int:
    done = load_training(saved, state, optimizer, steps)
    if accelerator.scaler and (scaler := saved_notes(saved).get("scaler")):
        accelerator.scaler.load_state_dict(json.loads(scaler))
    return done


def _schedule(optimizer: torch.optim.Optimizer, course: Course) -> LRScheduler:
    if course.schedule == "one-cycle":
        return OneCycleLR(optimizer, max_lr=course.learning_rate, total_steps=course.steps)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (course.warmup + 1)))


def _average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """An exponential moving average of `decay`, less at first, so that the weights it began with are soon forgotten."""

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], number: Tensor | int) -> None:
        count = int(number)
        kept = min(decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(averaged), list(current), 1 - kept)

    return average


def _anywhere(accelerator: Accelerator, holds: bool) -> bool:
    """Whether it holds in one of the processes, so that all of them stop after the same step."""
    if accelerator.num_processes == 1:
        return holds
    found = torch.tensor(float(holds), device=accelerator.device)
    return bool(accelerator.reduce(found, "sum").item())


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Set at the first Ctrl-C, in place of an exception in the middle of a step; the second one interrupts as usual."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no Ctrl-C arrives
        yield noted
        return

    def note(*_: object) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
