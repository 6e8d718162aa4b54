"""Small models of the families with random weights; their keys and shapes are written out here, from the published ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from flux_poke.cli import app, args_with_files
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.call import Call
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice, RowRecorder
from flux_poke.recording.states import StateChoice, StateRecorder
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import trajectory
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

Shapes = dict[str, tuple[int, ...]]
#: Noise levels of the run that `Recorded` draws its images in.
SIGMAS = torch.linspace(1, 0, 5)


def flux_shapes(
    family: str = "flux1",
    hidden: int = 128,
    depth: int = 2,
    depth_single: int = 2,
    context: int = 32,
    vector: int = 24,
    guidance: bool = False,
) -> Shapes:
    """Keys and shapes of a checkpoint: FLUX.1 and Chroma with biases and MLPs of ratio 4, FLUX.2 without, gated, ratio 3."""
    shapes: Shapes = {}
    gated, biased = family == "flux2", family != "flux2"

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if biased:
            shapes[f"{name}.bias"] = (outputs,)

    def embedder(name: str, inputs: int) -> None:
        linear(f"{name}.in_layer", inputs, hidden)
        linear(f"{name}.out_layer", hidden, hidden)

    def norms(name: str) -> None:
        shapes[f"{name}.norm.query_norm.scale"] = shapes[f"{name}.norm.key_norm.scale"] = (128,)

    channels = 128 if gated else 64
    width = (3 if gated else 4) * hidden
    up = 2 * width if gated else width
    linear("img_in", channels, hidden)
    linear("txt_in", context, hidden)
    if family == "chroma":
        linear("distilled_guidance_layer.in_proj", 64, hidden)
        linear("distilled_guidance_layer.out_proj", hidden, hidden)
    else:
        embedder("time_in", 256)
        if guidance:
            embedder("guidance_in", 256)
    if family == "flux1":
        embedder("vector_in", vector)
    if family == "flux2":
        linear("double_stream_modulation_img.lin", hidden, 6 * hidden)
        linear("double_stream_modulation_txt.lin", hidden, 6 * hidden)
        linear("single_stream_modulation.lin", hidden, 3 * hidden)
    for index in range(depth):
        for stream in ("img", "txt"):
            name = f"double_blocks.{index}.{stream}"
            if family == "flux1":
                linear(f"{name}_mod.lin", hidden, 6 * hidden)
            linear(f"{name}_attn.qkv", hidden, 3 * hidden)
            norms(f"{name}_attn")
            linear(f"{name}_attn.proj", hidden, hidden)
            linear(f"{name}_mlp.0", hidden, up)
            linear(f"{name}_mlp.2", width, hidden)
    for index in range(depth_single):
        name = f"single_blocks.{index}"
        linear(f"{name}.linear1", hidden, 3 * hidden + up)
        linear(f"{name}.linear2", hidden + width, hidden)
        norms(name)
        if family == "flux1":
            linear(f"{name}.modulation.lin", hidden, 3 * hidden)
    linear("final_layer.linear", hidden, channels)
    if family != "chroma":
        linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return shapes


def flux_tensors(family: str = "flux1", seed: int = 0, **sizes) -> dict[str, Tensor]:
    """Random float32 weights at which activations neither vanish nor blow up."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * 0.08 + (1 if "norm" in key else 0)
        for key, shape in flux_shapes(family, **sizes).items()
    }


def flux_inputs(model: Flux, batch: int = 2, words: int = 5, seed: int = 1) -> dict[str, Tensor]:
    """What one call of `model` takes: latents of 6 x 4 patches (so rows and columns differ) and their conditioning."""
    generator = torch.Generator().manual_seed(seed)
    layout = model.layout
    height, width = 6 * layout.patch, 4 * layout.patch
    inputs = {
        "x": torch.randn(batch, layout.in_channels // layout.patch**2, height, width, generator=generator),
        "sigma": torch.rand(batch, generator=generator),
        "context": torch.randn(batch, words, layout.context, generator=generator),
    }
    if layout.vector:
        inputs["vector"] = torch.randn(batch, layout.vector, generator=generator)
    if layout.guidance:
        inputs["guidance"] = 1 + 4 * torch.rand(batch, generator=generator)
    return inputs


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The models are small: more threads only wait for each other. What tests start computes alike, to the last bit."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, args_with_files([str(argument) for argument in arguments]))
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """What a command prints; raises its `UserError`."""
    return _run


@pytest.fixture(scope="session")
def record_digits() -> Callable[..., Path]:
    """Records internals and rows of the tiny FLUX on twenty prompts to a folder, and `blocks` if they are wanted too."""

    def record(folder: Path, blocks: bool = False) -> Path:
        (folder / "prompts.txt").write_text("\n".join(digit_prompts(number % 10)[0] for number in range(20)))
        given = ("record", FOLDER / "flux.safetensors", folder, "--prompts", folder / "prompts.txt", "--steps", 4)
        _run(*given, "--what", "internals,rows", "--keep-steps", 4)
        if blocks:
            _run(*given, "--what", "blocks", "--keep-steps", 2)
        return folder

    return record


@pytest.fixture
def shapes() -> Callable[..., Shapes]:
    return flux_shapes


@pytest.fixture(scope="session")
def tensors() -> Callable[..., dict[str, Tensor]]:
    return flux_tensors


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, types, shapes and bits."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == tensor.dtype
        and found[key].shape == tensor.shape
        and torch.equal(found[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for key, tensor in expected.items()
    )


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    return same_bits


@contextmanager
def skipped(model: Flux, index: int) -> Iterator[None]:
    """Double block `index` stands where it did and does not run, as under guidance by skipped layers on a host."""
    block = model.double_blocks[index]
    kind = type(block)

    class Passed(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args, img, txt, **kwargs):
            return img, txt

    block.__class__ = Passed
    try:
        yield
    finally:
        block.__class__ = kind


@pytest.fixture
def skipping() -> Callable[[Flux, int], AbstractContextManager[None]]:
    """`with skipping(model, index):` calls of the model leave out double block `index`."""
    return skipped


@pytest.fixture
def inputs() -> Callable[..., dict[str, Tensor]]:
    return flux_inputs


@pytest.fixture(params=["flux1", "flux1 guidance", "flux2", "flux2 guidance"])
def model(request) -> Flux:
    """A random model of each family, with and without guidance."""
    family, *guidance = request.param.split()
    return Flux.load(flux_tensors(family, guidance=bool(guidance)))


class Recorded:
    """A small FLUX with half of every MLP cut, and a recording of its block states and rows of 12 images."""

    def __init__(self, tensors, folder: Path, family: str):
        state = tensors(family)
        for site in Dense.of(state).layout.sites:  # neurons of 12 features, which so can stand in for each other
            up, generator = state[f"{site.up}.weight"], torch.Generator().manual_seed(site.index)
            features = torch.randn(12, 128, generator=generator) / 3.5
            up[site.up_row :] = 0.3 * torch.randn(len(up) - site.up_row, 12, generator=generator) @ features
        self.path = folder / f"{family}.safetensors"
        save_file(state, self.path)
        self.dense = Dense.open(self.path)
        self.flux = Flux.load(self.dense.tensors)
        widths = {site.name: site.width for site in self.dense.layout.sites}
        kept = {name: torch.arange(0, width, 2) for name, width in widths.items()}
        self.plan = PruningPlan(family, self.dense.fingerprint, kept, widths, "magnitude", "every other neuron")
        self.recording = self.record(folder / family)
        self.folder = self.recording.states_folder
        self.states, self.rows = BlockStates.open(self.folder), HiddenStates.open(self.folder)

    def record(self, folder: Path, seed: int = 0, images: int = 12) -> Recording:
        """Block states, rows and trajectories of images that are drawn from `seed`, added to the recording in `folder`."""
        recording, layout = Recording.at(folder), self.dense.layout
        store = HiddenStates.for_model(recording.states_folder, layout.family, self.dense.fingerprint)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(images, layout.in_channels // layout.patch**2, 6 * layout.patch, 6, generator=generator)
        context = torch.randn(images, 20, layout.context, generator=generator)
        vector = torch.randn(images, layout.vector, generator=generator) if layout.vector else None
        points, _ = trajectory(self.flux, noise, SIGMAS, context, vector)
        choice = StateChoice(4, dtype=torch.float32)
        recorders = (
            StateRecorder("blocks", store, choice, indices=range(5)),
            RowRecorder(layout.sites, store, RowChoice(rows=36, steps=4)),
            StateRecorder("trajectories", store, choice),
        )
        with ExitStack() as runs, torch.no_grad():
            begun = [runs.enter_context(recorder.run()) for recorder in recorders]
            for step, point in enumerate(points):
                call = Call.at(point.x, point.sigma, SIGMAS, step, context=context)
                with ExitStack() as watched:
                    for run in begun:
                        watched.enter_context(run.watching(self.flux, call))
                    point.run(self.flux)
        return recording


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Recorded:
    return Recorded(flux_tensors, tmp_path_factory.mktemp("recorded"), "flux1")


@pytest.fixture(scope="session", params=["flux1", "flux2"])
def either(request, recorded, tmp_path_factory) -> Recorded:
    if request.param == "flux1":
        return recorded
    return Recorded(flux_tensors, tmp_path_factory.mktemp("recorded"), request.param)
