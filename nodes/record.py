"""The nodes that record: they watch a MODEL, and each finished sampling run is added to a folder in output/flux_poke."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from comfy_api.latest import io

from ..errors import UserError
from ..flux.blocks import choose_blocks
from ..flux.layout import select_sites
from ..recording.atlas import BYTES, MAP, PLACES
from ..recording.lens_rows import LensRecorder
from ..recording.places import PlacesRecorder
from ..recording.recording import Recording
from ..recording.rows import RowChoice, RowRecorder, estimated_bytes
from ..recording.states import StateChoice, StateKind, StateRecorder, estimated_state_bytes, indices_around
from ..recording.store import Limit
from . import host, inputs
from .models import flux_layout, model_fingerprint
from .recorders import AtlasRun, InternalsRun, Recorded, RowsRun, StoreRun
from .watching import Watch, sampling_clone

RecordOptionsType = io.Custom("RECORD_OPTIONS")


@dataclass(frozen=True)
class Chosen:
    """Which MLPs and noise levels rows are kept of, what happens at max_gb, and which tokens are counted."""

    streams: tuple[str, ...] = ("img", "txt", "single")
    sigmas: tuple[float, float] = (0.0, 1.0)
    when_full: Literal["thin", "stop"] = "thin"
    ignore_padding: bool = True
    positive_only: bool = False
    sample_seed: int = 0
    append: bool = True


class RecordOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        streams = ["all", "img", "txt", "single"]
        full = "At max_gb: halve every image's share while enough rows for a plan are left, or take no more."
        return inputs.schema(
            cls,
            "Record Options (Flux Poke)",
            "What else may be chosen for Record: which MLPs and noise levels, and which tokens count.",
            [
                inputs.choice("streams", streams, "Of which MLPs rows are kept: image, text, single blocks."),
                *inputs.noise_levels(),
                inputs.choice("when_full", ["thin", "stop"], full),
                *inputs.counted_tokens(),
                inputs.sample_seed(),
                append(),
            ],
            [RecordOptionsType.Output(display_name="options", tooltip="For Record.")],
            hidden=[],
        )

    @classmethod
    def execute(cls, streams, sigma_from, sigma_to, **chosen) -> io.NodeOutput:
        which = ("img", "txt", "single") if streams == "all" else (streams,)
        return io.NodeOutput(Chosen(which, (sigma_from, sigma_to), **chosen))


class RecordNode(io.ComfyNode):
    """Watches MODEL and gives it back, with the RECORDING that its runs are added to."""

    @classmethod
    def schema(cls, display_name: str, description: str, own: list[io.Input]) -> io.Schema:
        name = "Folder in output/flux_poke; each finished run adds to it. Not asked where a recording is connected."
        other = "Add to this recording instead of the one that is called name."
        return inputs.schema(
            cls,
            display_name,
            f"{description} TorchCompileModel has no effect on a model that is recorded.",
            [inputs.model(), inputs.text("name", "recording", name), inputs.recording(other, optional=True), *own],
            [inputs.watched_output(), inputs.recording_output()],
        )

    @classmethod
    def target(cls, model, name: str, recording: Recording | None) -> Recorded:
        """Where to record and of what; raises `UserError` where it holds what cannot be added to."""
        recording = recording or Recording.at(host.output_path(name))
        if recording.folder.exists() and not recording.folder.is_dir():
            raise UserError(f"{host.name_of(recording.folder)} is a file: choose another name for the recording.")
        found = Recorded(recording, flux_layout(model), model_fingerprint(model))
        found.check()
        return found

    @classmethod
    def watched(cls, model, where: Recorded, start, *kinds: str) -> io.NodeOutput:
        records = frozenset((where.recording.folder, kind) for kind in kinds)
        return io.NodeOutput(sampling_clone(model, Watch(cls.hidden.unique_id, start, records)), where.recording)

    @classmethod
    def record_states(cls, model, where: Recorded, kind: StateKind, indices, choice: StateChoice, max_gb) -> io.NodeOutput:
        """Records block states or trajectories; says on the node how much it takes."""
        size = estimated_state_bytes(kind, where.layout, indices, choice, 100, image_tokens=4096, words=512)
        node_id = cls.hidden.unique_id
        host.say(node_id, f"About {size / 1e9:.3g} GB for 100 recorded steps of 1024x1024 pixels")
        recorder = StateRecorder(kind, where.store(), choice, Limit(max_gb, "stop"), indices)
        return cls.watched(model, where, lambda: [StoreRun(recorder, node_id)], kind)


def row_limits(what: str) -> list[io.Input]:
    return [
        inputs.whole("steps", 0, 0, 1000, f"{what}, drawn at random; 0 = 5 % of them, at least one."),
        inputs.number("max_gb", 64.0, 0.001, 100000.0, 0.1, "Disk space it may take, in GB."),
    ]


def append() -> io.Input:
    tooltip = "On: counts add up over runs. Off: the counts of each run take the place of those that the recording holds."
    return io.Boolean.Input("append", default=True, optional=True, tooltip=tooltip)


def step_inputs() -> list[io.Input]:
    """Which steps are kept, as the nodes ask that record one kind alone."""
    return [*row_limits("Steps per image"), *inputs.noise_levels(), inputs.sample_seed()]


class Record(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = "Tokens per MLP, image and step whose input is kept, for repair and retraining."
        probe_steps = (
            "At how many steps of the first run it is measured what an error in each MLP does to the picture, which weighs "
            "errors in plans by budget; the last step is always among them. Each takes two more model calls for every MLP "
            "(153 for FLUX.1); 0 = never."
        )
        return cls.schema(
            "Record (Flux Poke)",
            "Records all that pruning needs while you generate: how often every MLP neuron fires, samples of what every MLP "
            "reads (rows), and how much an error in each MLP moves the picture. The picture is the same with and without.",
            [
                inputs.whole("rows", 64, 1, 65536, rows),
                *row_limits("Steps per image at which rows are kept"),
                *inputs.advanced(inputs.whole("probe_steps", 4, 0, 1000, probe_steps)),
                RecordOptionsType.Input("options", optional=True, tooltip="From Record Options: what else may be chosen."),
            ],
        )

    @classmethod
    def execute(
        cls, model, name, rows, steps, max_gb, probe_steps, recording=None, options: Chosen | None = None
    ) -> io.NodeOutput:
        where, chosen, node_id = cls.target(model, name, recording), options or Chosen(), cls.hidden.unique_id
        layout, graph = where.layout, host.graph_metadata(cls.hidden)
        recorded = replace(layout, sites=select_sites(layout, streams=chosen.streams))
        choice = RowChoice(rows, steps or None, chosen.sigmas, chosen.sample_seed)
        recorder = RowRecorder(recorded.sites, where.store(), choice, Limit(max_gb, chosen.when_full))
        size = estimated_bytes(recorded, choice, 20, 100)
        host.say(node_id, f"At most {size / 1e9:.3g} GB for 100 images of 20 steps")

        def start() -> list:
            counting = InternalsRun(where, graph, chosen.ignore_padding, chosen.positive_only, chosen.append, node_id)
            return [counting, RowsRun(recorder, recorded, probe_steps, node_id)]

        return cls.watched(model, where, start, "internals", "rows")


class RecordInternals(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Record Internals",
            "Counts how often every MLP neuron of a FLUX fires while you generate, and nothing else: enough for reports, for "
            "plans by frequency, threshold or fluctuation, and for bias repair. The picture is the same with and without.",
            [*inputs.counted_tokens(), append()],
        )

    @classmethod
    def execute(cls, model, name, ignore_padding, positive_only, append=True, recording=None) -> io.NodeOutput:
        where, graph, node_id = cls.target(model, name, recording), host.graph_metadata(cls.hidden), cls.hidden.unique_id

        def start() -> list:
            return [InternalsRun(where, graph, ignore_padding, positive_only, append, node_id)]

        return cls.watched(model, where, start, "internals")


class RecordBlockStates(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Record Block States",
            "Keeps all that enters and leaves blocks at some steps, for retraining them. It takes much space.",
            [inputs.text("blocks", "all", "Such as 'double 0-3, single 37'; all takes the most space."), *step_inputs()],
        )

    @classmethod
    def execute(cls, model, name, blocks, steps, max_gb, sigma_from, sigma_to, sample_seed, recording=None) -> io.NodeOutput:
        where, choice = cls.target(model, name, recording), StateChoice(steps or None, (sigma_from, sigma_to), sample_seed)
        indices = indices_around(choose_blocks(blocks, where.layout), where.layout)
        return cls.record_states(model, where, "blocks", indices, choice, max_gb)


class RecordTrajectories(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Record Trajectories",
            "Keeps latents and the velocity that the model gives for them at some steps, for retraining all layers at once "
            "(distill).",
            step_inputs(),
        )

    @classmethod
    def execute(cls, model, name, steps, max_gb, sigma_from, sigma_to, sample_seed, recording=None) -> io.NodeOutput:
        where, choice = cls.target(model, name, recording), StateChoice(steps or None, (sigma_from, sigma_to), sample_seed)
        return cls.record_states(model, where, "trajectories", (), choice, max_gb)


class RecordLensRows(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Record Lens Rows",
            "Samples the same image tokens after every block: what flux-poke lens fit makes a lens of, for Tap Blocks.",
            [inputs.whole("rows", 64, 1, 65536, "Tokens per image and step."), *step_inputs()],
        )

    @classmethod
    def execute(cls, model, name, rows, steps, max_gb, sigma_from, sigma_to, sample_seed, recording=None) -> io.NodeOutput:
        where, choice = cls.target(model, name, recording), RowChoice(rows, steps or None, (sigma_from, sigma_to), sample_seed)
        recorder = LensRecorder(where.layout, where.store(), choice, Limit(max_gb, "stop"))
        return cls.watched(model, where, lambda: [StoreRun(recorder)], "lens rows")


class RecordAtlas(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        maps = "Also keep how strong the neuron was over the whole picture, in 8 by 8 cells: 1 KB more for every neuron."
        vae = "The model's autoencoder: also keeps every picture, which flux-poke atlas show cuts the places out of."
        clip = "The model's text encoder: also keeps the words of its text, token by token."
        prompt = "The prompt that is drawn, where another node gives it; by default the nearest text in the graph."
        return cls.schema(
            "Record Atlas",
            "Keeps where every MLP neuron of a FLUX was strongest: the strongest token of each picture, of the 16 pictures in "
            "which it was strongest. flux-poke atlas show makes a page of it.",
            [
                inputs.text("blocks", "all", "Such as 'double 0-3, single 37'."),
                inputs.switch("maps", True, maps),
                io.Vae.Input("vae", optional=True, tooltip=vae),
                io.Clip.Input("clip", optional=True, tooltip=clip),
                io.String.Input("prompt", optional=True, force_input=True, tooltip=prompt),
            ],
        )

    @classmethod
    def execute(
        cls, model, name, blocks, maps, recording=None, vae=None, clip=None, prompt: str | None = None
    ) -> io.NodeOutput:
        where, node_id = cls.target(model, name, recording), cls.hidden.unique_id
        chosen = {block.path for block in choose_blocks(blocks, where.layout)}
        sites = [site for site in where.layout.sites if site.block in chosen]
        size = sum(site.width for site in sites) * PLACES * (BYTES + (MAP**2 if maps else 0))
        host.say(node_id, f"{sum(site.width for site in sites):,} neurons: {size / 1e9:.3g} GB, however many pictures")
        decode = None if vae is None else host.decoder(vae)

        def start() -> list:
            return [AtlasRun(where, PlacesRecorder(where.layout, sites, maps), decode, node_id, clip, prompt)]

        return cls.watched(model, where, start, "atlas")
