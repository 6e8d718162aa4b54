"""Long work inside a node.

    progress = NodeProgress(node_id)
    planned = on_gpu(lambda device: make_plan(dense, recording, what, device, progress), node_id)

It is done on the GPU where it can be, shows how far it is, and stops where the user presses Cancel.
"""

from __future__ import annotations

import math
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
    return comfy.model_management.get_torch_device()


@contextmanager
def training() -> Iterator[None]:
    """Gradients, which the host switches off while nodes run, and the memory of models that are not in use."""
    comfy.model_management.unload_all_models()
    with torch.inference_mode(False), torch.enable_grad():
        yield


def on_gpu(work: Callable[[torch.device], T], node_id: str | None) -> T:
    """What `work` returns, done on the GPU with all of its memory; on the CPU where there is none or its memory is too small.

    `work` is then begun again: it should find what is done already.
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
    comfy.model_management.throw_exception_if_processing_interrupted()


class NodeProgress:
    """Progress of long work, in words and as a bar on the node that runs; raises where the user has pressed Cancel.

    Without a node's id, the bar alone is shown. What is `below` stands under the words.
    """

    #: Seconds between two lines of words.
    EVERY = 0.5

    def __init__(self, node_id: str | None = None, below: str = ""):
        self._node_id, self._below = node_id, below and f"\n{below}"
        self._bar = comfy.utils.ProgressBar(1)
        self._begun, self._said = time.monotonic(), -math.inf
        self._first: float | None = None

    def __call__(self, what: str, done: float, total: float) -> None:
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        if self._first is None:
            self._first = done  # what is there already took no time
        if self._node_id and what and now - self._said > self.EVERY:
            minutes = (now - self._begun) / 60 * (total - done) / (done - self._first) if done > self._first else 0.0
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ""
            host.show(self._node_id, f"{what}: {done / max(total, 1e-9):.0%}{left}{self._below}")
            self._said = now
        throw_if_cancelled()
