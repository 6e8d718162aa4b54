"""Watching a MODEL while it samples, without a trace in it.

    watched = sampling_clone(model, Watch(node_id, lambda: [Run(...)]))  # SamplingWatchers for every sampling run

Models are watched through wrappers on a clone: hooks stand for the length of one model call, so the model that was passed in,
and every other clone of it, is never touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Layout
from ..recording.call import Call, TokenMask
from . import host

#: What the wrappers of this pack are filed under, and those of TorchCompileModel.
KEY, COMPILE_KEY = "flux_poke", "torch.compile"
UNCOMPILED = "The model ran uncompiled: TorchCompileModel has no effect on a model that is watched."


@dataclass(frozen=True)
class SampledCall(Call):
    """A call of the sampler's. `conditional` [batch] is False for rows of the negative prompt (CFG)."""

    conditional: tuple[bool, ...] = ()

    def counting(self, layout: Layout, ignore_padding: bool = True, positive_only: bool = True) -> SampledCall:
        """The call, and which tokens of it count: reference tokens and padding are left out by `ignore_padding`, negative rows
        by `positive_only`.

        FLUX.2's text is padded with zeros by the host, which is how padding is known; that of other families is not marked.
        """
        assert self.context is not None
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
        return replace(self, mask=TokenMask(img, txt)) if needed else self


def _image_tokens(latents: Tensor, patch: int) -> int:
    return -(-latents.shape[-2] // patch) * -(-latents.shape[-1] // patch)


class SamplingWatcher:
    """What takes part in one sampling run: made when it starts, told of every model call and of how it ended."""

    def before(self, model: nn.Module, call: SampledCall) -> None:
        """Called before the model call, while nobody watches: here, and only here, `call.again` may be used."""
        return

    def watching(self, model: nn.Module, call: SampledCall) -> AbstractContextManager[None]:
        """Entered around the model call."""
        raise NotImplementedError

    def finish(self) -> str:
        """The run ended well; returns what to say of it on the node."""
        raise NotImplementedError

    def abandon(self) -> str:
        """The run was interrupted or failed; returns what to say of it on the node."""
        raise NotImplementedError


@dataclass(frozen=True)
class Watch:
    """What one node does with the sampling runs of a MODEL.

    `start()` makes the watchers of one run. `records` are the folders and the kinds of data that they add to: no other node
    may add the same to the same folder, since every run would count twice.
    """

    node_id: str | None
    start: Callable[[], Sequence[SamplingWatcher]]
    records: frozenset[tuple[Path, str]] = frozenset()


def sampling_clone(model: ModelPatcher, watch: Watch) -> ModelPatcher:
    """A clone of MODEL whose every sampling run is watched; `model` itself is left alone.

    A MODEL that is watched already is watched by all of them, through one pair of wrappers: so none sees what another does
    in `before`. Raises `UserError` where one of them records the same to the same folder.
    """
    earlier = list(chain.from_iterable(one.__self__.watches for one in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)))
    for folder, kind in sorted(watch.records & {record for one in earlier for record in one.records}):
        raise UserError(
            f"The model that comes in is recorded to {host.name_of(folder)} already ({kind}), and every run would count twice: "
            "leave out one of the two Record nodes, or give one of them another name."
        )
    watched = _Watched((*earlier, watch))
    clone = model.clone()
    for wrapper_kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, watched.sampling),
        (WrappersMP.APPLY_MODEL, watched.model_call),
    ):
        clone.remove_wrappers_with_key(wrapper_kind, KEY)
        clone.add_wrapper_with_key(wrapper_kind, KEY, wrapper)
    return clone


@dataclass
class _Run:
    """A sampling run that is under way; its sigmas are known from the first call on."""

    seed: int | None
    replaced: Mapping[str, Any]
    watchers: list[SamplingWatcher] = field(default_factory=list)
    sigmas: tuple[float, ...] = ()


class _Watched:
    """The wrappers of one clone: `watches` make the watchers of each sampling run."""

    def __init__(self, watches: tuple[Watch, ...]):
        self.watches = watches
        self._running: list[_Run] = []

    def sampling(self, executor, *args, **kwargs):
        guider = executor.class_obj
        seed = inspect.signature(executor.original).bind(*args, **kwargs).arguments.get("seed")
        run = _Run(seed, _replaced(guider.model_options.get("transformer_options")))
        note = [UNCOMPILED] if guider.model_patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY) else []
        started: list[tuple[str | None, list[SamplingWatcher]]] = []
        self._running.append(run)
        try:
            for watch in self.watches:
                started.append((watch.node_id, list(watch.start())))
                run.watchers += started[-1][1]
            result = executor(*args, **kwargs)
            for node_id, watchers in started:
                said = []
                while watchers:
                    said.append(watchers[0].finish())
                    del watchers[0]
                host.say(node_id, "\n".join([*said, *note]))
        except BaseException:  # an interrupt is no Exception on every version of the host
            for node_id, watchers in started:
                if watchers:
                    host.say(node_id, "\n".join(dict.fromkeys(watcher.abandon() for watcher in watchers)))
            raise
        finally:
            self._running.pop()
        return result

    def model_call(self, executor, *args, **kwargs):
        if not self._running:  # a call outside of sampling, such as a test of memory
            return executor(*args, **kwargs)
        run = self._running[-1]
        if _replaced(_options(executor, *args, **kwargs)) != run.replaced:
            return executor(*args, **kwargs)  # a pass of guidance, with blocks skipped or attention perturbed
        model = executor.class_obj.diffusion_model
        call = _sampled_call(run, lambda: executor(*args, **kwargs), *args, **kwargs)
        for watcher in run.watchers:
            watcher.before(model, call)
        with ExitStack() as all_watching:
            for watcher in run.watchers:
                all_watching.enter_context(watcher.watching(model, call))
            return executor(*args, **kwargs)


def _replaced(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What stands in the place of parts of the model. Guidance such as SkipLayerGuidanceDiT or PerturbedAttentionGuidance adds
    to it for passes of its own, which are not what the model draws with."""
    return (options or {}).get("patches_replace", {})


def _options(executor, *args, **kwargs) -> Mapping[str, Any] | None:
    return inspect.signature(executor.original).bind(*args, **kwargs).arguments.get("transformer_options")


def _sampled_call(
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
) -> SampledCall:
    """The arguments of BaseModel.apply_model, named."""
    options = transformer_options
    parts = options.get("cond_or_uncond") or [0]
    count = len(x) // len(parts)
    first = parts.index(0) if 0 in parts else None
    if not run.sigmas:
        run.sigmas = tuple(options["sample_sigmas"].tolist())

    def velocity() -> Tensor:
        return (x - again()) / t.view(-1, *(1,) * (x.ndim - 1))

    call = SampledCall.at(
        x,
        t,
        run.sigmas,
        images=[image if part == first else None for part in range(len(parts)) for image in range(count)],
        context=c_crossattn,
        guidance=guidance,
        seed=run.seed,
        references=tuple(ref_latents or ()),
        again=velocity,
        conditional=tuple(part == 0 for part in parts for _ in range(count)),
    )
    assert isinstance(call, SampledCall)
    return call
