"""Watching a MODEL while it samples, without a trace in it.

    watched = sampling_clone(model, lambda: Run(…))  # a SamplingWatcher for every sampling run

Models are watched through wrappers on a clone: hooks stand for the length of one model call, so the model that was passed in,
and every other clone of it, is never touched.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..errors import UserError
from ..flux.fingerprint import Fingerprint, row_scale
from ..flux.layout import Layout, canonical_key, read_layout
from ..recording.call import TokenMask

#: What the wrappers of this pack are filed under.
KEY = "flux_poke"


def flux_layout(model: ModelPatcher) -> Layout:
    """The layout of a MODEL; raises `UserError` where it is no FLUX."""
    weights = model.model.diffusion_model.state_dict()
    return read_layout({key: tuple(tensor.shape) for key, tensor in weights.items()}, source="The model")


def model_fingerprint(model: ModelPatcher) -> Fingerprint:
    """Fingerprint of a MODEL as it was loaded, beneath any LoRA that is applied at the moment."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.model.diffusion_model.state_dict().items()}
    names = {canonical_key(key): key for key in shapes}

    def weight(key: str) -> Tensor:
        name = f"diffusion_model.{names[key]}"
        if name in model.hook_backup:
            return model.hook_backup[name][0]
        if name in model.backup:
            return model.backup[name].weight
        return comfy.utils.get_attr(model.model, name)

    def row(key: str, index: int) -> Tensor:
        stored = getattr(weight(key), "_qdata", weight(key))
        if not stored.is_floating_point() or stored.shape != shapes[names[key]]:
            raise UserError(f"{key} is quantised to {stored.dtype}: expected a bf16, fp16 or fp8 model.")
        return stored[index].cpu()

    def scale(key: str, index: int) -> float:
        quantised: Any = weight(key)
        return row_scale(quantised._params.scale, index, key) if hasattr(quantised, "_qdata") else 1.0

    return Fingerprint.of({canonical_key(key): shape for key, shape in shapes.items()}, row, scale)


@dataclass(frozen=True)
class ModelCall:
    """One call of the diffusion model during sampling, before it happens.

    Attributes:
        model: the transformer, with the checkpoint's module names.
        x: latents [batch, channels, height, width], as the sampler holds them.
        sigma: noise levels [batch].
        sigmas: noise levels of the whole run, steps + 1 numbers: no device has to be waited for.
        context: text [batch, words, width].
        conditional: for each row of the batch; False for those of the negative prompt (CFG).
        images: how many images are drawn; the batch has so many rows for each prompt.
        references: latents of reference pictures, whose tokens follow those of the image.
        guidance: what distilled guidance is told, where it is told anything, [1] or [batch].
        seed: the sampler's.
        again: makes the same call once more, unwatched; the denoised latents.
    """

    model: nn.Module
    x: Tensor
    sigma: Tensor
    sigmas: tuple[float, ...]
    context: Tensor
    conditional: tuple[bool, ...]
    images: int
    references: tuple[Tensor, ...]
    guidance: Tensor | None
    seed: int | None
    again: Callable[[], Tensor]

    def velocity(self) -> Tensor:
        """Runs the model once more on the same input: noise minus image, as x."""
        sigma = self.sigma.view(-1, *(1,) * (self.x.ndim - 1))
        return (self.x - self.again()) / sigma

    @cached_property
    def step(self) -> int:
        """Which of the run's steps this is, from 0; the first who asks waits for the device."""
        now = self.sigma.max().item()
        return max(sum(level >= now for level in self.sigmas[:-1]) - 1, 0)

    @property
    def drawn(self) -> str:
        """Tells the images of this run from those of others: noise and text of its first call with a positive prompt."""
        parts = (self.x[self.positive_rows], self.context[self.positive_rows])
        return hashlib.sha256(b"".join(part.float().cpu().numpy().tobytes() for part in parts)).hexdigest()

    @property
    def positive_rows(self) -> slice | None:
        """The rows of the first positive prompt, one for each image; None where the call is for negative ones alone (CFG)."""
        if True not in self.conditional:
            return None
        first = self.conditional.index(True)
        return slice(first, first + self.images)

    def mask(self, layout: Layout, ignore_padding: bool, positive_only: bool) -> TokenMask:
        """Which tokens count: reference tokens and padding left out by `ignore_padding`, negative rows by `positive_only`.

        FLUX.2's text is padded with zeros by the host, which is how padding is known; other families' is not marked.
        """
        device, batch = self.x.device, len(self.x)
        image = _image_tokens(self.x, layout.patch)
        extra = sum(_image_tokens(reference, layout.patch) for reference in self.references)
        img = torch.ones(batch, image + extra, dtype=torch.bool, device=device)
        txt = torch.ones(batch, self.context.shape[1], dtype=torch.bool, device=device)
        needed = False
        if ignore_padding and extra:
            img[:, image:] = False
            needed = True
        if ignore_padding and layout.family == "flux2":
            txt = (self.context != 0).any(-1).to(device).expand(batch, -1)
            needed = True
        if positive_only and not all(self.conditional):
            rows = torch.tensor(self.conditional, device=device)[:, None]
            img, txt = img & rows, txt & rows
            needed = True
        return TokenMask(img, txt) if needed else TokenMask()


def _image_tokens(latents: Tensor, patch: int) -> int:
    return -(-latents.shape[-2] // patch) * -(-latents.shape[-1] // patch)


class SamplingWatcher(Protocol):
    """What takes part in one sampling run: made when it starts, asked at every model call, told how it ended."""

    def before(self, call: ModelCall) -> None:
        """Asked before the model call, while nobody watches: here, and only here, `call.again` may be used."""
        return

    def watching(self, call: ModelCall) -> AbstractContextManager[None]:
        """Entered around the model call."""

    def finish(self) -> None:
        """The run ended well."""

    def abandon(self) -> None:
        """The run was interrupted or failed: keep nothing."""


def sampling_clone(model: ModelPatcher, start: Callable[[], SamplingWatcher]) -> ModelPatcher:
    """A clone of MODEL whose every sampling run is watched by what `start()` returns; `model` itself is left alone.

    A MODEL that is watched already is watched by all of them, through one pair of wrappers: so none sees what another does
    in `before`.
    """
    earlier = [wrapper.__self__.starts for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)]
    watched = _Watched((*chain.from_iterable(earlier), start))
    clone = model.clone()
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, watched.sampling), (WrappersMP.APPLY_MODEL, watched.model_call)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


@dataclass
class _Run:
    """A sampling run that is under way; its sigmas are known from the first call on."""

    seed: int | None
    watchers: list[SamplingWatcher] = field(default_factory=list)
    sigmas: tuple[float, ...] = ()


class _Watched:
    """The wrappers of one clone: `starts` make the watchers of each sampling run."""

    def __init__(self, starts: tuple[Callable[[], SamplingWatcher], ...]):
        self.starts = starts
        self._running: list[_Run] = []

    def sampling(self, executor, *args, **kwargs):
        run = _Run(inspect.signature(executor.original).bind(*args, **kwargs).arguments.get("seed"))
        watchers = run.watchers
        self._running.append(run)
        try:
            for start in self.starts:
                watchers.append(start())
            result = executor(*args, **kwargs)
            while watchers:
                watchers[0].finish()
                del watchers[0]
        except BaseException:  # an interrupt is no Exception on every version of the host
            for watcher in watchers:
                watcher.abandon()
            raise
        finally:
            self._running.pop()
        return result

    def model_call(self, executor, *args, **kwargs):
        if not self._running:  # a call outside of sampling, such as a test of memory
            return executor(*args, **kwargs)
        run = self._running[-1]
        call = _model_call(executor.class_obj.diffusion_model, run, lambda: executor(*args, **kwargs), *args, **kwargs)
        for watcher in run.watchers:
            watcher.before(call)
        with ExitStack() as all_watching:
            for watcher in run.watchers:
                all_watching.enter_context(watcher.watching(call))
            return executor(*args, **kwargs)


def _model_call(
    model: nn.Module,
    run: _Run,
    again: Callable[[], Tensor],
    x,
    t,
    c_concat=None,
    c_crossattn=None,
    control=None,
    transformer_options=None,
    *,
    guidance=None,
    ref_latents=None,
    **conditions,
) -> ModelCall:
    """The arguments of BaseModel.apply_model, named."""
    options = transformer_options
    parts = options.get("cond_or_uncond") or [0]
    images = len(x) // len(parts)
    if not run.sigmas:
        run.sigmas = tuple(options["sample_sigmas"].tolist())
    return ModelCall(
        model=model,
        x=x,
        sigma=t,
        sigmas=run.sigmas,
        context=c_crossattn,
        conditional=tuple(part == 0 for part in parts for _ in range(images)),
        images=images,
        references=tuple(ref_latents or ()),
        guidance=guidance,
        seed=run.seed,
        again=again,
    )
