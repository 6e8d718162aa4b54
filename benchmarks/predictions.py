"""What plans by budget predict, against what is measured: `python benchmarks/predictions.py [CHECKPOINT]`.

    python benchmarks/predictions.py                           # the tiny FLUX that ships
    python benchmarks/predictions.py wide/flux.safetensors     # another of the tiny kind (`flux-poke train tiny --config`)

Records 120 prompts, and for every score a budget offers makes plans that cut 25, 50 and 75 % of all neurons, with the score's
own repair. Velocity errors are measured on other prompts and seeds, at the dense model's x_t; beside them, the same number of
neurons cut by count, and the error of the final latents of free runs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.planning import ByBudget, ByCount, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.scores import REPAIR_OF
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import relative_error, trajectory, velocity_error
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts

SHARES = (0.25, 0.5, 0.75)
SCORES = ("obs", "fluctuation", "magnitude")
RECORDED, MEASURED = 120, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=FOLDER / "flux.safetensors")
    parser.add_argument("--recording", type=Path, help="folder to record to, or that was recorded before")
    parser.add_argument("--multiple", type=int, default=32)
    parser.add_argument("--scores", nargs="+", default=SCORES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.recording or Path(temporary) / "recording"
        if not folder.exists():
            prompts = [prompt(number, 0) for number in range(RECORDED)]
            wanted = Wanted(internals=True, rows=RowChoice(rows=24, steps=8))
            record(options.checkpoint, prompts, Recording.at(folder), wanted, seed=10_000, batch=40)
        measure(options.checkpoint, Recording.open(folder), options.multiple, options.scores)


def measure(checkpoint: Path, recording: Recording, multiple: int, scores: list[str]) -> None:
    """Prints a line for every score and share."""
    tiny, dense = TinyFlux.load(checkpoint), Dense.open(checkpoint)
    texts = tiny.words([prompt(number, 1) for number in range(MEASURED)])
    noise, sigmas = tiny.noise(MEASURED, 500_000), FluxTimer(20).sigmas()
    points, latents = trajectory(tiny.flux, noise, sigmas, *texts)

    def errors(plan, score: str) -> tuple[float, float]:
        changed = Flux.load(Cut(dense, plan, Repairs(dense, plan, REPAIR_OF[score], recording)), torch.float32)
        _, found = trajectory(changed, noise, sigmas, *texts)
        return velocity_error(changed, points), relative_error(latents, found)

    print(
        "| score, repair | cut | predicted | measured | ratio | latents | by count: velocity | latents |\n" + "|---" * 8 + "|"
    )
    for score in scores:
        for share in SHARES:
            planned = make_plan(dense, recording, ByBudget(share=share, score=score, multiple=multiple))
            assert planned.plan.velocity_error is not None
            cut = round(share * dense.layout.sites[0].width)
            counted = make_plan(dense, recording, ByCount(cut, cut, cut, score))
            (velocity, latent), by_count = errors(planned.plan, score), errors(counted.plan, score)
            found = (planned.plan.velocity_error, velocity, planned.plan.velocity_error / velocity, latent, *by_count)
            numbers = " | ".join(f"{value:.2f}" if place == 2 else f"{value:.2g}" for place, value in enumerate(found))
            print(f"| {score}, {REPAIR_OF[score]} | {share:.0%} | {numbers} |", flush=True)


def prompt(number: int, half: int) -> str:
    """A prompt for the digit `number` % 10; those of one half are not in the other."""
    template = number // 10 % 13
    return digit_prompts(number % 10)[2 * template + (template + half) % 2]


if __name__ == "__main__":
    main()
