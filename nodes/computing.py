"""Long work inside a node.

    progress = StepProgress(node_id, "ranked")
    rankings = on_gpu(lambda device: rank("obs", dense, rows=rows, device=device, progress=progress), node_id)

It is done on the GPU where it can be, shows how far it is, and stops where the user presses Cancel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import comfy.model_management
import comfy.utils
import torch

from . import host

T = TypeVar("T")


def training_device() -> torch.device:
    """Where ComfyUI computes."""
    return comfy.model_management.get_torch_device()


@contextmanager
def training() -> Iterator[None]:
    """Gradients, which the host switches off while nodes run, and the memory of models that are not in use."""
    comfy.model_management.unload_all_models()
    with torch.inference_mode(False), torch.enable_grad():
        yield


def on_gpu(work: Callable[[torch.device], T], node_id: str | None) -> T:
    """What `work` returns, done on the GPU with all of its memory; on the CPU where there is none or its memory is too small.

    `work` is then begun anew: it should find what is done already.
    """
    device = training_device()
    if device.type == "cuda":  # sums are kept in float64, which others do not compute
        comfy.model_management.unload_all_models()
        try:
            return work(device)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        comfy.model_management.soft_empty_cache()
        host.say(node_id, "The GPU has too little memory for this: going on on the CPU, which takes longer.")
    return work(torch.device("cpu"))


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether the device lacked memory, as torch, the driver, cuBLAS and cuSOLVER say it."""
    words = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words


def throw_if_cancelled() -> None:
    """Raises where the user has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class StepProgress:
    """Progress of work in named steps on the node that runs; raises where the user has pressed Cancel.

    Where it is told what is `done` to them, it is shown in words on the node `node_id`, with the time that is left.
    """

    def __init__(self, node_id: str | None = None, done: str = ""):
        self._node_id, self._done = node_id, done
        self._bar = comfy.utils.ProgressBar(1)
        self._since = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        if self._done:
            # as long as the last one took: those before it may have been there already
            minutes = (now - self._since) * (total - done) / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ""
            host.show(self._node_id, f"{name} {self._done}, {done} of {total}{left}")
        self._since = now
        throw_if_cancelled()
