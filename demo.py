"""`flux-poke demo`: the whole loop on the tiny FLUX that ships, without ComfyUI.

    summary = run_demo(Path("flux_poke_demo"), seed=0)

Leaves internals, pictures and `summary.json` in one folder. Prompts and seeds of the drawings that are measured are
not those that were recorded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .analysis.internals import Internals
from .analysis.recording import InternalsRecorder
from .analysis.report import internals_figure
from .files import write_text
from .flux.checkpoint import Checkpoint
from .flux.fingerprint import Fingerprint
from .flux.tiny import FOLDER, STEPS, TinyFlux
from .flux.tiny.data import digit_accuracy
from .flux.tiny.words import digit_prompts

#: Told what is being done, and how far all of it is (0..1).
Progress = Callable[[str, float], None]

RECORDED, MEASURED = 120, 200


@dataclass(frozen=True)
class Variant:
    """One model of the summary, measured against the dense one; `psnr` is in dB, None where the images are equal."""

    name: str
    score: str
    repair: str
    neurons_kept: int
    neurons: int
    parameters: int
    bytes: int
    velocity_error: float
    latent_error: float
    psnr: float | None
    digit_accuracy: float
    seconds: float


def run_demo(out: Path, seed: int = 0, progress: Progress | None = None) -> dict:
    """Runs it, writes everything to `out`, and returns what `summary.json` holds."""
    started = time.perf_counter()
    say = progress or (lambda *_: None)
    out.mkdir(parents=True, exist_ok=True)

    say("loading the tiny FLUX", 0.0)
    tiny = TinyFlux.load()
    checkpoint = Checkpoint(FOLDER / "flux.safetensors")

    say(f"drawing {RECORDED} digits and recording every neuron", 0.05)
    recorder = InternalsRecorder(checkpoint.layout.sites)
    recorded = [digit_prompts(number % 10)[number // 10 % 13] for number in range(RECORDED)]
    with recorder.watching(tiny.flux):
        tiny.sample(recorded, tiny.noise(RECORDED, 10_000 + 1_000 * seed))
    internals = Internals.new("flux1", Fingerprint.of_checkpoint(checkpoint), recorder.results(), steps=STEPS)
    internals.save(out / "internals.safetensors")
    internals_figure(internals).savefig(out / "internals.png", dpi=110)

    say(f"drawing {MEASURED} others to measure", 0.5)
    prompts = [digit_prompts(number % 10)[13 + number // 10 % 13] for number in range(MEASURED)]
    digits = [number % 10 for number in range(MEASURED)]
    begun = time.perf_counter()
    images = tiny.autoencoder.decode(tiny.sample(prompts, tiny.noise(MEASURED, 20_000 + 1_000 * seed)))
    sheet(images[:50], 10).save(out / "dense.png")

    dense = Variant(
        name="dense",
        score="none",
        repair="none",
        neurons_kept=checkpoint.layout.neurons,
        neurons=checkpoint.layout.neurons,
        parameters=sum(tensor.numel() for tensor in checkpoint.values()),
        bytes=checkpoint.path.stat().st_size,
        velocity_error=0.0,
        latent_error=0.0,
        psnr=None,
        digit_accuracy=digit_accuracy(images, digits),
        seconds=round(time.perf_counter() - begun, 2),
    )
    summary = {
        "family": "flux1",
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 2),
        "variants": [asdict(dense)],
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    say("done", 1.0)
    return summary


def sheet(images: Tensor, columns: int) -> Image.Image:
    """Images [count, 3, height, width] in 0..1 as one picture, `columns` a row."""
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns) if len(row) == columns]
    pixels = torch.cat(rows, dim=-2).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())
