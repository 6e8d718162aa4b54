"""What the recording nodes do with one sampling run each: the library's recorders, and words on the node when it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..analysis.decoding import Decode
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Layout
from ..progress import Progress
from ..recording.amplification import AmplificationProbe, probed_steps
from ..recording.atlas import Atlas, add_to_atlas, check_atlas
from ..recording.internals import Internals, check_file, replace_in_file
from ..recording.lens_rows import LensRecorder
from ..recording.neurons import InternalsRecorder
from ..recording.places import PlacesRecorder
from ..recording.queued import MARK, QueuedRun, add_run
from ..recording.recording import Recording
from ..recording.rows import RowRecorder
from ..recording.states import StateRecorder
from ..recording.store import HiddenStates
from . import computing, host
from .graph import inputs_of, prompt_below, running_graph
from .tokens import token_texts
from .watching import SampledCall, SamplingWatcher

LEFT_OUT = "The run did not finish: what it recorded was left out."
UNKNOWN_WORDS = (
    "The words of its text are not known: connect the text encoder that encodes it to clip, and where another node gives the "
    "prompt, that to prompt."
)


@dataclass(frozen=True)
class Recorded:
    """What a recording node records, and of which model."""

    recording: Recording
    layout: Layout
    fingerprint: Fingerprint

    def store(self) -> HiddenStates:
        """Raises `UserError` where the folder holds another model's."""
        return HiddenStates.for_model(self.recording.states_folder, self.layout.family, self.fingerprint)

    def check(self) -> None:
        """Raises `UserError` where what is recorded could not be added to what is there."""
        check_file(self.recording.internals_file, self.fingerprint)


class InternalsRun(SamplingWatcher):
    """One sampling run whose neurons are counted; by `node_id` it is known which run of a queue it is, and by `drawn` which
    images are drawn."""

    def __init__(
        self, target: Recorded, graph: dict[str, str], ignore_padding: bool = True, positive_only: bool = False,
        append: bool = True, node_id: str | None = None, drawn: str = "",
    ):  # fmt: skip
        target.check()  # before the work, not after it
        self.target, self.graph, self.node_id = target, graph, node_id
        self.ignore_padding, self.positive_only, self.append, self.drawn = ignore_padding, positive_only, append, drawn
        self.recorder = InternalsRecorder(target.layout.sites)

    def watching(self, model: nn.Module, call: SampledCall):
        return self.recorder.watching(model, call.counting(self.target.layout, self.ignore_padding, self.positive_only))

    def finish(self) -> str:
        recorded, name = self.recorder.results(), host.name_of(self.target.recording.folder)
        if not recorded:
            return self.recorder.note or "The sampler made no step: nothing was recorded."
        new = Internals.new(
            self.target.layout.family,
            self.target.fingerprint,
            recorded,
            self.recorder.calls,
            workflow=self.graph,
            padded=self.recorder.padded,
            drawn=self.drawn,
        )
        file, queued = self.target.recording.internals_file, inputs_of(running_graph(), self.node_id).get(MARK)
        total = add_run(file, new, QueuedRun.from_json(queued)) if self.append else replace_in_file(file, new)
        text = f"{name}: {total.runs} run{'s' if total.runs > 1 else ''}, {total.steps} model calls"
        return "\n".join(filter(None, [text, self.recorder.note]))

    def abandon(self) -> str:
        return LEFT_OUT


def prompted(call: SampledCall, node_id: str) -> SampledCall:
    """The call with the prompt that the graph says below the node."""
    return replace(call, prompts=(prompt_below(running_graph(), node_id),) * call.count)


class AtlasRun(SamplingWatcher):
    """One sampling run whose neurons' strongest places are recorded, with its pictures where there is an autoencoder, and the
    words of its text where there is its encoder. The prompt is the graph's where none is given."""

    def __init__(
        self, target: Recorded, recorder: PlacesRecorder, decode: Decode | None, node_id: str, clip: Any = None,
        prompt: str | None = None,
    ):  # fmt: skip
        sites = [site.name for site in recorder.sites]
        check_atlas(target.recording.atlas_file, target.fingerprint, sites, recorder.maps)  # before the work, not after it
        self.target, self.recorder, self.decode, self.node_id = target, recorder, decode, node_id
        self.clip, self.prompt = clip, prompt
        self.context: torch.Tensor | None = None
        self.latents: torch.Tensor | None = None

    def watching(self, model: nn.Module, call: SampledCall):
        if not self.recorder.images:
            told = None if self.prompt is None else (self.prompt,) * call.count
            call = prompted(call, self.node_id) if told is None else replace(call, prompts=told)
            self.context = None if call.context is None or not call.rows else call.context[call.rows[0]]
        return self.recorder.watching(model, call.counting(self.target.layout))

    def drew(self, latents: torch.Tensor) -> None:
        self.latents = latents

    def finish(self) -> str:
        found, recording = self.recorder.results(), self.target.recording
        if not found:
            return self.recorder.note or "The sampler made no step: nothing was recorded."
        family, images, note = self.target.layout.family, self.recorder.images, ""
        if self.clip is not None:
            prompt = images[0].prompt if self.prompt is None else self.prompt
            texts = token_texts(self.clip, prompt, self.context) if prompt and self.context is not None else ()
            images, note = tuple(replace(image, texts=texts) for image in images), "" if texts else UNKNOWN_WORDS
        new = Atlas.new(family, self.target.fingerprint, found, images)
        if self.decode is not None and self.latents is not None:
            recording.write_atlas_pictures(images, self.decode(self.latents))
        total = add_to_atlas(recording.atlas_file, new)
        size = f"{recording.atlas_file.stat().st_size / 1e9:.3g} GB"
        return "\n".join(filter(None, [f"{len(total.images)} images, {size}", note, self.recorder.note]))

    def abandon(self) -> str:
        return LEFT_OUT


class StoreRun(SamplingWatcher):
    """One sampling run that is recorded to the store: lens rows, block states or trajectories."""

    def __init__(self, recorder: LensRecorder | StateRecorder | RowRecorder, node_id: str | None = None):
        self.recorder, self.node_id = recorder, node_id
        self.run = recorder.begin()

    def watching(self, model: nn.Module, call: SampledCall):
        if self.run.drawing is None and self.node_id is not None:
            call = prompted(call, self.node_id)
        return self.run.watching(model, call)

    def finish(self) -> str:
        if self.run.drawing is None:
            return "The sampler made no step: nothing was recorded."
        self.run.finish()
        return "\n".join(filter(None, [self.said(), self.run.note]))

    def said(self) -> str:
        """What is there by now."""
        store, kind = self.recorder.store, self.run.kind
        size = f"{store.bytes(kind) / 1e9:.3g} GB"
        if kind == "lens":
            return f"{store.image_count(kind)} images, {size} of lens rows"
        kept = sum(len(shard.captures) for shard in store.manifest.shards if shard.kind == kind)
        return f"{kept} {'block states' if kind == 'blocks' else kind}, {size}"

    def abandon(self) -> str:
        if self.run.kind == "lens":
            return LEFT_OUT
        return "The run did not finish: what it recorded up to there stays, each step is whole."


class RowsRun(StoreRun):
    """One sampling run whose rows are recorded, and the amplifications that are not measured yet."""

    recorder: RowRecorder

    def __init__(
        self, recorder: RowRecorder, layout: Layout, probe_steps: int, node_id: str | None, progress: Progress | None = None
    ):
        super().__init__(recorder)
        self.layout, self.showing, self.progress = layout, node_id, progress
        self.probe = AmplificationProbe(layout, recorder.store.amplification)
        self.probe_steps = probe_steps
        self.probed: set[int] = set()

    def steps_to_probe(self, call: SampledCall) -> set[int]:
        return probed_steps(len(call.sigmas) - 1, self.probe_steps if self.probe.calls else 0)

    def before(self, model: nn.Module, call: SampledCall) -> None:
        """Measures at the first call of a probed step; samplers of higher order and several prompts call more than once."""
        steps = self.steps_to_probe(call)
        if call.step in steps - self.probed and call.rows:
            self.probed.add(call.step)
            self._probe(model, call, f"step {len(self.probed)} of {len(steps)}, once only")

    def _probe(self, model: nn.Module, call: SampledCall, which: str) -> None:
        assert call.again is not None
        calls, again = self.probe.calls, call.again
        what = f"measuring what an error in each layer does to the picture, {which}"
        progress, done = self.progress or computing.NodeProgress(self.showing), 0

        def velocity() -> torch.Tensor:
            nonlocal done
            progress(what, done, calls)
            done += 1
            return again()

        self.probe.measure(model, call.sigma_now, velocity)
        progress(what, calls, calls)

    def watching(self, model: nn.Module, call: SampledCall):
        return super().watching(model, call.counting(self.layout))

    def finish(self) -> str:
        if measured := self.probe.results():  # before the rows, by which it is known that these images are there
            self.recorder.store.add_amplification(measured)
        return super().finish()

    def said(self) -> str:
        store = self.recorder.store
        site, size = store.scarcest(self.recorder.sites), store.bytes("rows") / 1e9
        count, needed = store.count(site.name), site.regressors
        lines = [f"{store.image_count('rows')} images, {size:.3g} GB of rows"]
        if count < needed:
            lines.append(f"{count:,} of {needed:,} rows recorded of each MLP")
        else:
            lines.append(f"{count:,} rows recorded of each MLP: enough for a plan")
        if self.recorder.full and 0 < count < needed:
            lines.append(f"They would take about {size * needed / count:.3g} GB: raise max_gb.")
        return "\n".join(lines)

    def abandon(self) -> str:
        return LEFT_OUT
