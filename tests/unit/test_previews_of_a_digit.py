"""Block predictions of the tiny FLUX that ships: they turn into the digit along blocks and steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_poke.analysis.contributions import Contribution, block_contributions
from flux_poke.analysis.taps import BlockTaps, StepChoice, TapRecorder
from flux_poke.flux.blocks import choose_blocks
from flux_poke.flux.integrators import euler
from flux_poke.flux.sampling import FluxTimer
from flux_poke.recording.call import Call
from flux_poke.tiny.data import read_digits
from flux_poke.tiny.model import TinyFlux

PROMPTS = [f"a handwritten {digit}" for digit in range(10)]


@pytest.fixture(scope="module")
def run() -> tuple[TinyFlux, BlockTaps]:
    """Ten digits, seven of 20 steps tapped."""
    tiny = TinyFlux.load()
    layout, sigmas = tiny.flux.layout, FluxTimer(20).sigmas()
    taps, recorder = BlockTaps(), TapRecorder(layout, choose_blocks("all", layout), StepChoice.parse("0, 3, 6, 9, 12, 15, 19"))
    context, vector = tiny.words(PROMPTS)

    def velocity(x, sigma):
        with recorder.watching(tiny.flux, Call.at(x, sigma, sigmas), taps):
            return tiny.flux(x, sigma, context, vector)

    with torch.no_grad():
        euler(velocity, tiny.noise(len(PROMPTS), 5), sigmas)
    return tiny, taps


def mean_errors(rows: list[Contribution], key) -> list[float]:
    return [float(np.mean([row.error for row in rows if key(row) == value])) for value in sorted({key(row) for row in rows})]


def test_the_error_of_x0_falls_along_blocks_and_along_steps(run):
    rows = block_contributions(run[1])
    for key in (lambda row: row.tap.block, lambda row: row.tap.step):
        errors = mean_errors(rows, key)
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 5


def test_late_blocks_and_steps_read_as_the_digit_and_the_first_do_not(run):
    tiny, taps = run

    def right(tap) -> int:
        return int((read_digits(tiny.autoencoder.decode(taps.latent(tap))) == torch.arange(10)).sum())

    ordered = list(taps)
    assert right(ordered[-1]) >= 9
    assert right(ordered[0]) <= 5
