"""The work of the node Calibrate: every image drawn, recorded and added on its own, with progress over all of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Layout
from ..recording.amplification import AmplificationProbe
from ..recording.calibration import AskedImage, Effort, LevelsToProbe, effort_of
from ..recording.manifest import Limit
from ..recording.rows import RowChoice, RowRecorder
from . import host
from .computing import NodeProgress, throw_if_cancelled
from .recorders import InternalsRun, Recorded, RowsRun
from .watching import SampledCall, Watch, sampling_clone

#: Texts that are encoded before their images are drawn: text encoder and model need not be in memory together.
TEXTS = 100
#: Share of the space on disk that is planned with: texts differ in length.
LEFT = 0.99
#: Side of a token in pixels, of every family.
TOKEN = 16


@dataclass(frozen=True)
class Drawer:
    """How images are drawn with a MODEL: size in pixels, Euler steps, and guidance where the model takes it."""

    model: ModelPatcher
    clip: Any
    layout: Layout
    width: int
    height: int
    steps: int
    guidance: float | None

    @property
    def settings(self) -> str:
        guided = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"{self.width}x{self.height}, {self.steps} steps{guided}"

    def conditioning(self, prompt: str) -> list:
        """A prompt as samplers take it; raises `UserError` where the text encoder is not the model's."""
        throw_if_cancelled()
        tokens = self.clip.tokenize(prompt)
        found = self.clip.encode_from_tokens_scheduled(tokens)
        text, pooled = found[0][0], found[0][1].get("pooled_output")
        for what, given, read in (
            ("texts", text.shape[-1], self.layout.context),
            ("pooled texts", 0 if pooled is None else pooled.shape[-1], self.layout.vector),
        ):
            if read and given != read:
                raise UserError(
                    f"The CLIP that is connected gives {what} of {given:,} channels, and the model reads {read:,}: connect the "
                    "model's own text encoder (for FLUX.1: Load CLIP (Dual) with the type flux)."
                )
        told: dict[str, Any] = {} if self.guidance is None else {"guidance": self.guidance}
        if "attention_mask" not in found[0][1] and (real := real_words(self.clip, tokens, text.shape[1])) is not None:
            told["attention_mask"] = real
        return node_helpers.conditioning_set_values(found, told)

    def tokens(self, conditionings: Sequence[list]) -> dict[str, int]:
        """By stream, how many tokens of a model call count: on average, where texts differ in length."""
        masks = [found[0][1].get("attention_mask", torch.ones(1, found[0][0].shape[1])) for found in conditionings]
        words = sum(int(mask.sum()) for mask in masks)
        img, txt = (self.width // TOKEN) * (self.height // TOKEN), words // len(masks)
        return {"img": img, "txt": txt, "single": img + txt}

    def draw(self, watched: ModelPatcher, image: AskedImage, conditioning: list, callback) -> None:
        side = TOKEN // self.layout.patch
        channels = watched.get_model_object("latent_format").latent_channels
        latent = torch.zeros(1, channels, self.height // side, self.width // side, device=_intermediate())
        noise = comfy.sample.prepare_noise(latent, image.seed)
        comfy.sample.sample(
            watched, noise, self.steps, 1.0, "euler", "simple", conditioning, conditioning, latent, callback=callback,
            disable_pbar=True, seed=image.seed,
        )  # fmt: skip


def real_words(clip: Any, tokens: Mapping[str, Any], words: int) -> Tensor | None:
    """Which of a text's words are no padding, [1, words], where ComfyUI's T5 made them, which pads at the end; else None."""
    tokenizer = getattr(clip.tokenizer, "t5xxl", None) or getattr(clip.tokenizer, "clip_t5xxl", None)
    batches = tokens.get("t5xxl", ())
    if tokenizer is None or len(batches) != 1 or len(batches[0]) != words:
        return None
    ids = [token[0] for token in batches[0]]
    padding = sum(1 for _ in itertools.takewhile(lambda id: isinstance(id, int) and id == tokenizer.pad_token, ids[::-1]))
    return torch.arange(words)[None] < words - padding


def _intermediate() -> torch.device:
    return comfy.model_management.intermediate_device()


def calibrate(
    draw: Drawer,
    where: Recorded,
    asked: Sequence[AskedImage],
    missing: Sequence[AskedImage],
    max_gb: float,
    graph: dict[str, str],
    node_id: str | None,
) -> str:
    """Draws and records the `missing` of the `asked` images; what to say of it.

    Each is added when it is done. Raises `UserError` before the first where a plan would not have enough of them.
    """
    texts = _encoded(draw, missing)
    first = next(texts)
    tokens = draw.tokens([conditioning for _, conditioning in first])
    effort = effort_of(where.recording, where.layout, len(asked), len(missing), draw.steps, tokens, max_gb * 1e9, LEFT)
    store = where.store()
    choice = RowChoice(effort.rows << store.manifest.halvings, draw.steps)
    recorder = RowRecorder(where.layout.sites, store, choice, Limit(max_gb), shard_bytes=float("inf"))
    levels = LevelsToProbe(len(missing), draw.steps, set())
    measured = store.manifest.amplification
    enough = [key for key, known in measured.items() if len(known) >= levels.all]
    levels.known.update(level for key in measured.keys() - enough for level in measured[key])
    calls = AmplificationProbe(where.layout, enough).calls * levels.needed
    meter = Meter(node_id, draw, effort, calls)
    meter.say_effort(len(asked))

    def start() -> list:  # rows come last: by them it is known that an image is there
        assert meter.image is not None
        counting = InternalsRun(where, graph, drawn=meter.image.name)
        return [counting, ImageRun(recorder, where.layout, meter, enough, levels)]

    records = frozenset((where.recording.folder, kind) for kind in ("internals", "rows"))
    watched = sampling_clone(draw.model, Watch(None, start, records))
    while first:
        for image, conditioning in first:
            meter.image = image
            draw.draw(watched, image, conditioning, meter.step)
        first = next(texts, [])
    return meter.result


def _encoded(draw: Drawer, images: Sequence[AskedImage]) -> Iterator[list[tuple[AskedImage, list]]]:
    """Images and their conditioning, some at a time."""
    for start in range(0, len(images), TEXTS):
        yield [(image, draw.conditioning(image.prompt)) for image in images[start : start + TEXTS]]


class Meter:
    """How far all of the drawing is, in model calls, on the node; the newest preview, and how long it takes.

    How long is predicted once, from the first step.
    """

    def __init__(self, node_id: str | None, draw: Drawer, effort: Effort, probed: int):
        self.image: AskedImage | None = None
        self.effort, self.probed, self.result = effort, probed, ""
        self._node_id, self.drawn = node_id, 0
        self._done, self._total = 0, effort.calls + probed
        self._bar, self._progress = comfy.utils.ProgressBar(self._total), NodeProgress(node_id)
        self._previewer = latent_preview.get_previewer(draw.model.load_device, draw.model.model.latent_format)
        self._begun = self._predicted = 0.0

    def say_effort(self, asked: int) -> None:
        there = asked - self.effort.images
        parts = [f"{there} of {asked} images are there. " if there else "", f"{self.effort}."]
        if self.probed:
            parts.append(
                f" {self.probed:,} more model calls, once only, measure what an error in each layer does to the picture."
            )
        self._words = "".join(parts)
        host.say(self._node_id, self._words)

    def begin(self) -> None:
        """Called before each model call: the first one comes when the model is in its place."""
        if not self._begun:
            self._begun, self._progress = time.monotonic(), NodeProgress(self._node_id, below=self._words)
            self._show("first step")

    def probing(self, what: str, done: float, calls: float) -> None:
        """Progress of the model calls that one probed step takes."""
        self._show(what, done)
        if done >= calls:
            self._done += int(calls)

    def step(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        """Called by the sampler after each of its steps."""
        self._done += 1
        taken = time.monotonic() - self._begun
        self._predicted = self._predicted or taken / self._done * self._total
        preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
        self._bar.update_absolute(self._done, self._total, preview)
        self._show(f"image {self.drawn + 1} of {self.effort.images}")

    def finished(self, said: str) -> None:
        """Called when an image is recorded, with what is there by now."""
        self.drawn += 1
        taken = time.monotonic() - self._begun
        self.result = (
            f"{said} {self.drawn} images drawn in {_span(taken)} (predicted after the first step: {_span(self._predicted)})."
        )

    def _show(self, what: str, more: float = 0) -> None:
        self._progress(what, self._done + more, self._total)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class ImageRun(RowsRun):
    """The sampling run of one image, and what it measures of the amplifications that are not among those known `enough`."""

    def __init__(self, recorder: RowRecorder, layout: Layout, meter: Meter, enough: Collection[str], levels: LevelsToProbe):
        super().__init__(recorder, layout, 0, None, meter.probing)
        assert meter.image is not None
        self.image, self.meter, self.levels = meter.image, meter, levels
        self.probe = AmplificationProbe(layout, enough)
        self._steps: set[int] | None = None

    def steps_to_probe(self, call: SampledCall) -> set[int]:
        if self._steps is None:
            self._steps = self.levels.next(call.sigmas) if self.probe.calls else set()
        return self._steps

    def before(self, model: nn.Module, call: SampledCall) -> None:
        self.meter.begin()
        super().before(model, call)

    def watching(self, model: nn.Module, call: SampledCall) -> AbstractContextManager[None]:
        return super().watching(model, replace(call, known_drawn=self.image.name, prompts=(self.image.prompt,)))

    def finish(self) -> str:
        said = super().finish()
        self.meter.finished(said)
        return said
