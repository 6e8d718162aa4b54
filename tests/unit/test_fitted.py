"""One budget over neurons and ranks: what it cuts, what it predicts, and the file that comes of it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.pruning import modulation
from flux_poke.pruning.checkpoint import Pruned, inspect, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import Point, trajectory, velocity_error
from flux_poke.tiny.model import FOLDER, STEPS, TinyFlux
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file, save_file

CHECKPOINT = FOLDER / "flux.safetensors"


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense.open(CHECKPOINT)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recording:
    recording = Recording.at(tmp_path_factory.mktemp("fitted") / "recording")
    prompts = [prompt for digit in range(10) for prompt in digit_prompts(digit)[:12:2]]
    record(CHECKPOINT, prompts, recording, Wanted(internals=False, rows=RowChoice(rows=24, steps=8)), seed=10_000, batch=30)
    return recording


@pytest.fixture(scope="module")
def cut(dense, recorded) -> Cut:
    """Half of all parameters."""
    plan = make_plan(dense, recorded, ByBudget(share=0.5, multiple=8)).plan
    return Cut(dense, plan, Repairs(dense, plan, "affine", recorded))


def drawn(forms: slice) -> list[Point]:
    """Points of drawings of every digit, by some of its prompts."""
    tiny, prompts = TinyFlux.load(), [prompt for digit in range(10) for prompt in digit_prompts(digit)[forms]]
    return trajectory(tiny.flux, tiny.noise(len(prompts), 500), FluxTimer(STEPS).sigmas(), *tiny.words(prompts))[0]


def test_half_of_all_parameters_costs_what_was_predicted_and_little(dense, cut):
    points = drawn(slice(1, 6, 2))
    model = Flux.load(cut, torch.float32)
    whole, left = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (dense.tensors, cut))
    assert 0.49 < left / whole <= 0.5
    assert left == sum(parameter.numel() for parameter in model.parameters())
    measured = velocity_error(model, points)
    assert measured < 0.008
    assert 0.5 < cut.plan.velocity_error / measured < 2


def test_the_file_is_of_the_size_asked_for_and_draws_the_same(dense, recorded, tmp_path):
    plan = make_plan(dense, recorded, ByBudget(size=0.0026, multiple=8)).plan
    cut = Cut(dense, plan, Repairs(dense, plan, "affine", recorded))
    save_pruned(tmp_path / "fitted.safetensors", cut)
    size = (tmp_path / "fitted.safetensors").stat().st_size
    assert size == pytest.approx(2.6e6, rel=0.01)
    assert size == pytest.approx(plan.sizes["file"], rel=0.01)
    pruned = Pruned.open(tmp_path / "fitted.safetensors")
    assert pruned.plan.ranks == plan.ranks == pruned.layout.ranks
    assert pruned.tensors.keys() == cut.keys()
    assert all(torch.equal(pruned.tensors[key], cut[key]) for key in cut)
    assert pruned.vectors is not None
    assert pruned.vectors.spread.shape == (128, 2 * max(plan.ranks.values()))
    for site in dense.layout.sites:
        assert f"{site.modulation}.weight" not in pruned.tensors
    said = inspect(tmp_path / "fitted.safetensors")
    assert "modulation of" in said
    assert "MB instead of 4.62 MB" in said


def test_modulation_truncated_alone_costs_what_was_predicted(dense, recorded):
    """Of half and three quarters of its weights, on prompts that were not recorded."""
    weights = sum(dense.tensors[f"{site.modulation}.weight"].numel() for site in dense.layout.sites)
    whole, points = sum(tensor.numel() for tensor in dense.tensors.values()), drawn(slice(12, 18, 2))
    for share in (0.5, 0.75):
        plan = make_plan(dense, recorded, ByBudget(share=share * weights / whole, touch="modulation", multiple=8)).plan
        model = Flux.load(Cut(dense, plan, Repairs(dense, plan, "affine", recorded)), torch.float32)
        assert plan.velocity_error is not None
        assert 0.6 < plan.velocity_error / velocity_error(model, points) < 1.6


def test_what_may_not_be_touched_stays(dense, recorded):
    planned = make_plan(dense, recorded, ByBudget(share=0.2, touch="modulation", multiple=8))
    assert not planned.plan.kept
    assert len(planned.plan.ranks) == 8
    for what in (ByBudget(share=0.2, touch="neurons"), ByBudget(neurons=0.4)):
        assert not make_plan(dense, recorded, what).plan.ranks
    protected = make_plan(dense, recorded, ByBudget(share=0.3, protect="double-1", multiple=8)).plan
    assert not {"double-img-1", "double-txt-1"} & {*protected.kept, *protected.ranks}


def test_a_plan_with_ranks_is_read_as_it_was_saved(cut, tmp_path):
    cut.plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert (loaded.ranks, loaded.sizes, loaded.digest) == (cut.plan.ranks, cut.plan.sizes, cut.plan.digest)
    assert loaded.table() == cut.plan.table()
    assert replace(loaded, ranks={}).digest != loaded.digest


def test_truncated_layers_are_worked_out_once(dense, recorded, cut, monkeypatch):
    cut.repairs.compute()
    assert cut.repairs.complete()
    monkeypatch.setattr(modulation, "low_rank", None)
    monkeypatch.setattr(modulation.Vectors, "sample", None)
    again = Cut(dense, cut.plan, Repairs(dense, cut.plan, "affine", recorded))
    assert all(torch.equal(again[key], cut[key]) for key in cut)


def test_without_repair_modulation_is_truncated_all_the_same(dense, recorded, cut):
    bare = Cut(dense, cut.plan, Repairs(dense, cut.plan, "none", recorded))
    key = f"{dense.layout.sites[0].modulation}.up.weight"
    assert torch.equal(bare[key], cut[key])
    with pytest.raises(UserError, match="no recording is given"):
        Cut(dense, cut.plan)


def test_a_recording_without_texts_says_what_to_do(dense, recorded, tmp_path):
    shutil.copytree(recorded.folder, tmp_path / "old")
    old = Recording.open(tmp_path / "old")
    manifest = json.loads((old.states_folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["rows"].pop("vector_in", None)
    (old.states_folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"holds no pooled texts.*record rows again"):
        make_plan(dense, old, ByBudget(share=0.3))


def test_a_file_whose_ranks_are_not_its_plans_is_refused(dense, cut, tmp_path):
    save_pruned(tmp_path / "fitted.safetensors", cut)
    tensors, header = load_file(tmp_path / "fitted.safetensors"), dict(Pruned.open(tmp_path / "fitted.safetensors").metadata)
    facts = json.loads(header["plan"])
    facts["ranks"] = {**facts["ranks"], "single-0": facts["ranks"]["single-0"] + 1}
    save_file(tensors, tmp_path / "other.safetensors", {**header, "plan": json.dumps(facts)})
    with pytest.raises(UserError, match="they do not belong together"):
        Pruned.open(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (ByBudget(size=5), "whole model takes 4.62 MB.*nothing has to be cut"),
        (ByBudget(size=0.0001), "are to be saved, but no more than"),
        (ByBudget(share=0.5, touch="all"), "may touch both, neurons or modulation"),  # type: ignore[arg-type]
        (ByBudget(share=0.5, precision="int3"), "one of the precisions"),
        (ByBudget(share=0.3, touch="modulation"), "are to be saved, but no more than"),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_is_refused_before_any_work(dense, recorded, monkeypatch, what, said):
    monkeypatch.setattr("flux_poke.pruning.by_budget.rank", None)
    monkeypatch.setattr("flux_poke.pruning.by_budget.modulation_errors", None)
    with pytest.raises(UserError, match=said):
        make_plan(dense, recorded, what)


def test_flux2_has_nothing_to_gain_by_modulation(tensors):
    klein = Dense.of(tensors("flux2"))
    with pytest.raises(UserError, match=r"FLUX.2 shares three among all its blocks"):
        ByBudget(share=0.1, touch="modulation").check(klein)
    ByBudget(share=0.1).check(klein)
