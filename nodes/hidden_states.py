"""Record Hidden States: samples of what every MLP reads, for repair, what every block gives, for a lens, or whole model calls,
for retraining."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count

import torch
from comfy_api.latest import io

from ..flux.blocks import choose_blocks
from ..flux.layout import Layout, select_sites
from ..recording.amplification import AmplificationProbe, probed_steps
from ..recording.lens_rows import LensRecorder
from ..recording.rows import RowChoice, RowRecorder, RowRun, estimated_bytes
from ..recording.states import StateChoice, StateKind, StateRecorder, StateRun, estimated_state_bytes, places_around
from ..recording.store import Drawing, HiddenStates, Limit
from . import computing, host
from .inputs import DEFAULT_FOLDER
from .watching import ModelCall, SamplingWatcher, flux_layout, model_fingerprint, sampling_clone

#: What `what` calls the kinds of whole model calls.
STATES: dict[str, StateKind] = {"block states": "blocks", "trajectories": "trajectories"}


class RecordHiddenStates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordHiddenStates",
            display_name="Record Hidden States",
            category=host.CATEGORY,
            description="Samples token rows of what every MLP of a FLUX reads while you generate: all that repair needs. Also "
            "measures how much an error at each MLP moves the picture, for plans by budget. Or samples what a lens is fitted "
            "on, or keeps whole block states or velocities, for retraining.",
            inputs=[
                io.Model.Input("model", tooltip="The FLUX to watch: FLUX.1, FLUX.2 or Chroma. It is not changed."),
                io.String.Input(
                    "folder", default=DEFAULT_FOLDER, tooltip="Folder in output/flux_poke; each finished run adds to it."
                ),
                io.Combo.Input(
                    "what",
                    options=["rows", "lens rows", *STATES],
                    optional=True,
                    tooltip="rows: what MLPs read, for plans and repair. lens rows: the same image tokens after every block, "
                    "for `flux-poke lens fit`. block states: all that enters and leaves blocks, for retraining them. "
                    "trajectories: latents and the velocity there, for retraining all at once.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    optional=True,
                    tooltip="For block states: which blocks, such as 'double 0-3, single 37'; all takes the most space.",
                ),
                io.Combo.Input(
                    "streams", options=["all", "img", "txt", "single"], tooltip="Which MLPs: image, text, single blocks."
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps per image, drawn at random; 0 = 5 % of them, at least one.",
                ),
                io.Int.Input("rows", default=64, min=1, max=65536, tooltip="Tokens per MLP, image and step."),
                io.Float.Input(
                    "max_gb", default=64.0, min=0.001, max=100000.0, step=0.1, tooltip="Disk space what is recorded may take."
                ),
                io.Combo.Input(
                    "when_full",
                    options=["thin", "stop"],
                    tooltip="At max_gb: halve every image's share while enough rows for a plan are left, or take no more.",
                ),
                io.Float.Input(
                    "sigma_from", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Only steps of at least this noise level."
                ),
                io.Float.Input(
                    "sigma_to", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Only steps of at most this noise level."
                ),
                io.Int.Input(
                    "probe_steps",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="At how many steps of the first run the amplification of every MLP is measured, which weighs "
                    "errors in plans by budget, and rows by their noise level. Each takes one more model call for every MLP "
                    "(77 for FLUX.1); 0 = never.",
                ),
                io.Int.Input("sample_seed", default=0, min=0, max=2**31 - 1, tooltip="Of the drawn steps and tokens."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, watched: connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        folder,
        streams,
        steps,
        rows,
        max_gb,
        when_full,
        sigma_from,
        sigma_to,
        probe_steps,
        sample_seed,
        what="rows",
        blocks="all",
    ) -> io.NodeOutput:
        layout = flux_layout(model)
        wanted = ("img", "txt", "single") if streams == "all" else (streams,)
        sites = select_sites(layout, streams=wanted)
        choice = RowChoice(rows, steps or None, (sigma_from, sigma_to), sample_seed)
        store = HiddenStates.for_model(host.output_path(folder), layout.family, model_fingerprint(model))
        limit, node_id = Limit(max_gb, when_full), cls.hidden.unique_id
        if what == "lens rows":
            return io.NodeOutput(sampling_clone(model, lambda: LensRun(store, layout, choice, limit, node_id)))
        if what in STATES:
            kind, states = STATES[what], StateChoice(steps or None, (sigma_from, sigma_to), sample_seed)
            places = places_around(choose_blocks(blocks, layout), layout)
            size = estimated_state_bytes(kind, layout, places, states, 100, image_tokens=4096, words=512)
            host.say(node_id, f"About {size / 1e9:.3g} GB for 100 recorded steps of 1024x1024 pixels")
            state_recorder = StateRecorder(kind, store, states, Limit(max_gb, "stop"), places)
            return io.NodeOutput(sampling_clone(model, lambda: StatesRun(state_recorder, node_id)))
        recorder = RowRecorder(sites, store, choice, limit)
        size = estimated_bytes(sites, layout.hidden, choice, 20, 100)
        host.say(node_id, f"At most {size / 1e9:.3g} GB for 100 images of 20 steps")
        return io.NodeOutput(sampling_clone(model, lambda: RowsRun(recorder, layout, probe_steps, node_id)))


class RowsRun(SamplingWatcher):
    """One sampling run whose rows are recorded."""

    def __init__(self, recorder: RowRecorder, layout: Layout, probe_steps: int, node_id: str | None):
        self.recorder, self.layout, self.node_id = recorder, layout, node_id
        measured = recorder.store.amplification
        self.probe = AmplificationProbe([site for site in recorder.sites if site.name not in measured])
        self.probe_steps = probe_steps if self.probe.sites else 0
        self.probed: set[int] = set()
        self.run: RowRun | None = None

    def before(self, call: ModelCall) -> None:
        """Measures at the first call of a probed step; samplers of higher order and several prompts call more than once."""
        steps = probed_steps(len(call.sigmas) - 1, self.probe_steps)
        if call.step in steps - self.probed and call.positive_rows is not None:
            self.probed.add(call.step)
            self._probe(call, f"{len(self.probed)} of {len(steps)}")

    def _probe(self, call: ModelCall, which: str) -> None:
        calls = len(self.probe.sites) + 1
        host.say(self.node_id, f"Measuring how far errors move the picture, step {which}: {calls} more model calls, once only")
        progress, done = computing.StepProgress(), count()

        def velocity() -> torch.Tensor:
            progress("", next(done), calls)
            return call.velocity()

        self.probe.measure(call.model, float(call.sigmas[call.step]), velocity)

    @contextmanager
    def watching(self, call: ModelCall):
        if call.positive_rows is None:
            yield
            return
        if self.run is None:
            self.run = self.recorder.begin(call.sigmas, call.images, call.drawn)
        mask = call.mask(self.layout, ignore_padding=True, positive_only=True)
        images = [row % call.images for row in range(len(call.x))]
        with self.run.watching(call.model, call.step, mask, images):
            yield

    def finish(self) -> None:
        if self.run is None:
            return
        self.run.finish()
        store = self.recorder.store
        store.add_amplification(self.probe.results())
        site, size = store.scarcest(self.recorder.sites), store.bytes("rows") / 1e9
        count, needed = store.count(site.name), site.regressors
        text = f"{store.folder.name}: {store.image_count} images, {size:.3g} GB, "
        text += f"{count:,} of {needed:,} rows that a plan needs"
        if self.run.drawing.times:
            text += ". These images were recorded before: change the prompt or the seed for others"
        if self.recorder.full:
            text += ". Full, nothing more is taken"
            if 0 < count < needed:
                text += f": a plan takes about {size * needed / count:.3g} GB, so raise the limit"
        host.say(self.node_id, text)

    def abandon(self) -> None:
        host.say(self.node_id, "The run did not finish: its rows were left out.")


class StatesRun(SamplingWatcher):
    """One sampling run whose model calls are recorded whole."""

    def __init__(self, recorder: StateRecorder, node_id: str | None):
        self.recorder, self.node_id = recorder, node_id
        self.run: StateRun | None = None

    @contextmanager
    def watching(self, call: ModelCall):
        if call.positive_rows is None:
            yield
            return
        if self.run is None:
            prompt = "" if self.node_id is None else host.prompt_below(host.running_graph(), self.node_id)
            seeds = None if call.seed is None else [call.seed] * call.images
            self.run = self.recorder.begin(call.sigmas, call.images, [prompt] * call.images, seeds, call.drawn)
        rows = range(*call.positive_rows.indices(len(call.x)))
        images = [row - rows.start if row in rows else None for row in range(len(call.x))]
        with self.run.watching(call.model, call.step, images):
            yield

    def finish(self) -> None:
        store, kind = self.recorder.store, self.recorder.kind
        full = ": full, nothing more is taken" if self.recorder.full else ""
        kept = sum(len(shard.captures) for shard in store.manifest.shards if shard.kind == kind)
        host.say(self.node_id, f"{store.folder.name}: {kept} {kind} of {store.bytes(kind) / 1e9:.3g} GB{full}")

    def abandon(self) -> None:
        host.say(self.node_id, "The run did not finish: what it recorded up to there stays, each step is whole.")


class LensRun(SamplingWatcher):
    """One sampling run whose tokens are recorded after every block."""

    def __init__(self, store: HiddenStates, layout: Layout, choice: RowChoice, limit: Limit, node_id: str | None):
        self.store, self.layout, self.choice, self.limit, self.node_id = store, layout, choice, limit, node_id
        self.recorder: LensRecorder | None = None
        self.drawing: Drawing | None = None
        self.images = torch.empty(0, dtype=torch.int64)
        self.steps: frozenset[int] = frozenset()

    @contextmanager
    def watching(self, call: ModelCall):
        if call.positive_rows is None:
            yield
            return
        if self.recorder is None:
            self.drawing = self.store.numbered(call.images, call.drawn)
            first = self.drawing.first
            self.recorder = LensRecorder(self.layout, self.choice.rows, seed=self.choice.seed + first)
            self.images = torch.arange(first, first + call.images)
            self.steps = self.choice.drawn_steps(call.sigmas, self.drawing.lot)
        if call.step not in self.steps:
            yield
            return
        with self.recorder.watching(call.model, call.x, call.sigma, self.images, call.positive_rows):
            yield

    def finish(self) -> None:
        if self.recorder is None or self.drawing is None:
            return
        full = "" if self.recorder.save(self.store, self.limit) else ": full, nothing more is taken"
        store = self.store
        store.recorded(self.drawing)
        host.say(
            self.node_id,
            f"{store.folder.name}: {store.image_count} images, lens rows of {store.bytes('lens') / 1e9:.3g} GB{full}",
        )

    def abandon(self) -> None:
        host.say(self.node_id, "The run did not finish: its rows were left out.")
