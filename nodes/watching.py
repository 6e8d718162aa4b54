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
    """A call of the sampler's.

    `conditional` [batch] is False for rows of the negative prompt (CFG). `real` [batch, words] are the words that are no
    padding as far as the conditioning tells, `marked` whether a text encoder has told of its own padding for all rows.
    """

    conditional: tuple[bool, ...] = ()
    real: Tensor | None = None
    marked: bool = False

    def counting(self, layout: Layout, ignore_padding: bool = True, positive_only: bool = True) -> SampledCall:
        """The call, and which tokens of it count: reference tokens and padding are left out by `ignore_padding`, negative rows
        by `positive_only`.

        Text that is padded by its encoder is told of by a mask in the conditioning (FLUX.2 klein's encoder, and Calibrate for
        all), what the host pads to FLUX.2's length by the length of the text. FLUX.1's T5 tells nothing: there the call is
        `padded`, and so is everywhere what `ignore_padding` lets in.
        """
        assert self.context is not None
        device, batch = self.x.device, len(self.x)
        image = _image_tokens(self.x, layout.patch)
        extra = sum(_image_tokens(reference, layout.patch) for reference in self.references)
        # On the CPU: whether all tokens count is known without waiting for the device.
        img, txt = (
            torch.ones(batch, image + extra, dtype=torch.bool),
            torch.ones(batch, self.context.shape[1], dtype=torch.bool),
        )
        if ignore_padding:
            img[:, image:] = False
            if self.real is not None:
                txt = self.real
            elif layout.family == "flux2":
                txt = (self.context != 0).any(-1).expand(batch, -1).cpu()
        if positive_only:
            rows = torch.tensor(self.conditional)[:, None]
            img, txt = img & rows, txt & rows
        mask = TokenMask() if img.all() and txt.all() else TokenMask(img.to(device), txt.to(device))
        return replace(self, mask=mask, padded=not ignore_padding or not (self.marked or layout.family == "flux2"))


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

    def drew(self, latents: Tensor) -> None:
        """Called with what the run ended at, as an autoencoder takes it, before it is finished."""
        return

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
    """A sampling run that is under way; its sigmas are known from the first call on.

    `texts`, by the host's id of a conditioning: how many words it has, and which of them are no padding, [.., words], where its
    encoder has told.
    """

    seed: int | None
    replaced: Mapping[str, Any]
    texts: Mapping[Any, tuple[int, Tensor | None]] = field(default_factory=dict)
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
        run = _Run(seed, _replaced(guider.model_options.get("transformer_options")), _texts(guider))
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
                    watchers[0].drew(result)
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
        options = inspect.signature(executor.original).bind(*args, **kwargs).arguments.get("transformer_options")
        if _replaced(options) != run.replaced:
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


def _texts(guider: Any) -> dict[Any, tuple[int, Tensor | None]]:
    conditionings = chain.from_iterable(getattr(guider, "conds", {}).values())
    return {one["uuid"]: _text(one) for one in conditionings if "uuid" in one and one.get("cross_attn") is not None}


def _text(conditioning: Mapping[str, Any]) -> tuple[int, Tensor | None]:
    """A style model makes of the mask one of attention [batch, tokens, tokens], which says nothing of padding."""
    words, mask = conditioning["cross_attn"].shape[1], conditioning.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] > words:
        return words, None
    return words, torch.nn.functional.pad(mask.bool(), (0, words - mask.shape[1]), value=True)  # more words were added to it


def _real_words(texts: Sequence[tuple[int, Tensor | None] | None], count: int, words: int) -> Tensor | None:
    """Which words are no padding, [rows, words]: `count` rows for each text, padded on the left to `words`."""
    parts = []
    for text in texts:
        if text is None or text[0] > words:
            return None
        known, mask = text
        real = torch.ones(1, known, dtype=torch.bool) if mask is None else mask.cpu()
        real = torch.nn.functional.pad(real, (words - known, 0), value=False)
        parts.append(real.repeat(-(-count // len(real)), 1)[:count])
    return torch.cat(parts) if parts else None


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

    texts = [run.texts.get(one) for one in options.get("uuids") or ()]

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
        real=_real_words(texts, count, c_crossattn.shape[1]) if len(texts) == len(parts) else None,
        marked=bool(texts) and all(text is not None and text[1] is not None for text in texts),
    )
    assert isinstance(call, SampledCall)
    return call
