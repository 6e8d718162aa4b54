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
an edit (and `method-NAME` where its pictures are set in another way than the family's own).

Works on `flux.model.Flux` and on ComfyUI's modules, whose blocks add to their input in place: everything is copied before
the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import Block, blocks_of
from ..flux.layout import Layout
from .call import Call
from .hooks import blocks_in, watching_tokens
from .manifest import Capture, Limit
from .run import Recorder, Run, StepDraw
from .store import HiddenStates

StateKind = Literal["blocks", "trajectories"]
#: What tensors of reference pictures are called, by number; and what says that they are set in another way than by default.
REFERENCE, METHOD = "reference", "method-"


@dataclass(frozen=True)
class StateChoice(StepDraw):
    """Which calls: `steps` of each image (None = 5 %, at least one) whose sigma lies in `sigmas`; stored as `dtype`."""

    steps: int | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16


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
    """Records model calls; `indices` are those of the states that kind "blocks" keeps."""

    choice: StateChoice

    def __init__(
        self, kind: StateKind, store: HiddenStates, choice: StateChoice = StateChoice(), limit: Limit | None = None,
        indices: Collection[int] = (),
    ):  # fmt: skip
        super().__init__(store, choice, limit)
        if kind == "blocks" and not indices:
            raise UserError("No block is to be recorded: choose at least one.")
        self.kind = kind
        self.indices = frozenset(indices)

    def begin(self) -> StateRun:
        """A run of the sampler; what was recorded stays, also where it does not end well."""
        return StateRun(self)


class StateRun(Run):
    recorder: StateRecorder

    def hook(self, hooks: ExitStack, model: nn.Module, call: Call) -> Callable[[], None]:
        seen = _Seen(self.recorder.choice.dtype, call)
        if self.kind == "blocks":
            _watch_blocks(hooks, model, self.recorder.indices, seen)
        else:
            hooks.enter_context(model.register_forward_hook(seen.keep_call, with_kwargs=True))

        def take() -> None:
            images = zip(self.numbers(call).tolist(), call.read, strict=True)
            captures = [Capture(number, call.step, call.sigma_now, *self._asked[image]) for number, image in images]
            self.write(seen.tensors, captures=captures)

        return take


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

    def keep_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """What the model was called with (ComfyUI calls the vector `y`), and what it answered."""
        names = ("x", "sigma", "context", "vector", "guidance", "references")
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        told.setdefault("vector", told.get("y"))
        references = told.get("ref_latents") or told.get("references") or ()
        for name in names[:-1]:
            if told.get(name) is not None:
                self.keep(name, told[name], torch.float32 if name == "sigma" else None)
        for number, reference in enumerate(references):
            self.keep(f"{REFERENCE}{number}", reference.expand(len(output), *reference.shape[1:]))
        method = told.get("ref_latents_method") or getattr(getattr(module, "params", None), "default_ref_method", None)
        own = "index" if hasattr(module, "double_stream_modulation_img") else "offset"
        if references and method not in (None, own):
            self.put(f"{METHOD}{method}", torch.ones(len(self.call.rows)))
        self.keep("velocity", output)


def _watch_blocks(hooks: ExitStack, model: nn.Module, indices: frozenset[int], seen: _Seen) -> None:
    """Hooks that keep the states at `indices`, the vector and the rotations."""

    def see(block_index: int, img: Tensor, txt: Tensor) -> None:
        seen.keep(f"{block_index}-img", img)
        seen.keep(f"{block_index}-txt", txt)

    def first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pe = kwargs["pe"]  # all images of a batch have the same positions
        seen.put("pe", pe.reshape(-1, *pe.shape[-4:])[0], torch.float32)

    def final(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.keep("vec", args[1] if len(args) > 1 else kwargs["vec"])

    hooks.enter_context(watching_tokens(model, indices, see))
    hooks.enter_context(blocks_in(model)[0].register_forward_pre_hook(first, with_kwargs=True))
    hooks.enter_context(model.get_submodule("final_layer").register_forward_pre_hook(final, with_kwargs=True))
