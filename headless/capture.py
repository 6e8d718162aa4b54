"""`flux-poke capture`: an image and what every block predicted of it, drawn on a ComfyUI that runs or one that is started.

    request = CaptureRequest(prompt="a fox", model="flux-schnell")
    with ComfyClient("127.0.0.1:8188") as client:
        captured = capture(client, request, Path("output"))
    captured.generation_id, captured.folder          # "3fa94c01", output/3fa94c01

It fills in `workflows/api/see_every_block.json` (for the model "tiny" `see_every_block_tiny.json`) by the names of inputs,
wherever they stand: that graph may be changed, as long as it ends in Decode Block Previews.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

import torch

from ..errors import UserError
from ..files import replacing
from ..progress import Progress, silent
from .client import ComfyClient, Interrupted
from .server import ComfyServer

DEFAULT_SERVER = "127.0.0.1:8188"
WORKFLOWS = Path(__file__).parents[1] / "workflows" / "api"

#: Names of models to what their files are called; any other name is a file's.
FILES = {"flux-schnell": "flux1-schnell", "flux-dev": "flux1-dev", "flux-dev-krea": "flux1-krea-dev"}
#: Steps by model where none are asked for, and those of all others.
STEPS, OTHER_STEPS = {"flux-schnell": 4, "tiny": 20}, 50

#: What the nodes call a generation's folder.
GENERATION_ID = re.compile(r"[0-9a-f]{8}")


class Stopped(Exception):
    """Another image failed, or the user pressed Ctrl-C."""


@dataclass(frozen=True)
class CaptureRequest:
    """One image to draw; a size of None is the workflow's, steps of None are the model's (`STEPS`), a seed of None is random.

    Raises `UserError` where the size is not one FLUX can draw.
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
    graph = filled_graph(request, [] if request.model == "tiny" else client.models("diffusion_models"))
    started: set[str] = set()
    state = ("waiting for its turn", 0.0)

    def on_progress(node: str, value: int, total: int) -> None:
        nonlocal state
        if node:
            started.add(node)
            title = graph[node].get("_meta", {}).get("title") or graph[node]["class_type"] if node in graph else "running"
            part = value / total if total else 0.0
            state = f"{title}: {value}/{total}" if total else title, (len(started) - 1 + part) / len(graph)
        progress(*state, 1)

    prompt_id = client.queue(graph)
    try:
        result = client.wait(prompt_id, on_progress)
    except Interrupted as error:
        raise UserError(f"The drawing of {request.prompt!r} was stopped in ComfyUI.") from error
    except UserError:
        raise
    except BaseException:
        client.cancel(prompt_id)
        raise
    found = result.files("flux_poke")
    if not found:
        raise UserError(f"The workflow in {WORKFLOWS} wrote no generation: it must end in Decode Block Previews.")
    bring(found, out, client.fetch)
    generation_id = found[0]["generation_id"]
    return Captured(request, generation_id, out / generation_id)


def bring(found: Sequence[Mapping[str, Any]], out: Path, fetch: Callable[[Mapping[str, str]], bytes]) -> None:
    """Writes the files that the server `found` to new folders `out/{generation_id}`; `fetch` gives what is in one.

    Raises `UserError`, before anything is fetched, where a folder is there already, or a name leads out of it.
    """
    files: dict[Path, dict[str, str]] = {}
    for written in found:  # by Decode Block Previews, and by whatever adds to its folder
        generation_id = f"{written['generation_id']}"
        folder = out / generation_id
        if not GENERATION_ID.fullmatch(generation_id):
            raise UserError(f"The server calls a generation {generation_id!r}: expected 8 hexadecimal digits.")
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder} is there already: move it, or choose another folder with --output-dir.")
        for name in written["files"]:
            path, where = folder / name, PurePosixPath(written["subfolder"], name)
            if folder.resolve() not in path.resolve().parents:
                raise UserError(f"The server names a file outside of its generation's folder: {name}.")
            files[path] = {"filename": where.name, "subfolder": where.parent.as_posix(), "type": "output"}
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
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    done: dict[int, Captured] = {}
    parts = [0.0] * len(requests)
    stopped = Event()

    def work(client: ComfyClient) -> None:
        while not stopped.is_set():
            try:
                number = waiting.get_nowait()
            except Empty:
                return

            def report(doing: str, part: float, of: float, number: int = number) -> None:
                if stopped.is_set():
                    raise Stopped
                parts[number] = part / of
                progress(f"image {number + 1} of {len(requests)} · {doing}", sum(parts), len(parts))

            done[number] = capture(client, requests[number], out, report)
            report("done", 1, 1)

    with ExitStack() as stack:
        clients = [stack.enter_context(ComfyClient(address)) for address in servers]
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))
        workers = [pool.submit(work, client) for client in clients]
        try:
            for worker in as_completed(workers):
                worker.result()
        except BaseException:
            stopped.set()  # the other runs end at their next sign of life
            raise
    return [done[number] for number in sorted(done)]


@contextmanager
def capture_servers(
    running: str | None, comfyui: Path | None, offload: bool = False, multi_gpu: bool = False
) -> Iterator[list[str]]:
    """Addresses (host:port) to capture on: of the server that runs, or of those started for the length of the `with`.

    Args:
        running: address of a server; with it, no other is started.
        comfyui: folder of a ComfyUI to start.
        offload: start it in its low-memory mode.
        multi_gpu: start one for each GPU.

    Raises `UserError` where options do not go together, or a server does not come up.
    """
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
        options = ["--disable-auto-launch", *(["--lowvram"] if offload else []), *([] if _accelerated() else ["--cpu"])]

        def start(gpu: int | None) -> str:
            own = folder / f"gpu-{gpu or 0}"
            own.mkdir()
            chosen = [] if gpu is None else ["--cuda-device", str(gpu)]
            server = ComfyServer(comfyui, [*options, *chosen, "--output-directory", str(own)], log=own / "comfyui.log")
            return stack.enter_context(server).address

        yield [start(gpu) for gpu in gpus]


def _accelerated() -> bool:
    """Whether ComfyUI finds something to run on; where there is but a CPU, it has to be told."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def filled_graph(request: CaptureRequest, model_files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The capture workflow with the request's values; `model_files` are those the server has.

    Raises `UserError` where the model is none of them, or the workflow lacks an input that the request needs.
    """
    tiny = request.model == "tiny"
    path = WORKFLOWS / ("see_every_block_tiny.json" if tiny else "see_every_block.json")
    graph: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    seed = random.randrange(2**32) if request.seed is None else request.seed
    steps = STEPS.get(request.model, OTHER_STEPS) if request.num_steps is None else request.num_steps
    needed = {"text": request.prompt, "steps": steps, "width": request.width, "height": request.height}
    if not tiny:
        needed["unet_name"] = model_file(request.model, model_files)
    optional = {
        "seed": seed, "noise_seed": seed, "guidance": request.guidance, "decode": request.decode_intermediates,
        "metadata": request.add_sampling_metadata,
    }  # fmt: skip
    for name, value in {**needed, **optional}.items():
        if value is None:
            continue
        places = [
            node["inputs"] for node in graph.values() if name in node["inputs"] and not isinstance(node["inputs"][name], list)
        ]
        if not places and name in needed:
            raise UserError(f"{path} has no input called {name} to fill in: restore the file, or name an input so.")
        for inputs in places:
            inputs[name] = value
    return graph


def model_file(model: str, there: Sequence[str]) -> str:
    """The file that holds `model`: the one called so, or the shortest name that begins so (flux1-dev-fp8 for flux1-dev)."""
    name = FILES.get(model, model)
    for found in sorted(there, key=len):
        if found == name or Path(found.replace("\\", "/")).name.startswith(name):
            return found
    raise UserError(
        f"ComfyUI has no model {model!r}: expected a file called {name}*.safetensors in models/diffusion_models, found "
        f"{', '.join(there) or 'none'}."
    )
