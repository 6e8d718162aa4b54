"""The nodes that record: they watch a MODEL, and each finished sampling run is added to a folder in output/flux_poke."""

from __future__ import annotations

from comfy_api.latest import io

from ..errors import UserError
from ..flux.blocks import choose_blocks
from ..flux.layout import select_sites
from ..recording.lens_rows import LensRecorder
from ..recording.recording import Recording
from ..recording.rows import RowChoice, RowRecorder, estimated_bytes
from ..recording.states import StateChoice, StateKind, StateRecorder, estimated_state_bytes, indices_around
from ..recording.store import Limit
from . import host
from .inputs import counted_tokens, model_input, noise_levels, recording_input, recording_output, sample_seed, watched_output
from .models import flux_layout, model_fingerprint
from .record_options import RecordOptions, RecordOptionsType
from .recorders import InternalsRun, Recorded, RowsRun, StoreRun
from .watching import Watch, sampling_clone

NO_COMPILE = "TorchCompileModel has no effect on a model that is recorded."


def target_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "name",
            default="recording",
            tooltip="Folder in output/flux_poke; each finished run adds to it. Not asked where a recording is connected.",
        ),
        recording_input("Add to this recording instead of the one that is called `name`.", optional=True),
    ]


def limits(steps: str, gb: float) -> list[io.Input]:
    return [
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"{steps}, drawn at random; 0 = 5 % of them, at least one."),
        io.Float.Input("max_gb", default=gb, min=0.001, max=100000.0, step=0.1, tooltip="Disk space it may take, in GB."),
    ]


def row_input(default: int, tooltip: str) -> io.Input:
    return io.Int.Input("rows", default=default, min=1, max=65536, tooltip=tooltip)


def target(model, name: str, recording: Recording | None) -> Recorded:
    """Where to record and of what; raises `UserError` where it holds what cannot be added to."""
    if recording is None:
        recording = Recording.at(host.output_path(name))
    if recording.folder.exists() and not recording.folder.is_dir():
        raise UserError(f"{host.name_of(recording.folder)} is a file: choose another name for the recording.")
    found = Recorded(recording, flux_layout(model), model_fingerprint(model))
    found.check()
    return found


class RecordNode(io.ComfyNode):
    """Watches MODEL and gives it back, with the RECORDING that its runs are added to."""

    @classmethod
    def watched(cls, model, where: Recorded, start, *kinds: str) -> io.NodeOutput:
        records = frozenset((where.recording.folder, kind) for kind in kinds)
        return io.NodeOutput(sampling_clone(model, Watch(cls.hidden.unique_id, start, records)), where.recording)


class Record(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecord",
            display_name="Record",
            category=host.CATEGORY,
            description="Records all that pruning needs while you generate: how often every MLP neuron fires, samples of what "
            "every MLP reads (rows), and how much an error in each MLP moves the picture. The picture is the same with and "
            f"without. {NO_COMPILE}",
            inputs=[
                model_input(),
                *target_inputs(),
                row_input(64, "Tokens per MLP, image and step whose input is kept, for repair and retraining."),
                *limits("Steps per image at which rows are kept", 64.0),
                io.Int.Input(
                    "probe_steps",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="At how many steps of the first run it is measured what an error in each MLP does to the picture, "
                    "which weighs errors in plans by budget; the last step is always among them. Each takes three more model "
                    "calls for every MLP (229 for FLUX.1); 0 = never.",
                ),
                RecordOptionsType.Input("options", optional=True, tooltip="From Record Options: what else may be chosen."),
            ],
            outputs=[watched_output(), recording_output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, model, name, rows, steps, max_gb, probe_steps, recording=None, options: RecordOptions | None = None
    ) -> io.NodeOutput:
        where, chosen, node_id = target(model, name, recording), options or RecordOptions(), cls.hidden.unique_id
        layout, graph = where.layout, host.graph_metadata(cls.hidden)
        sites = select_sites(layout, streams=chosen.streams)
        choice = RowChoice(rows, steps or None, chosen.sigmas, chosen.sample_seed)
        recorder = RowRecorder(sites, where.store(), choice, Limit(max_gb, chosen.when_full))
        size = estimated_bytes(sites, layout.hidden, choice, 20, 100)
        host.say(node_id, f"At most {size / 1e9:.3g} GB for 100 images of 20 steps")

        def start() -> list:
            counting = InternalsRun(where, graph, chosen.ignore_padding, chosen.positive_only)
            return [counting, RowsRun(recorder, layout, probe_steps, node_id)]

        return cls.watched(model, where, start, "internals", "rows")


class RecordInternals(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordInternals",
            display_name="Record Internals",
            category=host.CATEGORY,
            description="Counts how often every MLP neuron of a FLUX fires while you generate, and nothing else: enough for "
            "reports, for plans by frequency, threshold or fluctuation, and for bias repair. The picture is the same with and "
            f"without. {NO_COMPILE}",
            inputs=[
                model_input(),
                *target_inputs(),
                *counted_tokens(),
            ],
            outputs=[watched_output(), recording_output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, name, ignore_padding, positive_only, recording=None) -> io.NodeOutput:
        where, graph = target(model, name, recording), host.graph_metadata(cls.hidden)
        return cls.watched(model, where, lambda: [InternalsRun(where, graph, ignore_padding, positive_only)], "internals")


class RecordBlockStates(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordBlockStates",
            display_name="Record Block States",
            category=host.CATEGORY,
            description="Keeps all that enters and leaves blocks at some steps, for retraining them. It takes much space. "
            f"{NO_COMPILE}",
            inputs=[
                model_input(),
                *target_inputs(),
                io.String.Input("blocks", default="all", tooltip="Such as 'double 0-3, single 37'; all takes the most space."),
                *limits("Steps per image", 64.0),
                *noise_levels(),
                sample_seed(),
            ],
            outputs=[watched_output(), recording_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, name, blocks, steps, max_gb, sigma_from, sigma_to, sample_seed, recording=None) -> io.NodeOutput:
        where = target(model, name, recording)
        indices = indices_around(choose_blocks(blocks, where.layout), where.layout)
        choice = StateChoice(steps or None, (sigma_from, sigma_to), sample_seed)
        return cls.watched(model, where, record_states(cls, where, "blocks", indices, choice, max_gb), "block states")


class RecordTrajectories(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordTrajectories",
            display_name="Record Trajectories",
            category=host.CATEGORY,
            description="Keeps latents and the velocity that the model gives for them at some steps, for retraining all layers "
            f"at once (distill). {NO_COMPILE}",
            inputs=[model_input(), *target_inputs(), *limits("Steps per image", 64.0), *noise_levels(), sample_seed()],
            outputs=[watched_output(), recording_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, name, steps, max_gb, sigma_from, sigma_to, sample_seed, recording=None) -> io.NodeOutput:
        where, choice = target(model, name, recording), StateChoice(steps or None, (sigma_from, sigma_to), sample_seed)
        return cls.watched(model, where, record_states(cls, where, "trajectories", (), choice, max_gb), "trajectories")


def record_states(node: type[io.ComfyNode], where: Recorded, kind: StateKind, indices, choice: StateChoice, max_gb: float):
    """What starts the recording of one run; says on the node how much it takes."""
    size = estimated_state_bytes(kind, where.layout, indices, choice, 100, image_tokens=4096, words=512)
    host.say(node.hidden.unique_id, f"About {size / 1e9:.3g} GB for 100 recorded steps of 1024x1024 pixels")
    recorder, node_id = StateRecorder(kind, where.store(), choice, Limit(max_gb, "stop"), indices), node.hidden.unique_id
    return lambda: [StoreRun(recorder, node_id)]


class RecordLensRows(RecordNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordLensRows",
            display_name="Record Lens Rows",
            category=host.CATEGORY,
            description="Samples the same image tokens after every block: what `flux-poke lens fit` makes a lens of, for Tap "
            f"Blocks. {NO_COMPILE}",
            inputs=[
                model_input(),
                *target_inputs(),
                row_input(64, "Tokens per image and step."),
                *limits("Steps per image", 64.0),
                *noise_levels(),
                sample_seed(),
            ],
            outputs=[watched_output(), recording_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, name, rows, steps, max_gb, sigma_from, sigma_to, sample_seed, recording=None) -> io.NodeOutput:
        where = target(model, name, recording)
        choice = RowChoice(rows, steps or None, (sigma_from, sigma_to), sample_seed)
        recorder = LensRecorder(where.layout, where.store(), choice, Limit(max_gb, "stop"))
        return cls.watched(model, where, lambda: [StoreRun(recorder)], "lens rows")
