"""Requests for plans: what they give, and that whatever cannot be planned is refused before neurons are ranked."""
# mypy: disable-error-code="union-attr"

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.pruning import by_budget, requests
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByBudget, ByCount, ByThreshold, make_plan, open_dense, open_recording
from flux_poke.pruning.scores import rank
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from flux_poke.recording.statistics import SiteInternals
from flux_poke.recording.store import HiddenStates
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import save_file

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def dense(tensors, tmp_path) -> Dense:
    save_file(tensors("flux1"), tmp_path / "dense.safetensors")
    return Dense.open(tmp_path / "dense.safetensors")


@pytest.fixture
def recording(dense, tmp_path) -> Recording:
    return recorded(dense, tmp_path / "recording", torch.linspace(0.02, 1, 700))


def recorded(dense: Dense, folder: Path, sigma: torch.Tensor) -> Recording:
    """100 tokens of every site; neuron j fired j % 50 times; 700 rows of thirty images, and what errors do."""
    generator = torch.Generator().manual_seed(0)
    recording = Recording.at(folder)
    sites = {}
    for site in dense.layout.sites:
        h = torch.randn(100, site.width, generator=generator, dtype=torch.float64) + torch.rand(site.width, generator=generator)
        sites[site.name] = SiteInternals(torch.arange(site.width) % 50, 100, h.sum(0), h.square().sum(0))
    Internals.new("flux1", dense.fingerprint, sites, steps=1).save(recording.internals_file)
    store = HiddenStates.for_model(recording.states_folder, "flux1", dense.fingerprint)
    rows: dict[str, torch.Tensor] = {}
    for site in dense.layout.sites:
        rows[f"{site.name}.x"] = torch.randn(700, 128, generator=generator)
        if site.stream == "single":
            rows[f"{site.name}.attn"] = torch.randn(700, 128, generator=generator)
        rows[f"{site.name}.image"], rows[f"{site.name}.step"] = torch.arange(700) % 30, torch.zeros(700).long()
        rows[f"{site.name}.sigma"] = sigma.clone()
    store.append("rows", rows)
    store.add_amplification({site.name: {1.0: (2.0, 1)} for site in dense.layout.sites})
    return recording


def test_by_count_cuts_the_first_of_the_ranking_in_the_given_layers(dense, recording):
    plan = make_plan(dense, recording, ByCount(img=100, single=7, double=(1, 1), single_blocks=(0, 0))).plan
    order = rank("fluctuation", dense, recording)["double-img-1"].order
    assert plan.cut == {"double-img-1": 100, "single-0": 7}
    assert plan.removed("double-img-1").tolist() == sorted(order[:100].tolist())
    assert plan.masked_count == "img100_txt0_single7"
    assert plan.neurons == (6 * 512 - 107, 6 * 512)


def test_by_threshold_keeps_what_fires_often_enough(dense, recording):
    plan = make_plan(dense, recording, ByThreshold(img=10, single=49)).plan
    assert plan.kept["double-img-0"].tolist() == [j for j in range(512) if j % 50 >= 10]
    assert plan.kept["single-0"].tolist() == list(range(49, 512, 50))
    assert "double-txt-0" not in plan.kept
    rate = make_plan(dense, recording, ByThreshold(img=0.1, on="rate")).plan
    assert torch.equal(rate.kept["double-img-0"], plan.kept["double-img-0"])


def test_a_budget_saves_what_it_is_asked_for(dense, recording):
    share = make_plan(dense, recording, ByBudget(neurons=0.4, multiple=64, protect="double-1")).plan
    assert sum(share.cut.values()) == -(-0.4 * 3072 // 64) * 64
    assert not {"double-img-1", "double-txt-1"} & set(share.kept)
    assert share.velocity_error is not None
    assert share.velocity_error > 0
    size = make_plan(dense, recording, ByBudget(saved=2e-4, touch="neurons", multiple=64)).plan
    cut = sum(size.cut.values())
    assert cut * 257 * 4 >= 2e5 > (cut - 64) * 257 * 4


WRONG = [
    (ByCount(), "all cuts .* are 0"),
    (ByCount(img=-5), r"cut of img MLPs is -5, but double-img-0 has 512 neurons: cut 0 to 511"),
    (ByCount(single=512), r"cut of single MLPs is 512, but single-0 has 512 neurons"),
    (ByCount(img=1, double=(0, 9)), r"double layers 0 to 9 .* blocks are 0 to 1"),
    (ByCount(img=1, single_blocks=(1, 0)), r"single layers 1 to 0"),
    (ByCount(img=1, score="luck"), "no score 'luck'"),
    (ByThreshold(), "all thresholds .* are 0"),
    (ByThreshold(img=-1), "a number from 0 on .*found -1"),
    (ByThreshold(img=NAN), "found nan"),
    (ByThreshold(img=INF), "found inf"),
    (ByThreshold(img=1.5, on="rate"), "from 0 to 1"),
    (ByThreshold(img=1, double=(0, 2)), "double layers 0 to 2"),
    (ByBudget(), "one of the four"),
    (ByBudget(neurons=0.5, saved=1), "found saved and neurons"),
    (ByBudget(neurons=50), "between 0 and 1"),
    (ByBudget(neurons=NAN), "found nan"),
    (ByBudget(saved=NAN), "found nan"),
    (ByBudget(saved=INF), "found inf"),
    (ByBudget(saved=-1), "found -1"),
    (ByBudget(neurons=0.95, multiple=64), "protect fewer layers"),
    (ByBudget(neurons=0.5, multiple=0), "at least 1"),
    (ByBudget(neurons=0.5, multiple=10**20), "at most 65,536"),
    (ByBudget(neurons=0.5, multiple=2**16), "protect fewer layers"),
    (ByCount(img=10**20), "but double-img-0 has 512 neurons"),
    (ByBudget(neurons=0.5, protect="double-7"), "no MLP called"),
]


@pytest.mark.parametrize(("what", "said"), WRONG, ids=[str(what) for what, _ in WRONG])
def test_what_cannot_be_planned_is_refused_before_neurons_are_ranked(dense, recording, monkeypatch, what, said):
    monkeypatch.setattr(requests, "rank", None)
    monkeypatch.setattr(by_budget, "rank", None)
    with pytest.raises(UserError, match=said):
        make_plan(dense, recording, what)
    with pytest.raises(UserError, match=said):
        what.check(dense)


@pytest.mark.parametrize(
    "what", [ByCount(img=5), ByCount(img=5, score="obs"), ByThreshold(img=5), ByBudget(neurons=0.5)], ids=str
)
def test_a_device_that_is_not_there_is_refused_for_every_plan(dense, recording, what):
    with pytest.raises(UserError, match="device cuda:99 cannot be used"):
        make_plan(dense, recording, what, device="cuda:99")


@pytest.mark.parametrize("what", [ByCount(img=5), ByThreshold(img=5), ByBudget(neurons=0.5)], ids=str)
@pytest.mark.parametrize("part", ["internals", "states"])
def test_what_was_recorded_of_another_model_is_refused_by_every_plan(dense, recording, tensors, what, part):
    other = Dense.of(tensors("flux1", seed=9))
    if part == "internals":
        replace(recording.internals(), fingerprint=other.fingerprint).save(recording.internals_file)
    else:
        replace(recording.states().manifest, fingerprint=other.fingerprint).save(recording.states_folder)
    with pytest.raises(UserError, match="two models"):
        make_plan(dense, recording, what)
    with pytest.raises(UserError, match=r"two models|another model"):
        make_plan(other, recording, what)


def test_a_threshold_that_all_or_none_reach_is_said(dense, recording):
    with pytest.raises(UserError, match="all of them would be cut"):
        make_plan(dense, recording, ByThreshold(img=50))
    site = recording.internals()
    fired = {name: replace(found, fires=found.fires + 1) for name, found in site.sites.items()}
    replace(site, sites=fired).save(recording.internals_file)
    with pytest.raises(UserError, match="Nothing is cut"):
        make_plan(dense, recording, ByThreshold(img=1))


def test_what_was_asked_for_is_data_with_all_its_digits(dense, recording, tmp_path):
    planned = make_plan(dense, recording, ByThreshold(img=12.3456789012345, txt=1e-9, double=(0, 1)))
    planned.plan.save(tmp_path / "plan.safetensors")
    settings = PruningPlan.load(tmp_path / "plan.safetensors").settings
    assert settings == planned.plan.settings
    assert (settings["by"], settings["img"], settings["txt"], settings["double"]) == (
        "threshold",
        12.3456789012345,
        1e-9,
        [0, 1],
    )


def test_a_plan_knows_its_checkpoint_and_its_recording(dense, recording, tensors, tmp_path):
    plan = make_plan(dense, recording, ByCount(img=5)).plan
    plan.save(tmp_path / "plan.safetensors")
    plan = PruningPlan.load(tmp_path / "plan.safetensors")
    assert open_dense(plan).path == dense.path
    assert open_recording(plan).folder == recording.folder
    moved = tmp_path / "moved"
    recording.folder.rename(moved)
    with pytest.raises(UserError, match=r"recording .* is not there, and the plan was made from it"):
        open_recording(plan)
    assert open_recording(plan, moved).folder == moved
    (tmp_path / "dense.safetensors").rename(tmp_path / "there.safetensors")
    with pytest.raises(UserError, match=r"dense model .* is not there, and the plan was made from it"):
        open_dense(plan)
    assert open_dense(plan, tmp_path / "there.safetensors").fingerprint.matches(plan.fingerprint)
    save_file(tensors("flux1", seed=9), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="made for another model"):
        open_dense(plan, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not tell what checkpoint"):
        open_dense(replace(plan, checkpoint=""))


def test_rows_of_so_few_images_that_predictions_do_not_hold_are_told(dense, recording, monkeypatch):
    planned = make_plan(dense, recording, ByBudget(neurons=0.5))
    monkeypatch.setattr("flux_poke.pruning.by_budget.FEW", 31)
    told = make_plan(dense, recording, ByBudget(neurons=0.5))
    assert (planned.notes, len(told.notes)) == ((), 1)
    assert told.notes[0].startswith("The rows are of 30 images: prompts that say anything else may come out far worse")


@pytest.mark.parametrize(
    ("sigma", "said"),
    [
        (torch.linspace(0.3, 1, 700), "noise levels 0.3 to 1, 29% of them below 0.5: with another shift, number of steps or"),
        (torch.linspace(0.2, 1, 700), "noise levels 0.2 to 1, 38% of them below 0.5"),
        (torch.linspace(0.01, 0.6, 700), "noise levels 0.01 to 0.6, 17% of them from 0.5 on: with another shift"),
        (torch.ones(700), "noise levels 1 to 1, 0% of them below 0.5"),
        (torch.tensor([0.25, 0.5, 0.75, 1]).repeat(175), "noise levels 0.25 to 1, 25% of them below 0.5"),
    ],
    ids=["shifted", "eight steps", "denoise", "one step", "four steps"],
)
def test_rows_of_noise_levels_that_leave_others_out_are_told(dense, tmp_path, sigma, said):
    (note,) = make_plan(dense, recorded(dense, tmp_path / "other", sigma), ByBudget(neurons=0.5)).notes
    assert said in note
    assert note.endswith("Record with the sampler settings that you draw with.")


def test_one_unmeasured_mlp_is_said_in_a_note(dense, recording):
    assert make_plan(dense, recording, ByBudget(neurons=0.5)).notes == ()
    store = recording.states()
    known = {name: levels for name, levels in store.manifest.amplification.items() if name != "single-1"}
    replace(store.manifest, amplification=known).save(recording.states_folder)
    planned = make_plan(dense, recording, ByBudget(neurons=0.5))
    (note,) = planned.notes
    assert "5 of 6 MLPs (not of single-1, for one)" in note
    assert planned.plan.velocity_error is None


def test_what_a_recording_of_an_earlier_version_holds_besides_is_ignored(dense, recording):
    plan = make_plan(dense, recording, ByBudget(neurons=0.5)).plan
    recording.states().add_amplification({f"{site.name}.shifted": {1.0: (50.0, 1)} for site in dense.layout.sites[:2]})
    found = make_plan(dense, recording, ByBudget(neurons=0.5)).plan
    assert (found.digest, found.velocity_error) == (plan.digest, plan.velocity_error)


def test_a_budget_wants_rows(dense, recording):
    alone = Recording.at(recording.folder.parent / "alone")
    recording.internals().save(alone.internals_file)
    with pytest.raises(UserError, match="holds no"):
        make_plan(dense, alone, ByBudget(neurons=0.5))
    assert make_plan(dense, alone, ByCount(img=5)).plan.cut == {"double-img-0": 5, "double-img-1": 5}


@pytest.mark.parametrize("what", [ByCount(img=100), ByThreshold(img=10), ByBudget(neurons=0.5)], ids=str)
def test_every_plan_has_a_picture_whose_words_do_not_overlap(dense, recording, what):
    figure = make_plan(dense, recording, what).figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    renderer = canvas.get_renderer()
    label = axes.xaxis.label.get_window_extent(renderer)
    for legend in figure.legends:
        assert not label.overlaps(legend.get_window_extent(renderer))


def test_progress_never_goes_back_and_cancel_is_heard(dense, recording):
    told: list[float] = []
    make_plan(dense, recording, ByBudget(neurons=0.5), progress=lambda what, done, total: told.append(done / total))
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) > 20

    def cancel(what: str, done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_plan(dense, recording, ByBudget(neurons=0.5), progress=cancel)


def test_an_mlp_of_one_neuron_is_ranked(dense, recording, tensors):
    """Its only neuron is the last that would be cut, and nothing is measured in between."""
    state = tensors("flux1")
    state = {key: tensor[: 3 * 128 + 1] if "linear1" in key else tensor for key, tensor in state.items()}
    state = {key: tensor[:, :129] if key.endswith("linear2.weight") else tensor for key, tensor in state.items()}
    thin, site = Dense.of(state), Dense.of(state).layout.site("single-0")
    assert site.width == 1
    manifest = replace(recording.states().manifest, fingerprint=thin.fingerprint)
    manifest.save(recording.states_folder)
    ranking = rank("obs", thin, recording, [site])["single-0"]
    assert ranking.order.tolist() == [0]
    assert ranking.error is not None
    assert ranking.error[0].item() == 0
    assert ranking.error[1].item() > 0
