"""Rows weighted by the amplification at their noise level (`recording/amplification.py`), against rows that all weigh the same.

    uv run python benchmarks/importance.py [--splits 7] [--first 1]

The shipped tiny FLUX, half of all neurons cut by budget with obs and affine repair. Every split draws its own prompts to record
and to measure on, with seeds of its own; plan and repair are made twice from what was recorded. Velocity errors, errors of the
final latents and digits read right are those of the demo, on 200 images.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from unittest import mock

import torch
from figures import figure
from flux_poke.demo import MEASURED, RECORDED, Exam, Variant
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.store import HiddenStates
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts

CHECKPOINT = FOLDER / "flux.safetensors"


def prompts_of(split: int) -> tuple[list[str], list[str]]:
    """To record and to measure on: none of the one is among the other, and digits come in turns."""
    halves: tuple[list[list[str]], list[list[str]]] = ([], [])
    for digit in range(10):
        prompts = random.Random(100 * split + digit).sample(found := digit_prompts(digit), len(found))
        for half, chosen in zip(halves, (prompts[::2], prompts[1::2]), strict=True):
            half.append(chosen)
    recorded, measured = (
        [half[number % 10][number // 10 % len(half[number % 10])] for number in range(count)]
        for half, count in zip(halves, (RECORDED, MEASURED), strict=True)
    )
    return recorded, measured


def cut(exam: Exam, dense: Dense, recording: Recording) -> Variant:
    """Half of the neurons cut and repaired from scratch, measured."""
    shutil.rmtree(recording.cache, ignore_errors=True)
    plan = make_plan(dense, recording, ByBudget(neurons=0.5, multiple=32)).plan
    return exam.measured("cut", Cut(dense, plan, Repairs(dense, plan, "affine", recording)), plan, "affine", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--splits", type=int, default=7)
    parser.add_argument("--first", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense, tiny = Dense.open(CHECKPOINT), TinyFlux.load()
    print("split   velocity error      final-latent error   digits read right       dense")
    for split in range(given.first, given.first + given.splits):
        recorded, measured = prompts_of(split)
        exam = Exam(tiny, measured, split)
        whole = exam.measured("dense", dense.tensors, PruningPlan.keeping_all(dense), "none", 0)
        with tempfile.TemporaryDirectory() as folder:
            recording = Recording.at(folder)
            wanted = Wanted(internals=True, rows=RowChoice(rows=24, steps=8, seed=split))
            record(CHECKPOINT, recorded, recording, wanted, seed=10_000 + 1_000 * split, batch=40)
            with mock.patch.object(HiddenStates, "importance", lambda store, site, sigma: torch.ones_like(sigma)):
                alike = cut(exam, dense, recording)
            weighted = cut(exam, dense, recording)
        figure(
            f"{split:<8}{alike.velocity_error:.4f} -> {weighted.velocity_error:.4f}"
            f"   {alike.latent_error:.4f} -> {weighted.latent_error:.4f}"
            f"     {alike.digit_accuracy:.1%} -> {weighted.digit_accuracy:.1%}{whole.digit_accuracy:>13.1%}",
            split=split, velocity_alike=alike.velocity_error, velocity=weighted.velocity_error,
            latents_alike=alike.latent_error, latents=weighted.latent_error,
            digits_alike=alike.digit_accuracy, digits=weighted.digit_accuracy, digits_dense=whole.digit_accuracy,
        )  # fmt: skip


if __name__ == "__main__":
    main()
