"""A thousand prompts on one server, each of which records internals, rows and a tap: what memory and open files come to.

    OMP_NUM_THREADS=1 uv run python benchmarks/queued.py [--comfyui ~/comfy/ComfyUI] [--prompts 1000]

The tiny FLUX draws 64 x 64 pixels in two steps, every time from another seed, and its predictions after one block are decoded.
Every 50 prompts it is told how many bytes the server's memory and the recording take, and how many files it has open.
ComfyUI itself keeps the last 10,000 runs in its history, with the graph of each, and one temporary picture of each preview.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from figures import figure
from flux_poke.headless.client import ComfyClient
from flux_poke.headless.server import ComfyServer

#: Prompts between two looks at the server, and what is in its queue at once.
LOOK = 50
#: GB that rows may take: what is beyond is thinned, so that the folder stays as it is.
MOST_GB = 0.002


def graph(seed: int) -> dict[str, dict[str, Any]]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    watched = {"name": "queued", "rows": 4, "steps": 1, "max_gb": MOST_GB, "probe_steps": 0}
    tapped = {"blocks": "single 3", "at_steps": "1", "lens": "none", "memory_gb": 1.0, "raw": False}
    decoded = {"view": "x0", "captions": False, "decode": True, "metadata": False, "largest": 64}
    drawn = {"seed": seed, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": node("FluxPokeLoadTinyFlux", family="FLUX.1"),
        "2": node("FluxPokeRecord", model=["1", 0], **watched),
        "3": node("FluxPokeTapBlocks", model=["2", 0], **tapped),
        "4": node("CLIPTextEncode", clip=["1", 1], text="a 3"),
        "5": node("ConditioningZeroOut", conditioning=["4", 0]),
        "6": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "7": node("KSampler", model=["3", 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0], **drawn),
        "8": node("FluxPokeDecodeBlockPreviews", block_taps=["3", 1], vae=["1", 2], after=["7", 0], **decoded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")))
    parser.add_argument("--prompts", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "flux-poke").symlink_to(Path(__file__).parents[1])
        options = ["--cpu", "--base-directory", folder, "--disable-auto-launch"]
        with ComfyServer(given.comfyui, options, base / "log", {"OMP_NUM_THREADS": "1"}) as server:
            watch(server, given.prompts, base / "output" / "flux_poke" / "queued")


def watch(server: ComfyServer, prompts: int, recording: Path) -> None:
    assert server._process is not None
    process, began = psutil.Process(server._process.pid), time.monotonic()
    with ComfyClient(server.address) as client:
        for number in range(1, prompts + 1):
            client.run(graph(number))
            if number % LOOK == 0:
                memory, files = process.memory_info().rss, len(process.open_files())
                on_disk = sum(path.stat().st_size for path in recording.rglob("*") if path.is_file())
                line = f"{number} prompts: {memory / 1e6:.0f} MB, {process.num_fds()} handles, of these {files} files, "
                line += f"recording {on_disk / 1e6:.2f} MB, {time.monotonic() - began:.0f} s"
                told = {"prompts": number, "mb": memory / 1e6, "handles": process.num_fds(), "files": files}
                figure(line, **told, recording_mb=on_disk / 1e6)


if __name__ == "__main__":
    main()
