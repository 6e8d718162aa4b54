"""`flux-poke capture`: an image and what every block predicted of it, drawn on a ComfyUI that runs or one that is started.

    request = CaptureRequest(prompt="a fox", model="flux-schnell")
    with ComfyClient("127.0.0.1:8188") as client:
        captured = capture(client, request, Path("output"))
    captured.generation_id, captured.folder          # "3fa94c01", output/3fa94c01

The graph is the family's (`families.py`), with Tap Blocks in it, and Decode Block Previews at its end; `analysis/capturing.py`
needs no ComfyUI.
"""

from __future__ import annotations

import random
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch

from ..analysis.taps import View
from ..draw import Asked, DrawRequest
from ..errors import UserError
from ..files import replacing
from ..progress import Progress, silent
from .client import ComfyClient
from .draw import memory_explained_there
from .families import Setup, node
from .outputs import Fetch, generation_files
from .server import DEFAULT_SERVER, ComfyServer, start_options
from .workflow import Graph, follow

#: Steps of FLUX.1 where none are asked for, as its documentation has it; other models take their usual ones.
STEPS = 50
TAP = "FluxPokeTapBlocks"


class Stopped(Exception):
    """Another image failed, or the user pressed Ctrl-C."""


@dataclass(frozen=True)
class CaptureRequest:
    """One image to draw; a size of None is 1024 (tiny: 64), steps of None are the model's, a seed of None is random.

    `blocks`, `at_steps`, `lens` (a name in ComfyUI's output/flux_poke) and `view` are as on the nodes; with `raw`, the blocks'
    tokens are kept as well. `clip` and `vae` as `Setup.find` takes them. Raises `UserError` where the size is not one
    FLUX can draw.
    """

    prompt: str
    model: str = "flux-schnell"
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance: float = 2.5
    decode_intermediates: bool = True
    add_sampling_metadata: bool = True
    blocks: str = "all"
    at_steps: str = "all"
    lens: str = ""
    view: View = "x0"
    raw: bool = False
    clip: Sequence[str] = ()
    vae: str | None = None
    generation_id: str = field(default_factory=lambda: secrets.token_hex(4))

    def __post_init__(self) -> None:
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and (size < 16 or size % 16):
                raise UserError(f"The {name} is a multiple of 16 pixels; found {size}.")


@dataclass(frozen=True)
class Captured:
    """Where the files of one image are."""

    request: CaptureRequest
    generation_id: str
    folder: Path


def capture(client: ComfyClient, request: CaptureRequest, out: Path, progress: Progress = silent) -> Captured:
    """Draws one image on the server and brings its files to `out/{generation_id}`.

    Raises `UserError` where the server lacks the nodes or the model, the run fails or is stopped there, and where that folder
    is there already or the server names files outside of it. Where `progress` raises (it is called every few seconds at
    least), the run is stopped on the server, or taken out of its queue.
    """
    client.require_node(TAP)
    graph = capture_graph(request, Setup.find(client, request.model, request.clip, request.vae))
    extra = {"extra_pnginfo": {"flux_poke_generation": request.generation_id}}
    with memory_explained_there():
        result = follow(
            client, graph, progress, f"The drawing of {request.prompt!r}", {"SamplerCustomAdvanced": 10.0}, extra=extra
        )
    found = result.files("flux_poke")
    if not found:
        raise UserError(f"ComfyUI at {client.address} does not say what it drew: update this pack in its custom_nodes.")
    bring(found, out, client.fetch)
    generation_id, _ = generation_files(found[0])
    return Captured(request, generation_id, out / generation_id)


def bring(found: Sequence[Mapping[str, Any]], out: Path, fetch: Fetch) -> None:
    """Writes the files that the server `found` to new folders `out/{generation_id}`; `fetch` gives what is in one.

    Raises `UserError`, before anything is fetched, where a folder is there already, or a name leads out of it.
    """
    files: dict[Path, dict[str, str]] = {}
    for written in found:  # by Decode Block Previews, and by whatever adds to its folder
        generation_id, references = generation_files(written)
        folder = out / generation_id
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder} is there already: move it, or choose another folder with --output-dir.")
        files |= {folder / name: reference for name, reference in references.items()}
    for path, file in files.items():
        content = fetch(file)
        with replacing(path) as new:
            new.write_bytes(content)


def capture_everywhere(
    servers: Sequence[str], requests: Sequence[CaptureRequest], out: Path, progress: Progress = silent
) -> list[Captured]:
    """Draws all requests, each on whichever of the `servers` (host:port) is free; the results in the order of the requests.

    The first failure, and Ctrl-C, stop all of them.
    """
    idle: SimpleQueue[ComfyClient] = SimpleQueue()
    parts = [0.0] * len(requests)
    stopped = Event()

    def draw(number: int) -> Captured:
        def report(doing: str, part: float, of: float) -> None:
            if stopped.is_set():
                raise Stopped
            parts[number] = part / of
            progress(f"image {number + 1} of {len(requests)} · {doing}", sum(parts), len(parts))

        client = idle.get()
        try:
            report("waiting for its turn", 0, 1)
            captured = capture(client, requests[number], out, report)
        finally:
            idle.put(client)
        report("done", 1, 1)
        return captured

    with ExitStack() as stack:
        for address in servers:
            idle.put(stack.enter_context(ComfyClient(address)))
        pool = stack.enter_context(ThreadPoolExecutor(len(servers)))
        drawn = [pool.submit(draw, number) for number in range(len(requests))]
        try:
            for one in as_completed(drawn):
                one.result()
        except BaseException:
            stopped.set()  # the other runs end at their next sign of life
            raise
    return [one.result() for one in drawn]


@contextmanager
def capture_servers(
    running: str | None, comfyui: Path | None, offload: bool = False, multi_gpu: bool = False
) -> Iterator[list[str]]:
    """Addresses (host:port) to capture on: of the server that runs, or of those started for the length of the `with` from the
    folder `comfyui`: with `offload` in low-memory mode, with `multi_gpu` one for each GPU.

    Raises `UserError` where options do not go together, or a server does not come up.
    """
    if offload and multi_gpu:
        raise UserError(
            "--offload keeps the model in main memory, and --multi-gpu would do so once for each GPU: choose one of them."
        )
    if comfyui is None:
        if offload or multi_gpu:
            raise UserError("--offload and --multi-gpu say how to start a ComfyUI: give its folder with --comfyui.")
        yield [running or DEFAULT_SERVER]
        return
    if running is not None:
        raise UserError("Give either --server (a ComfyUI that runs) or --comfyui (the folder of one to start), not both.")
    gpus: list[int | None] = [None]
    if multi_gpu:
        gpus = list(range(torch.cuda.device_count()))
        if not gpus:
            raise UserError("--multi-gpu starts a ComfyUI for each CUDA device, and there is none here.")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flux_poke_capture_")))
        options = [*start_options(), *(["--lowvram"] if offload else [])]

        def start(gpu: int | None) -> str:
            own = folder / f"gpu-{gpu or 0}"
            own.mkdir()
            chosen = [] if gpu is None else ["--cuda-device", str(gpu)]
            server = ComfyServer(comfyui, [*options, *chosen, "--output-directory", str(own)], log=own / "comfyui.log")
            return stack.enter_context(server).address

        yield [start(gpu) for gpu in gpus]


def capture_graph(request: CaptureRequest, setup: Setup) -> Graph:
    """The family's graph, which taps its blocks and decodes what they predict."""
    seed = random.randrange(2**32) if request.seed is None else request.seed
    steps = STEPS if request.num_steps is None and setup.kind == "flux1" and setup.usual.steps > 4 else request.num_steps
    guidance = request.guidance if setup.usual.distilled else None
    drawn = DrawRequest([request.prompt], steps=steps, guidance=guidance, width=request.width, height=request.height)
    graph = setup.graph(Asked(request.prompt, seed, 0), drawn)
    del graph["decode"]
    taps = {"blocks": request.blocks, "at_steps": request.at_steps, "lens": request.lens, "memory_gb": 1.0, "raw": request.raw}
    graph["taps"] = node(TAP, model=graph["guider"]["inputs"]["model"], **taps)
    graph["guider"]["inputs"]["model"] = ["taps", 0]
    options = {"view": request.view, "captions": False, "decode": request.decode_intermediates, "largest": 64}
    graph["previews"] = node(
        "FluxPokeDecodeBlockPreviews", block_taps=["taps", 1], vae=setup.decoder, after=["sample", 0],
        metadata=request.add_sampling_metadata, **options,
    )  # fmt: skip
    if request.decode_intermediates:
        film = {"format": "mp4", "fps": 12.0, "order": "step", "block_type": "all", "max_blocks": 0, "font_size": 24}
        graph["film"] = node("FluxPokeAnimateBlockPreviews", folder=["previews", 4], **film)
    return graph
