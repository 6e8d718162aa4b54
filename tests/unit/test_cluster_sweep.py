"""A sweep on a cluster of two machines: what it measures, how it goes on, and what it draws."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from flux_poke.analysis.pareto import pareto
from flux_poke.cluster.connect import Needs, connected
from flux_poke.cluster.sites import Source
from flux_poke.cluster.sweep import Measured, Measuring, Point, grid, measured, sweep
from flux_poke.cluster.tasks import Terms
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.planning import ByCount, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.recording import Recording
from flux_poke.recording.trajectories import trajectory
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts
from two_nodes import two_nodes

CHECKPOINT = FOLDER / "flux.safetensors"
HELD_OUT = tuple(digit_prompts(digit)[1] for digit in range(4))
MEASURING = Measuring(HELD_OUT, seed=7)


def room(memory: float) -> Needs:
    return Needs(memory=int(memory))


def no_room(memory: float) -> Needs:
    return Needs(cpus=1e6)


@pytest.fixture(scope="module")
def source(record_digits, tmp_path_factory) -> Source:
    folder = record_digits(tmp_path_factory.mktemp("to_sweep"))
    return Source(f"{CHECKPOINT}", f"{folder}")


@pytest.fixture(scope="module")
def swept(source, tmp_path_factory) -> tuple[Path, dict[str, Measured]]:
    """The folder of a sweep that was done in two halves, and what it found."""
    out = tmp_path_factory.mktemp("sweep")
    points = grid([0.25, 0.5], ["fluctuation"], ["stored", "fp8"])
    terms = Terms(room, 2, 300.0)
    with two_nodes() as nodes, connected(nodes.address):
        assert sweep(source, MEASURING, points[:3], f"{out}", terms).before == 0
        done = sweep(source, MEASURING, points, f"{out}", terms)
        assert (done.before, done.total) == (3, len(points))
        assert sweep(source, MEASURING, points, f"{out}", Terms(no_room)).before == len(points)
    return out, {found.name: found for found in measured(done)}


def test_a_point_is_measured_as_by_hand(source, swept):
    dense, recording = Dense.open(CHECKPOINT), Recording.open(source.recording)
    plan = make_plan(dense, recording, ByCount(img=256, txt=256, single=256)).plan
    cut = Cut(dense, plan, Repairs(dense, plan, "bias", recording))
    tiny, changed = TinyFlux.load(CHECKPOINT), Flux.load({key: cut[key] for key in cut}, torch.float32)
    noise, texts = tiny.noise(len(HELD_OUT), 7), tiny.words(HELD_OUT)
    points, expected = trajectory(tiny.flux, noise, tiny.sigmas(), *texts)
    _, latents = trajectory(changed, noise, tiny.sigmas(), *texts)
    with torch.no_grad():
        moved = sum((point.run(changed) - point.velocity).square().sum().item() for point in points)
    found = swept[1]["fluctuation-50-stored"]
    assert found.velocity_error == pytest.approx(moved / sum(p.velocity.square().sum().item() for p in points), rel=1e-3)
    assert found.latent_error == pytest.approx(((latents - expected).square().sum() / expected.square().sum()).item(), rel=1e-3)
    assert (found.neurons_kept, found.neurons, found.repair) == (2048, 4096, "bias")


def test_less_is_left_of_a_model_and_less_like_it(swept):
    found = swept[1]
    for precision in ("stored", "fp8"):
        sizes, errors = zip(
            *((found[name].gb, found[name].velocity_error) for name in (
                f"uncut-{precision}", f"fluctuation-25-{precision}", f"fluctuation-50-{precision}"
            )), strict=True
        )  # fmt: skip
        assert list(sizes) == sorted(sizes, reverse=True)
        assert list(errors) == sorted(errors)
    assert found["uncut-stored"].velocity_error == 0
    assert found["uncut-stored"].psnr is None
    assert found["uncut-fp8"].gb < 0.6 * found["uncut-stored"].gb


def test_the_table_marks_what_no_other_point_beats(swept):
    out, found = swept
    rows = [*csv.DictReader((out / "table.csv").read_text().splitlines())]
    assert {row["name"] for row in rows} == {*found}
    for row in rows:
        size, error = float(row["gb"]), float(row["velocity_error"])
        beaten = any(
            other.gb <= size and other.velocity_error <= error and (other.gb, other.velocity_error) != (size, error)
            for other in found.values()
        )
        assert row["best"] == str(not beaten)
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_holds_one_sweep(source, swept):
    with pytest.raises(UserError, match=r"holds another sweep of a cluster \(other seed\)"):
        sweep(source, Measuring(HELD_OUT, seed=8), [Point(0.5, "obs", "stored")], f"{swept[0]}", Terms())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(([1.5], ["obs"], ["bf16"]), "share"), (([0.5], ["luck"], ["bf16"]), "no score"), (([0.5], ["obs"], ["int3"]), "int3"),
     (([math.nan], ["obs"], ["bf16"]), "share")],
)  # fmt: skip
def test_a_point_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        grid(*wrong)


def test_equal_points_do_not_beat_each_other():
    assert pareto([(2.0, 1.0), (2.0, 1.0), (1.0, 3.0), (3.0, 1.0)]) == [True, True, True, False]
