"""Keeping whole model calls of a FLUX while it draws: what goes into its blocks and comes out, or the velocity itself.

    recorder = StateRecorder("blocks", store, StateChoice(), Limit(20, "stop"), places=places_around(blocks, layout))
    recorder = StateRecorder("trajectories", store, StateChoice(steps=10))
    with recorder.run(sigmas, images=4, prompts=texts, seeds=seeds) as run:
        for step in range(20):
            with run.watching(model, step):                          # hooks only at the steps that were drawn for it
                model(x, sigma, context, vector)

A recorded call is one shard, written at once. Kind `blocks`: `{k}-img` and `{k}-txt` [rows, tokens, hidden] for every place
k that is recorded, `vec` [rows, hidden], and `pe` [tokens, head dim / 2, 2, 2] float32, the rotations of text and image
tokens. Place k is what enters block k; single blocks count on from the double ones, and the last place is what leaves the
last block. Kind `trajectories`: `x`, `sigma`, `context`, `vector`, `guidance`, `velocity` [rows, …], and `reference0`, … of
an edit.

Works on `flux.model.Flux` and on ComfyUI's modules, whose blocks add to their input in place: everything is copied before
the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.blocks import Block, blocks_of
from ..flux.layout import Layout
from .hooks import hooks_heard
from .rows import draw_steps
from .store import Capture, Drawing, HiddenStates, Limit

StateKind = Literal["blocks", "trajectories"]


@dataclass(frozen=True)
class StateChoice:
    """Which calls: `steps` of each image (None = 5 %, at least one) whose sigma lies in `sigmas`; stored as `dtype`."""

    steps: int | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"At least 1 step per image is recorded; asked for {self.steps}.")
        if self.sigmas[0] > self.sigmas[1]:
            raise UserError(f"A sigma range runs from low to high, within 0 and 1; found {self.sigmas[0]} to {self.sigmas[1]}.")


def places_around(blocks: Collection[Block], layout: Layout) -> frozenset[int]:
    """The places before and after each of `blocks`: all that it takes to train them."""
    number = {block: place for place, block in enumerate(blocks_of(layout))}
    return frozenset(place for block in blocks for place in (number[block], number[block] + 1))


def estimated_state_bytes(
    kind: StateKind, layout: Layout, places: Collection[int], choice: StateChoice, calls: int, image_tokens: int, words: int
) -> int:
    """What `calls` recorded rows (images times drawn steps) take on disk; `pe` is counted once a row."""
    size = choice.dtype.itemsize
    if kind == "blocks":
        states = len(places) * (image_tokens + words) * layout.hidden + layout.hidden
        return calls * (states * size + (image_tokens + words) * layout.head_dim // 2 * 4 * 4)
    latents = image_tokens * (layout.in_channels + layout.out_channels)
    return calls * size * (latents + words * layout.context + (layout.vector or 0) + 2)


class StateRecorder:
    """Records model calls into `store`, over any number of runs, until `limit` says stop (`full`)."""

    def __init__(
        self,
        kind: StateKind,
        store: HiddenStates,
        choice: StateChoice | None = None,
        limit: Limit | None = None,
        places: Collection[int] = (),
    ):
        if kind == "blocks" and not places:
            raise UserError("No block is to be recorded: choose at least one.")
        self.kind, self.store, self.choice, self.limit = kind, store, choice or StateChoice(), limit
        self.places = frozenset(places)
        self.full = False

    @contextmanager
    def run(
        self,
        sigmas: Sequence[float] | Tensor,
        images: int = 1,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        what: str | None = None,
    ) -> Iterator[StateRun]:
        """One sampling run of `images` images along `sigmas` (all of them).

        `what` tells these images from others: the same ones keep their numbers when they are recorded again.
        """
        yield self.begin(sigmas, images, prompts, seeds, what)

    def begin(
        self,
        sigmas: Sequence[float] | Tensor,
        images: int = 1,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        what: str | None = None,
    ) -> StateRun:
        """As `run`; nothing is left to do when the run ends."""
        levels = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
        drawing = self.store.numbered(images, None if what is None else f"{self.kind} {what}")
        self.store.recorded(drawing)  # every call that is written stays
        return StateRun(self, levels, drawing, prompts, seeds)


class StateRun:
    """One sampling run; `steps` are those that are recorded."""

    def __init__(
        self,
        recorder: StateRecorder,
        sigmas: list[float],
        drawing: Drawing,
        prompts: Sequence[str] | None,
        seeds: Sequence[int] | None,
    ):
        self.recorder, self.sigmas, self.first, self.prompts, self.seeds = recorder, sigmas, drawing.first, prompts, seeds
        choice = recorder.choice
        drawn = draw_steps(sigmas, drawing.lot, choice.steps, choice.sigmas, choice.seed)
        self.steps = frozenset() if recorder.full else drawn

    @contextmanager
    def watching(self, model: nn.Module, step: int, images: Sequence[int | None] | None = None) -> Iterator[None]:
        """Hooks on `model` while the `with` lasts, if `step` is one of `steps`; what was seen is written when it ends.

        `images`: which image of the run each row of the batch is; None leaves a row out (an unconditional one, say); default
        0, 1, 2, …
        """
        if step not in self.steps:
            yield
            return
        recorder, seen = self.recorder, _Seen(self.recorder.choice.dtype, images)
        with ExitStack() as hooks:
            hooks.enter_context(hooks_heard())
            hooks.enter_context(
                _blocks(model, recorder.places, seen) if recorder.kind == "blocks" else _trajectories(model, seen)
            )
            yield
        captures = self._captures(step, seen)
        if captures and not recorder.store.append(recorder.kind, seen.tensors, recorder.limit, captures=captures):
            recorder.full, self.steps = True, frozenset()

    def _captures(self, step: int, seen: _Seen) -> list[Capture]:
        return [
            Capture(
                image=self.first + image,
                step=step,
                sigma=self.sigmas[step],
                prompt=None if self.prompts is None else self.prompts[image],
                seed=None if self.seeds is None else self.seeds[image],
            )
            for image in seen.images or []
        ]


class _Seen:
    """The tensors of one call, in main memory.

    They are copied at once, to memory that is given back: pinned memory, which copies could fill while the device goes on,
    stays with the process, and a call of FLUX.1 at 1024² is 1.6 GB.
    """

    def __init__(self, dtype: torch.dtype, images: Sequence[int | None] | None):
        self.dtype, self._chosen = dtype, images
        self.tensors: dict[str, Tensor] = {}
        self.images: list[int] | None = None
        self._rows: list[int] | None = None

    def keep(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        """The chosen rows of `values` [batch, …]."""
        if self.images is None:
            chosen = list(range(len(values))) if self._chosen is None else list(self._chosen)
            self._rows = [row for row, image in enumerate(chosen) if image is not None]
            self.images = [image for image in chosen if image is not None]
        whole = len(self.images) == len(values)
        self.put(name, values if whole else values[self._rows], dtype)

    def put(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensors[name] = values.detach().to("cpu", dtype or self.dtype, copy=True)


@contextmanager
def _blocks(model: nn.Module, places: frozenset[int], seen: _Seen) -> Iterator[None]:
    """Hooks that keep the states at `places`, the vector and the rotations."""
    doubles: list[Any] = list(model.get_submodule("double_blocks").children())
    singles: list[Any] = list(model.get_submodule("single_blocks").children())
    last = len(doubles) + len(singles)
    words = 0

    def split(place: int, tokens: Tensor) -> None:
        seen.keep(f"{place}-txt", tokens[:, :words])
        seen.keep(f"{place}-img", tokens[:, words:])

    def entering(place: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal words
            if place < len(doubles):
                words = kwargs["txt"].shape[1]
                if place in places:
                    seen.keep(f"{place}-img", kwargs["img"])
                    seen.keep(f"{place}-txt", kwargs["txt"])
            else:
                split(place, args[0])
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
        for place, module in enumerate((*doubles, *singles)):
            # The first block gives the positions, the last double block the number of words.
            if place in places or place in (0, len(doubles) - 1):
                hooks.callback(module.register_forward_pre_hook(entering(place), with_kwargs=True).remove)
        if last in places:
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
