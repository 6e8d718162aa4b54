"""Record Internals and Internals Report."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from comfy_api.latest import io, ui

from ..analysis.report import figure_pixels, internals_figure, internals_table, internals_title
from ..errors import UserError
from ..flux.fingerprint import Fingerprint
from ..flux.layout import Layout
from ..recording.internals import Internals, add_to_file, check_file
from ..recording.neurons import InternalsRecorder
from . import host
from .inputs import DEFAULT_FILE, InternalsType
from .watching import ModelCall, SamplingWatcher, flux_layout, model_fingerprint, sampling_clone


class RecordInternals(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeRecordInternals",
            display_name="Record Internals",
            category=host.CATEGORY,
            description="Counts how often every MLP neuron of a FLUX fires while you generate, and adds it to a file "
            "at the end of each sampling run. The picture is the same with and without.",
            inputs=[
                io.Model.Input("model", tooltip="The FLUX to watch: FLUX.1, FLUX.2 or Chroma. It is not changed."),
                io.String.Input(
                    "file",
                    default=DEFAULT_FILE,
                    tooltip="Name in output/flux_poke. Each finished sampling run is added to it.",
                ),
                io.Boolean.Input(
                    "ignore_padding",
                    default=True,
                    tooltip="Leave out padded text and the tokens of reference pictures, where ComfyUI marks them (FLUX.2).",
                ),
                io.Boolean.Input(
                    "positive_only",
                    default=False,
                    tooltip="With CFG above 1: count what the positive prompt does, not the negative one.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same model, watched: connect it to the sampler."),
                InternalsType.Output(display_name="internals", tooltip="The file that is recorded to."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, file: str, ignore_padding: bool, positive_only: bool) -> io.NodeOutput:
        path = host.output_path(file, ".safetensors")
        layout, fingerprint = flux_layout(model), model_fingerprint(model)
        check_file(path, fingerprint)
        node_id, graph = cls.hidden.unique_id, host.graph_metadata(cls.hidden)

        def start() -> InternalsRun:
            return InternalsRun(path, layout, fingerprint, ignore_padding, positive_only, node_id, graph)

        return io.NodeOutput(sampling_clone(model, start), path)


class InternalsRun(SamplingWatcher):
    """One sampling run being recorded."""

    def __init__(
        self,
        path: Path,
        layout: Layout,
        fingerprint: Fingerprint,
        ignore_padding: bool,
        positive_only: bool,
        node_id: str | None,
        graph: dict[str, str],
    ):
        check_file(path, fingerprint)  # before the work, not after it
        self.path, self.layout, self.fingerprint = path, layout, fingerprint
        self.ignore_padding, self.positive_only = ignore_padding, positive_only
        self.node_id, self.graph = node_id, graph
        self.recorder = InternalsRecorder(layout.sites)
        self.calls = 0

    @contextmanager
    def watching(self, call: ModelCall):
        self.calls += 1
        with self.recorder.watching(call.model, call.mask(self.layout, self.ignore_padding, self.positive_only)):
            yield

    def finish(self) -> None:
        recorded = self.recorder.results()
        if not recorded:
            return host.say(self.node_id, "The sampler made no step: nothing was recorded.")
        new = Internals.new(self.layout.family, self.fingerprint, recorded, self.calls, workflow=self.graph)
        total = add_to_file(self.path, new)
        host.say(self.node_id, f"{self.path.name}: {total.runs} run{'s' if total.runs > 1 else ''}, {total.steps} model calls")

    def abandon(self) -> None:
        host.say(self.node_id, f"The run did not finish: nothing was added to {self.path.name}.")


class InternalsReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeInternalsReport",
            display_name="Internals Report",
            category=host.CATEGORY,
            description="Draws what was recorded: how often every neuron fires, and which never or always do.",
            is_output_node=True,
            inputs=[
                InternalsType.Input(
                    "internals", optional=True, tooltip="From Record Internals; or leave open and name a file."
                ),
                io.String.Input("file", default=DEFAULT_FILE, tooltip="Name in output/flux_poke, where nothing is connected."),
                io.AnyType.Input(
                    "after", optional=True, tooltip="Connect the sampler's latent here, so that the report is drawn after it."
                ),
            ],
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return float("nan")  # the file changes while the inputs do not

    @classmethod
    def execute(cls, file: str, internals: Path | None = None, after=None) -> io.NodeOutput:
        path = internals or host.output_path(file, ".safetensors")
        if not path.exists():
            raise UserError(
                f"{path.name} is not there yet: run a graph with Record Internals first, and connect the sampler's latent to "
                "'after' so that the report waits for it."
            )
        recorded = Internals.load(path)
        image, text = host.to_image(figure_pixels(internals_figure(recorded))), internals_table(recorded)
        host.say(cls.hidden.unique_id, internals_title(recorded))
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))
