"""At which noise levels rows must be recorded for a prediction to hold where a drawing has its steps.

    uv run python benchmarks/levels.py

Records 60 prompts of the shipped tiny FLUX along several schedules, plans by budget with affine repair (25, 50 and 75 % of the
neurons), and measures velocity errors on other prompts: where steps lie evenly, and where they are shifted as FLUX.1-dev's are
at 1024x1024 pixels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import torch
from figures import figure
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import trajectory, velocity_error
from flux_poke.tiny.model import FOLDER, TinyFlux
from predictions import SHARES, prompt

SHIFTED = FluxTimer(20, 3.16)
DRAWN = {"evenly": FluxTimer(20), "shifted": SHIFTED}
#: By name, what is recorded along, and the lowest noise level of rows.
RECORDED = {
    "20 steps": (FluxTimer(20), 0.0),
    "12 steps": (FluxTimer(12), 0.0),
    "8 steps": (FluxTimer(8), 0.0),
    "4 steps": (FluxTimer(4), 0.0),
    "2 steps": (FluxTimer(2), 0.0),
    "shift 1.88": (FluxTimer(20, 1.88), 0.0),
    "shift 3.16": (SHIFTED, 0.0),
    "shift 6": (FluxTimer(20, 6.0), 0.0),
    "denoise 0.5": (FluxTimer(20, denoise=0.5), 0.0),
    "rows from 0.5 on": (FluxTimer(20), 0.5),
}


def main() -> None:
    torch.set_num_threads(1)
    checkpoint = FOLDER / "flux.safetensors"
    tiny, dense = TinyFlux.load(checkpoint), Dense.open(checkpoint)
    texts, noise = tiny.words([prompt(number, 1) for number in range(40)]), tiny.noise(40, 500_000)
    drawn = {name: trajectory(tiny.flux, noise, timer.sigmas(), *texts)[0] for name, timer in DRAWN.items()}
    print("| recorded | rows below 0.5 | predicted / measured, steps evenly | with shift 3.16 |\n" + "|---" * 4 + "|")
    for name, (timer, lowest) in RECORDED.items():
        along = mock.patch.object(TinyFlux, "sigmas", return_value=timer.sigmas())
        with tempfile.TemporaryDirectory() as folder, along:
            recording = Recording.at(Path(folder) / "recording")
            rows = RowChoice(rows=24, steps=min(8, timer.steps), sigmas=(lowest, 1.0))
            prompts = [prompt(number, 0) for number in range(60)]
            record(checkpoint, prompts, recording, Wanted(rows=rows), seed=10_000, steps=timer.steps, batch=30)
            below = (recording.states().sigmas(dense.layout.sites[0].name) < 0.5).float().mean().item()
            ratios: dict[str, list[float]] = {where: [] for where in drawn}
            for share in SHARES:
                plan = make_plan(dense, recording, ByBudget(neurons=share, multiple=32)).plan
                cut = Flux.load(Cut(dense, plan, Repairs(dense, plan, "affine", recording)), torch.float32)
                for where, points in drawn.items():
                    ratios[where].append((plan.velocity_error or 0.0) / velocity_error(cut, points))
        said = {where: ", ".join(f"{ratio:.2f}" for ratio in found) for where, found in ratios.items()}
        figure(f"| {name} | {below:.0%} | {said['evenly']} | {said['shifted']} |", recorded=name, below=below, **said)


if __name__ == "__main__":
    main()
