"""Keeping whole model calls of a FLUX while it draws: what goes into its blocks and comes out, or the velocity itself.

    recorder = StateRecorder("blocks", store, StateChoice(), Limit(20, "stop"), indices=indices_around(blocks, layout))
    recorder = StateRecorder("trajectories", store, StateChoice(steps=10))
    with recorder.run() as run:
        for ...:
            with run.watching(model, call):                          # hooks only at the steps that were drawn for it
                model(x, sigma, context, vector)

A recorded call is one shard, written at once. Kind `blocks`: `{k}-img` and `{k}-txt` [rows, tokens, hidden] for every index
k that is recorded, `vec` [rows, hidden], and `pe` [tokens, head dim / 2, 2, 2] float32, the rotations of text and image
tokens. Index k is what enters block k; single blocks count on from the double ones, and the last index is what leaves the last
block. Kind `trajectories`: `x`, `sigma`, `context`, `vector`, `guidance`, `velocity` [rows, ...], and `reference0`, ... of
an edit.

Works on `flux.model.Flux` and on ComfyUI's modules, whose blocks add to their input in place: everything is copied before
the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import Block, blocks_of
from ..flux.layout import Layout
from .call import Call
from .hooks import watching_blocks
from .manifest import Capture, Limit
from .run import Recorder, Run, StepDraw
from .store import HiddenStates

StateKind = Literal["blocks", "trajectories"]


@dataclass(frozen=True)
class StateChoice(StepDraw):
    """Which calls: `steps` of each image (None = 5 %, at least one) whose sigma lies in `sigmas`; stored as `dtype`."""

    steps: int | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.check()


def indices_around(blocks: Collection[Block], layout: Layout) -> frozenset[int]:
    """Indices of the states before and after each of `blocks`: all that it takes to train them."""
    number = {block: index for index, block in enumerate(blocks_of(layout))}
    return frozenset(index for block in blocks for index in (number[block], number[block] + 1))


def estimated_state_bytes(
    kind: StateKind, layout: Layout, indices: Collection[int], choice: StateChoice, calls: int, image_tokens: int, words: int
) -> int:
    """What `calls` recorded rows (images times drawn steps) take on disk; `pe` is counted once a row."""
    size = choice.dtype.itemsize
    if kind == "blocks":
        states = len(indices) * (image_tokens + words) * layout.hidden + layout.hidden
        return calls * (states * size + (image_tokens + words) * layout.head_dim // 2 * 4 * 4)
    latents = image_tokens * (layout.in_channels + layout.out_channels)
    return calls * size * (latents + words * layout.context + (layout.vector or 0) + 2)


class StateRecorder(Recorder):
    """Records model calls into `store`, over any number of runs, until `limit` says stop (`full`)."""

    choice: StateChoice

    def __init__(
        self,
        kind: StateKind,
        store: HiddenStates,
        choice: StateChoice | None = None,
        limit: Limit | None = None,
        indices: Collection[int] = (),
    ):
        if kind == "blocks" and not indices:
            raise UserError("No block is to be recorded: choose at least one.")
        self.kind, self.store, self.choice, self.limit = kind, store, choice or StateChoice(), limit
        self.indices = frozenset(indices)

    def begin(self) -> StateRun:
        """A run of the sampler; what was recorded stays, also where it does not end well."""
        return StateRun(self)


class StateRun(Run):
    """One sampling run (see `Run`)."""

    def __init__(self, recorder: StateRecorder):
        super().__init__(recorder, recorder.kind)
        self.recorder = recorder
        self._noted = False

    @contextmanager
    def watching(self, model: nn.Module, call: Call) -> Iterator[None]:
        """Hooks on `model` for one call of it, if its step is one of `steps`; what was seen is written when it ends."""
        if not self.wants(call):
            yield
            return
        recorder, seen = self.recorder, _Seen(self.recorder.choice.dtype, call)
        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            hooks.enter_context(
                _blocks(model, recorder.indices, seen) if recorder.kind == "blocks" else _trajectories(model, seen)
            )
            yield
        if self.is_whole(ran) and self.all_finite(seen.tensors.items()):
            self._write(call, seen)

    def _write(self, call: Call, seen: _Seen) -> None:
        assert self.drawing is not None
        recorder, store = self.recorder, self.recorder.store
        captures = [Capture(self.drawing.first + image, call.step, call.sigma_now, *self._asked[image]) for image in call.read]
        if not store.append(recorder.kind, seen.tensors, recorder.limit, captures=captures):
            recorder.full, self.steps = True, frozenset()
        elif not self._noted:
            self._noted = True
            store.note_recorded(self.drawing, recorder.kind)


class _Seen:
    """The tensors of one call, in main memory.

    They are copied at once, to memory that is given back: pinned memory, which copies could fill while the device goes on,
    stays with the process, and a call of FLUX.1 at 1024x1024 is 1.6 GB.
    """

    def __init__(self, dtype: torch.dtype, call: Call):
        self.dtype, self.call = dtype, call
        self.tensors: dict[str, Tensor] = {}

    def keep(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        """Of `values` [batch, ...], the rows that images are read from."""
        self.put(name, self.call.part(values), dtype)

    def put(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensors[name] = values.detach().to("cpu", dtype or self.dtype, copy=True)


@contextmanager
def _blocks(model: nn.Module, indices: frozenset[int], seen: _Seen) -> Iterator[None]:
    """Hooks that keep the states at `indices`, the vector and the rotations."""
    doubles: list[Any] = list(model.get_submodule("double_blocks").children())
    singles: list[Any] = list(model.get_submodule("single_blocks").children())
    last = len(doubles) + len(singles)
    words = 0

    def split(block_index: int, tokens: Tensor) -> None:
        seen.keep(f"{block_index}-txt", tokens[:, :words])
        seen.keep(f"{block_index}-img", tokens[:, words:])

    def entering(block_index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal words
            if block_index < len(doubles):
                words = kwargs["txt"].shape[1]
                if block_index in indices:
                    seen.keep(f"{block_index}-img", kwargs["img"])
                    seen.keep(f"{block_index}-txt", kwargs["txt"])
            else:
                split(block_index, args[0])
            if "pe" not in seen.tensors:  # all images of a batch have the same positions
                pe = kwargs["pe"]
                seen.put("pe", pe.reshape(-1, *pe.shape[-4:])[0], torch.float32)

        return hook

    def leaving(module: nn.Module, args: tuple, output: Any) -> None:
        if singles:
            split(last, output)
        else:
            seen.keep(f"{last}-img", output[0])
            seen.keep(f"{last}-txt", output[1])

    def final(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.keep("vec", args[1] if len(args) > 1 else kwargs["vec"])

    with ExitStack() as hooks:
        for block_index, module in enumerate((*doubles, *singles)):
            # The first block gives the positions, the last double block the number of words.
            if block_index in indices or block_index in (0, len(doubles) - 1):
                hooks.callback(module.register_forward_pre_hook(entering(block_index), with_kwargs=True).remove)
        if last in indices:
            hooks.callback((*doubles, *singles)[-1].register_forward_hook(leaving).remove)
        hooks.callback(model.get_submodule("final_layer").register_forward_pre_hook(final, with_kwargs=True).remove)
        yield


@contextmanager
def _trajectories(model: nn.Module, seen: _Seen) -> Iterator[None]:
    """A hook that keeps what `model` is called with (ComfyUI calls the vector `y`) and what it answers."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        names = ("x", "sigma", "context", "vector", "guidance")
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        told.setdefault("vector", told.get("y"))
        for name in names:
            if told.get(name) is not None:
                seen.keep(name, told[name], torch.float32 if name == "sigma" else None)
        for number, reference in enumerate(told.get("ref_latents") or ()):
            seen.keep(f"reference{number}", reference.expand(len(output), *reference.shape[1:]))
        seen.keep("velocity", output)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
