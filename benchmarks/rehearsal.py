"""The whole loop at FLUX.1-dev's width, on a real ComfyUI: record, plan, repair, save, load, draw. What each step costs.

    uv run python benchmarks/rehearsal.py                                             # 1 + 2 blocks, on a CPU
    uv run python benchmarks/rehearsal.py --device cuda --double 19 --single 38       # all of FLUX.1-dev, on a GPU

The model is a FLUX.1 of the given depth with random weights, drawn so that activations are of order 1 and neurons fire a third
of the time; texts are random as well. The server is a process of its own with this pack in its custom_nodes, and does what the
graphs of the workflows do, but for two things: every call records as many rows as there are tokens (`--rows` image tokens and
as many of text), in as few calls as give a plan the rows that it needs at least, one for each regressor; and the model calls
that measure amplification are those of one step. 40 % of all parameters are cut by budget,
neurons and modulation, with obs and affine repair.

Of every step: seconds by the clock and of the server's processor, the most memory the server held (without files it maps, and
of the GPU all that is taken), files. From it, 19 + 38 blocks are reckoned (on a CPU in seconds of the processor, on a GPU by
the clock): model calls by block, probes by block and by MLP, plan and repair by MLP, reading and writing by parameter; memory
is what was measured and the weights that are missing here.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from figures import figure
from flux_poke.flux.layout import Layout
from flux_poke.flux.model import Flux
from flux_poke.headless.client import ComfyClient
from flux_poke.headless.server import ComfyServer
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
WORDS, POOLED = 4096, 768
#: What FLUX.1-dev has of parameters and MLPs.
PARAMETERS, SITES = 11.9e9, 76
#: Standard deviation of what a linear layer gives for inputs of 1; the modulation's is what blocks are scaled and gated by.
GAIN, MODULATION = 1.0, 0.3
#: Bias of the MLPs' first layers, which has neurons fire a third of the time.
FIRES = -0.45

#: Gives a random text, since a rehearsal has no text encoders.
TEXT_NODE = f"""
import torch

class RandomText:
    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"seed": ("INT", {{"max": 2**31}}), "tokens": ("INT", {{"max": 512}})}}}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "give", "rehearsal"

    def give(self, seed, tokens):
        random = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, {POOLED}, generator=random)
        return ([[torch.randn(1, tokens, {WORDS}, generator=random), {{"pooled_output": pooled, "guidance": 3.5}}]],)

NODE_CLASS_MAPPINGS = {{"RandomText": RandomText}}
"""


def write_random(path: Path, layout: Layout, device: torch.device) -> int:
    """A checkpoint of this layout in bfloat16; its number of parameters."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Flux(layout).state_dict().items()}
    ups = {site.up: site.up_row for site in layout.sites}
    tensors = {}
    for key, shape in shapes.items():
        name, kind = key.rsplit(".", 1)
        if kind == "weight":
            scale = (MODULATION if "mod" in name else GAIN) / math.sqrt(shape[1])
            tensor = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(scale)
        else:
            tensor = torch.full(shape, 1.0 if kind == "scale" else 0.0, device=device, dtype=torch.bfloat16)
            if name in ups:
                tensor[ups[name] :] = FIRES
        tensors[key] = tensor.cpu()
    save_file(tensors, path)
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class Rehearsal:
    """A ComfyUI with the pack and the random model of `layout`."""

    client: ComfyClient
    base: Path
    process: psutil.Process
    layout: Layout
    parameters: int

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Tells what the server did meanwhile."""
        memory, device, ended = [0], [0], threading.Event()

        def watch() -> None:
            while True:
                found = self.process.memory_info()
                memory.append(found.rss - getattr(found, "shared", 0))
                if torch.cuda.is_available():
                    free, total = torch.cuda.mem_get_info()
                    device.append(total - free)
                if ended.wait(0.1):
                    return

        watching = threading.Thread(target=watch)
        begun, before = time.perf_counter(), self.process.cpu_times()
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()
        clock, after = time.perf_counter() - begun, self.process.cpu_times()
        processor = after.user + after.system - before.user - before.system
        cost = clock if torch.cuda.is_available() else processor
        held, taken, whole = max(memory) / 1e9, max(device) / 1e9, cost * self.times(name)
        beside = (PARAMETERS - self.parameters) * torch.bfloat16.itemsize / 1e9
        found = f"{name:<28}{clock:>8.0f} s{processor:>10.0f} s{held:>7.1f} GB{taken:>7.1f} GB"
        figure(
            f"{found}{whole:>10.0f} s{held + beside:>7.1f} GB",
            step=name, clock_s=clock, processor_s=processor, memory_gb=held, gpu_gb=taken,
            reckoned_s=whole, reckoned_memory_gb=held + beside,
        )  # fmt: skip

    def times(self, what: str) -> float:
        """How many times as long a step takes, or as large a file is, with all that FLUX.1-dev has."""
        sites, blocks = len(self.layout.sites), self.layout.depth + self.layout.depth_single
        if what == "record, with probes":
            return 57 / blocks * (1 + 3 * SITES) / (1 + 3 * sites)
        if what in ("plan", "repair and save", "recording", "of it, cache"):
            return SITES / sites
        return PARAMETERS / self.parameters if what.startswith(("load", "dense", "pruned")) else 57 / blocks

    def run(self, *nodes: Mapping[str, dict]) -> None:
        """Runs a graph of these nodes."""
        self.client.run({name: node for part in nodes for name, node in part.items()})

    def size(self, folder: str) -> float:
        """GB of a folder's or a file's content."""
        path = self.base / folder
        files = path.rglob("*") if path.is_dir() else (path,)
        return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def drawing(model: dict, tokens: int, seed: int = 0, batch: int = 1, steps: int = 1) -> dict:
    """A graph that draws with MODEL `model`: an image of so many tokens, from a text of as many (512 at most)."""
    side = 16 * math.isqrt(tokens)
    return {
        "model": model,
        "text": node("RandomText", seed=seed, tokens=min(tokens, 512)),
        "empty": node("EmptySD3LatentImage", width=side, height=side, batch_size=batch),
        "sample": node(
            "KSampler", model=["model", 0], positive=["text", 0], negative=["text", 0], latent_image=["empty", 0], seed=seed,
            steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="rehearsal"),
    }  # fmt: skip


def rehearse(it: Rehearsal, rows: int, regressors: int) -> dict[str, float]:
    """All steps; GB of what they leave on disk."""
    dense, tokens = node("UNETLoader", unet_name="dense.safetensors", weight_dtype="default"), math.isqrt(rows) ** 2
    calls = -(-regressors // min(tokens, 512))

    def record(probes: int) -> dict:
        inputs = {"name": "rehearsal", "rows": tokens, "steps": 1, "max_gb": 1000.0, "probe_steps": probes}
        return node("FluxPokeRecord", model=["dense", 0], **inputs)

    with it.step("load and draw, dense"):
        it.run(drawing(dense, tokens))
    with it.step("draw, dense"):
        it.run(drawing(dense, tokens, seed=1))
    with it.step("record, with probes"):
        it.run({"dense": dense}, drawing(record(1), tokens, seed=2))
    with it.step(f"record {calls - 1} images"):
        for seed in range(3, calls + 2):
            it.run({"dense": dense}, drawing(record(0), tokens, seed=seed))
    inputs = {
        "budget": "share of all parameters",
        "amount": 0.4,
        "touch": "both",
        "precision": "stored",
        "protect": "",
        "save_as": "plan",
    }
    planned = {
        "recording": node("FluxPokeLoadRecording", name="rehearsal"),
        "plan": node("FluxPokePlanByBudget", recording=["recording", 0], unet_name="dense.safetensors", **inputs),
    }
    with it.step("plan"):
        it.run(planned)
    with it.step("repair and save"):
        saved = node(
            "FluxPokeSavePrunedFlux",
            plan_or_model=["plan", 0],
            repair="affine",
            save_as="pruned",
            fold=False,
            precision="as planned",
        )
        it.run(planned, {"saved": saved})
    pruned = node("FluxPokeLoadPrunedCheckpoint", unet_name="pruned.safetensors", weight_dtype="default")
    with it.step("load and draw, pruned"):
        it.run(drawing(pruned, tokens))
    with it.step("draw, pruned"):
        it.run(drawing(pruned, tokens, seed=1))
    models = "models/diffusion_models"
    folders = {"dense": f"{models}/dense.safetensors", "pruned": f"{models}/pruned.safetensors"}
    folders |= {"recording": "output/flux_poke/rehearsal", "of it, cache": "output/flux_poke/rehearsal/cache"}
    return {what: it.size(folder) for what, folder in folders.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=3072, help="another width, to try this script")
    parser.add_argument(
        "--rows", type=int, default=484, help="image tokens of every call, a square; as many of text, up to 512"
    )
    parser.add_argument("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")))
    given = parser.parse_args()
    layout = Layout.of("flux1", given.hidden, given.double, given.single, guidance=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("custom_nodes", "models/diffusion_models", "models/loras", "models/vae", "input"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "flux-poke").symlink_to(ROOT)
        (base / "custom_nodes" / "random_text.py").write_text(TEXT_NODE)
        begun = time.perf_counter()
        parameters = write_random(base / "models/diffusion_models/dense.safetensors", layout, torch.device(given.device))
        print(
            f"FLUX.1 of width {given.hidden:,}, {given.double} + {given.single} blocks, {parameters / 1e9:.2f} billion "
            f"parameters, {given.device}; made in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        options = ["--base-directory", str(base), "--disable-auto-launch", *(["--cpu"] if given.device == "cpu" else [])]
        log = base / "comfyui.log"
        with ComfyServer(given.comfyui, options, log=log) as server, ComfyClient(server.address) as client:
            (process,) = psutil.Process().children()
            it = Rehearsal(client, base, process, layout, parameters)
            print(f"{'':<28}{'clock':>10}{'processor':>12}{'memory':>10}{'GPU':>10}{'reckoned, 19 + 38':>22}")
            for what, size in rehearse(it, given.rows, max(site.regressors for site in layout.sites)).items():
                whole = size * it.times(what)
                figure(f"{what:<28}{size:>9.2f} GB, reckoned {whole:.0f} GB", file=what, gb=size, reckoned_gb=whole)


if __name__ == "__main__":
    main()
