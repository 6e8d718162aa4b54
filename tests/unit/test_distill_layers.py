"""Distilling recorded models into layers (retrain/distill.py): what training starts from, and what its stats tell."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.states import StateChoice
from flux_poke.recording.store import HiddenStates
from flux_poke.recording.trajectories import Trajectories
from flux_poke.retrain.distill import distill_layers
from flux_poke.retrain.files import STATS, LayerStats, stats_figure, stats_table
from flux_poke.retrain.layers import retrain
from flux_poke.retrain.options import Options
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file

OPTIONS = Options(steps=2, learning_rate=1e-3, batch=8, eval_every=2, save_dtype="float32")


class Tiny:
    """The tiny FLUX with half of every MLP cut, and a recording of it that holds all that distilling can start from."""

    def __init__(self, folder: Path):
        self.dense = Dense.open(FOLDER / "flux.safetensors")
        whole = PruningPlan.keeping_all(self.dense)
        self.plan = replace(whole, kept={name: torch.arange(0, width, 2) for name, width in whole.widths.items()})
        self.recording = Recording.at(folder)
        wanted = Wanted(internals=True, rows=RowChoice(rows=48, steps=4), trajectories=StateChoice(4, dtype=torch.float32))
        record(
            FOLDER / "flux.safetensors", [digit_prompts(n % 10)[n // 10] for n in range(20)], self.recording, wanted, batch=20
        )

    def part(self, folder: Path, *kinds: str) -> Recording:
        """Some kinds of what was recorded, as a recording of its own."""
        whole = self.recording.states()
        states = HiddenStates.for_model(folder / "hidden_states", "flux1", self.dense.fingerprint)
        for shard in whole.manifest.shards:
            if shard.kind in kinds:
                states.append(shard.kind, load_file(whole.folder / shard.file), captures=shard.captures)
        if "internals" in kinds:
            shutil.copy(self.recording.internals_file, folder)
        return Recording.at(folder)

    def errors(self, tensors, stats: LayerStats) -> tuple[float, float]:
        """Relative and plain squared error of the velocity on held-out images, by hand."""
        samples = Trajectories.open(self.recording.states())
        held_out = torch.isin(samples.image, torch.tensor(stats.held_out_images)).nonzero().squeeze(1)
        point = samples.batch(held_out)
        with torch.no_grad():
            squared = (point.run(Flux.load({key: tensors[key].float() for key in tensors})) - point.velocity).square()
        return (squared.sum() / point.velocity.square().sum()).item(), squared.mean().item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def test_losses_are_plain_squared_errors_and_relative_ones_are_relative(tiny, tmp_path):
    stats = distill_layers(tiny.dense, tiny.plan, tiny.recording, tmp_path, OPTIONS)[0]
    relative, plain = tiny.errors(Cut(tiny.dense, tiny.plan), stats)
    assert (stats.relative_cut, stats.initial_loss) == pytest.approx((relative, plain), rel=1e-3)
    repaired, _ = tiny.errors(Cut(tiny.dense, tiny.plan, Repairs(tiny.dense, tiny.plan, "affine", tiny.recording)), stats)
    assert stats.relative_start == pytest.approx(repaired, rel=1e-2)
    assert stats.final_loss / stats.initial_loss == pytest.approx(stats.relative_final / stats.relative_cut, rel=1e-3)
    found = yaml.safe_load((tmp_path / STATS).read_text())
    assert found["layer3"]["initial_loss"] == stats.initial_loss


def test_the_error_of_the_whole_model_is_shown_once(tiny, tmp_path):
    stats = distill_layers(tiny.dense, tiny.plan, tiny.recording, tmp_path, OPTIONS)
    assert len(stats) == 6
    rows = [line for line in stats_table(stats).splitlines() if "double-0" in line or "single-3" in line]
    assert len(rows) == 1
    assert "double-0 to single-3" in rows[0]
    assert "2,048" in rows[0]
    assert [np.size(line.get_xdata()) for line in stats_figure(stats).axes[0].lines] == [1, 1, 1]


@pytest.mark.parametrize(
    ("kinds", "start", "said"),
    [
        (("trajectories",), "cut", "the cut without repair, since the recording holds neither rows nor internals"),
        (("trajectories", "internals"), "bias repair", "repaired biases, since the recording holds no rows"),
        (("trajectories", "internals", "rows"), "affine repair", "started from affine repair"),
    ],
)
def test_training_starts_from_the_best_repair_that_the_recording_allows_and_says_from_which(tiny, kinds, start, said, tmp_path):
    part, told = tiny.part(tmp_path / "part", *kinds), []
    options = {name: value for name, value in vars(OPTIONS).items() if name != "method"}
    given = tiny.dense, tiny.plan, part, tmp_path / "layers"
    stats = retrain("distill", *given, progress=lambda what, *_: told.append(what), **options)
    method = {"cut": "none", "bias repair": "bias", "affine repair": "affine"}[start]
    repaired, _ = tiny.errors(Cut(tiny.dense, tiny.plan, Repairs(tiny.dense, tiny.plan, method, part)), stats[0])
    assert stats[0].relative_start == pytest.approx(repaired, rel=1e-2)
    assert (stats[0].relative_start < 0.9 * stats[0].relative_cut) == (start != "cut")
    assert said in stats_table(stats)
    assert told[0] == f"starting from {start}"


def test_more_trajectories_are_trained_on_anew(tiny, tmp_path):
    few, folder = tiny.part(tmp_path / "few", "trajectories"), tmp_path / "layers"
    first = distill_layers(tiny.dense, tiny.plan, few, folder, OPTIONS)
    assert distill_layers(tiny.dense, tiny.plan, few, folder, OPTIONS) == first
    for shard in tiny.recording.states().manifest.shards:
        if shard.kind == "trajectories":
            moved = tuple(replace(capture, image=capture.image + 100) for capture in shard.captures)
            few.states().append("trajectories", load_file(tiny.recording.states_folder / shard.file), captures=moved)
    again = distill_layers(tiny.dense, tiny.plan, few, folder, OPTIONS)
    assert len(again[0].held_out_images) == 2 * len(first[0].held_out_images)


class Cancelled(Exception):
    pass


def test_cancelled_while_it_is_repaired_it_has_written_no_layer(tiny, tmp_path):
    def cancel(what: str, done: float, total: float) -> None:
        if "ridge" in what:
            raise Cancelled

    part = tiny.part(tmp_path / "part", "trajectories", "rows")
    with pytest.raises(Cancelled):
        distill_layers(tiny.dense, tiny.plan, part, tmp_path / "layers", OPTIONS, progress=cancel)
    assert not list(tmp_path.glob("layers/[0-9]*"))


def test_a_folder_of_another_plan_is_refused_before_any_work(tiny, tmp_path):
    distill_layers(tiny.dense, tiny.plan, tiny.recording, tmp_path, OPTIONS)
    other = replace(tiny.plan, kept={**tiny.plan.kept, "single-3": torch.arange(100)})
    told: list[str] = []
    with pytest.raises(UserError, match="was retrained for another plan"):
        distill_layers(tiny.dense, other, tiny.recording, tmp_path, OPTIONS, progress=lambda what, *_: told.append(what))
    assert not told


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from flux_poke.recording.recording import Recording
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.retrain import loop
from flux_poke.retrain.distill import distill_layers
from flux_poke.retrain.options import Options
loop.SAVE_EVERY = 0.0
dense, plan, recording, out = map(Path, sys.argv[1:])
options = Options(steps=8, batch=4, eval_every=2, save_dtype="float32")
given = Dense.open(dense), PruningPlan.load(plan), Recording.open(recording), out, options
distill_layers(*given, lambda status: print(status.step, flush=True))
"""


def test_killed_it_goes_on_ends_at_the_same_weights_and_is_not_done_again(tiny, tmp_path):
    tiny.plan.save(tmp_path / "plan.safetensors")
    part = tiny.part(tmp_path / "part", "trajectories")

    def command(out: Path) -> list[str]:
        paths = (FOLDER / "flux.safetensors", tmp_path / "plan.safetensors", part.folder, out)
        return [sys.executable, "-c", KILLED, *map(str, paths)]

    subprocess.run(command(tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    with subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 4:
            pass
        process.kill()
    assert not list((tmp_path / "killed").glob("[0-9]*.safetensors"))
    rest = subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True, text=True)
    assert int(rest.stdout.split()[0]) >= 2
    assert not subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True).stdout
    for name in ("0.safetensors", "5.safetensors"):
        whole, killed = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(killed[key], tensor) for key, tensor in whole.items())
