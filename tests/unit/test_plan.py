"""Scores, plans and budgets: against numbers worked out by hand, and every sentence for what cannot be planned."""
# mypy: disable-error-code="index"

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.pruning.budget import BudgetCurve, neuron_parameters, neuron_steps, protected_sites, rising_means, velocity_error
from flux_poke.pruning.curves import Ranking
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan, from_rankings
from flux_poke.pruning.planning import ByCount, make_plan
from flux_poke.pruning.scores import rank
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from flux_poke.recording.statistics import SiteInternals
from flux_poke.recording.store import HiddenStates
from safetensors.torch import save_file
from scipy.optimize import isotonic_regression


@pytest.fixture
def dense(tensors) -> Dense:
    return Dense.of(tensors("flux1"))


@pytest.fixture
def recording(dense, tmp_path) -> Recording:
    """100 tokens of every site; neuron j fired j % 50 times."""
    return record_counts(dense, tmp_path / "recording")


def record_counts(dense, folder) -> Recording:
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for site in dense.layout.sites:
        h = torch.randn(100, site.width, generator=generator, dtype=torch.float64) + torch.rand(site.width, generator=generator)
        sites[site.name] = SiteInternals(torch.arange(site.width) % 50, 100, h.sum(0), h.square().sum(0))
    recording = Recording.at(folder)
    Internals.new("flux1", dense.fingerprint, sites, steps=1).save(recording.internals_file)
    return recording


def budget_plan(dense, rankings, curve, amount, of="neurons"):
    """The plan of a budget on made-up curves."""
    taken = curve.until(amount, of)
    plan = from_rankings(dense, rankings, curve.cuts(taken), "obs", "by budget")
    return replace(plan, velocity_error=curve.error(taken)) if curve.amplified else plan


def curve_of(dense, rankings, amplification, multiple=64, protected=()):
    """The curve of all MLPs that are not protected, at 2 bytes a number."""
    steps = []
    for site in (site for site in dense.layout.sites if site.name not in protected):
        error = velocity_error(rankings[site.name], amplification, site.name).tolist()
        steps += neuron_steps(site, neuron_parameters(dense.layout, site), error, multiple, 2)
    return BudgetCurve(steps, bool(amplification))


def curves(dense, slopes):
    """Rankings 0, 1, 2, ... whose error grows as slope * cut^2."""
    cut = torch.arange(513, dtype=torch.float64)
    return {
        site.name: Ranking(torch.arange(site.width), slope * cut**2)
        for site, slope in zip(dense.layout.sites, slopes, strict=True)
    }


def test_frequency_cuts_the_rarest_and_of_equal_ones_the_first(dense, recording):
    order = rank("frequency", dense, recording)["double-img-0"].order
    assert order[:12].tolist() == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 1]


def test_the_originals_counts_rank_by_frequency_and_by_nothing_else(dense, recording, tmp_path):
    counts = {name: site.fires for name, site in recording.internals().sites.items()}
    save_file(counts, tmp_path / "counts.safetensors")
    originals = Recording.open(tmp_path / "counts.safetensors")
    plans = [make_plan(dense, found, ByCount(img=100, score="frequency")).plan for found in (originals, recording)]
    assert plans[0].kept["double-img-0"].tolist() == plans[1].kept["double-img-0"].tolist()
    with pytest.raises(UserError, match="do not tell enough for the score fluctuation"):
        rank("fluctuation", dense, originals)


@pytest.mark.parametrize("score", ["magnitude", "fluctuation"])
def test_scores_are_the_neurons_own_share_of_the_output(dense, recording, score):
    ranking = rank(score, dense, recording)["single-1"]
    site = recording.internals().sites["single-1"]
    down = dense.tensors["single_blocks.1.linear2.weight"][:, 128:].double()
    second = site.sum_sq / 100 - (0 if score == "magnitude" else (site.sum / 100) ** 2)
    expected = [(second[j] * (down[:, j] ** 2).sum()).item() for j in range(512)]
    assert ranking.order.tolist() == sorted(range(512), key=lambda j: expected[j])
    assert ranking.error[-1].item() == pytest.approx(sum(expected))


def test_a_budget_is_the_cheapest_of_all_ways_to_cut_as_much(dense):
    """Against every combination of widths, for two sites that may be cut."""
    slopes = [1.0, 2.7, 5.0, 1.0, 1.0, 1.0]
    rankings = curves(dense, slopes)
    amplification = {site.name: 1.0 + n for n, site in enumerate(dense.layout.sites)}
    protected = [site.name for site in dense.layout.sites[2:]]
    curve = curve_of(dense, rankings, amplification, multiple=64, protected=protected)
    plan = budget_plan(dense, rankings, curve, 448)
    names = [site.name for site in dense.layout.sites[:2]]

    def error(cuts):
        return sum(rankings[name].error[cut].item() * amplification[name] for name, cut in zip(names, cuts, strict=True))

    ways = [cuts for cuts in itertools.product(range(0, 449, 64), repeat=2) if sum(cuts) == 448]
    best = min(ways, key=error)
    assert tuple(plan.cut.get(name, 0) for name in names) == best
    assert plan.velocity_error == pytest.approx(error(best))
    assert set(plan.kept) <= set(names)


def test_neurons_that_pay_only_together_are_cut_together(dense):
    """The first 64 neurons of one site cost 10 and the rest nothing more; 64 of the other always cost 4."""
    rankings = curves(dense, [1.0] * 6)
    cut = torch.arange(513)
    rankings["double-img-0"] = Ranking(cut[:512], 10.0 * (cut / 64).clamp(max=1).double())
    rankings["double-txt-0"] = Ranking(cut[:512], 4.0 * cut.double() / 64)
    protected = [site.name for site in dense.layout.sites[2:]]
    curve = curve_of(dense, rankings, {}, multiple=64, protected=protected)
    assert budget_plan(dense, rankings, curve, 192).cut == {"double-img-0": 192}


def test_prices_are_the_isotonic_regression_of_the_marginal_costs():
    generator = torch.Generator().manual_seed(0)
    costs, weights = torch.randn(40, generator=generator).double(), torch.rand(40, generator=generator).double() + 0.1
    expected = isotonic_regression((costs / weights).numpy(), weights=weights.numpy()).x
    assert rising_means(costs.tolist(), weights.tolist()) == pytest.approx(expected.tolist())


def test_budget_widths_are_multiples_and_never_zero(dense):
    rankings = curves(dense, [1e-9, 1, 1, 1, 1, 1])
    for multiple in (64, 100):
        plan = budget_plan(dense, rankings, curve_of(dense, rankings, {}, multiple), 0.75 * 3072)
        assert len(plan.kept["double-img-0"]) == multiple
        assert all(len(kept) % multiple == 0 and len(kept) for kept in plan.kept.values())
        assert plan.velocity_error is None


def test_a_budget_in_gigabytes_saves_that_much(dense):
    rankings = curves(dense, range(1, 7))
    curve = curve_of(dense, rankings, {})
    plan = budget_plan(dense, rankings, curve, 2e-4 * 1e9 / 4, "parameters")
    cut = sum(plan.cut.values())
    each = neuron_parameters(dense.layout, dense.layout.sites[0])
    assert each == 128 + 1 + 128
    assert cut * each * 4 >= 2e5 > (cut - 64) * each * 4


def test_the_same_recording_gives_the_same_plan(dense, recording):
    plans = [make_plan(dense, recording, ByCount(img=99, score="magnitude")).plan for _ in range(2)]
    assert plans[0].digest == plans[1].digest
    assert make_plan(dense, recording, ByCount(img=99, score="fluctuation")).plan.digest != plans[0].digest


def test_a_plan_is_read_as_it_was_saved(dense, tmp_path):
    rankings = curves(dense, range(1, 7))
    amplification = {site.name: 2.0 for site in dense.layout.sites}
    plan = budget_plan(dense, rankings, curve_of(dense, rankings, amplification), 0.4 * 3072)
    plan = replace(
        plan, checkpoint="dense.safetensors", recording="portraits", settings={"by": "threshold", "img": 1234567.8901}
    )
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert loaded.digest == plan.digest
    assert loaded.table() == plan.table()
    assert (loaded.predicted, loaded.velocity_error, loaded.widths) == (plan.predicted, plan.velocity_error, plan.widths)
    assert loaded.fingerprint.matches(dense.fingerprint)
    assert (loaded.checkpoint, loaded.recording, loaded.settings) == (plan.checkpoint, plan.recording, plan.settings)
    assert "\n" not in loaded.totals()
    assert loaded.table().startswith(loaded.totals())


def test_the_curve_is_drawn_with_the_plan_on_it(dense):
    rankings = curves(dense, range(1, 7))
    curve = curve_of(dense, rankings, {})
    plan = budget_plan(dense, rankings, curve, 0.5 * 3072)
    axes = curve.figure(curve.until(0.5 * 3072, "neurons")).axes[0]
    memory, error = np.asarray(axes.lines[0].get_xydata()).T
    assert len(memory) == len(curve.steps)
    assert (error[1:] >= error[:-1]).all()
    ((x, y),) = np.asarray(axes.lines[2].get_xydata())
    assert x == pytest.approx(sum(plan.cut.values()) * 257 * 2 / 1e6)
    assert y == pytest.approx(sum(rankings[name].error[cut].item() for name, cut in plan.cut.items()))


def test_protected_layers_are_named_by_block_or_mlp(dense):
    assert protected_sites(dense.layout, "double-1, single-0 double-txt-0") == {
        "double-img-1", "double-txt-1", "single-0", "double-txt-0",
    }  # fmt: skip
    with pytest.raises(UserError, match="no MLP called"):
        protected_sites(dense.layout, "double-7")


def test_an_error_counts_as_noise_where_it_is_small_and_as_all_where_it_is_all():
    """In between on logarithmic scales. What else a recording of an earlier version holds has no part in it."""
    error = torch.tensor([0.0, 0.01, 0.1, 1.0], dtype=torch.float64) * 8
    ranking = Ranking(torch.arange(3), error, energy=8.0)
    found = velocity_error(ranking, {"single-0": 3.0, "single-0.removed": 27.0, "single-0.shifted": 100.0}, "single-0")
    assert found.tolist() == pytest.approx([0, 0.08 * 3, 0.8 * 9, 8 * 27])
    assert velocity_error(ranking, {"single-0": 3.0}, "single-0").tolist() == pytest.approx((3 * error).tolist())


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        (torch.zeros(192, dtype=torch.int32), "ascending"),
        (torch.arange(88, 600).int(), "from 0 to 511"),
        (torch.arange(-1, 5).int(), "from 0 to 511"),
        (torch.arange(10).int().flip(0), "ascending"),
        (torch.arange(10).int().reshape(2, 5), r"\(2, 5\)"),
        (torch.arange(0).int(), "at least one"),
        (torch.arange(10).float(), "float32"),
    ],
)
def test_kept_indices_that_cannot_be_are_refused(dense, tmp_path, indices, said):
    header = PruningPlan.keeping_all(dense).header()
    save_file({"single-0": indices}, tmp_path / "plan.safetensors", header)
    with pytest.raises(UserError, match=rf"damaged pruning plan .*{said}"):
        PruningPlan.load(tmp_path / "plan.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"widths": []}, {"widths": {"single-0": "512"}}, {"widths": {"single-0": -1}}, {"widths": {"nonsense": 5}},
        {"predicted": {"single-0": float("nan")}}, {"velocity_error": float("inf")}, {"velocity_error": "small"},
        {"unknown": {"single-0": 600}}, {"unknown": {"single-9": 6}}, {"settings": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(dense, tmp_path, change):
    header = PruningPlan.keeping_all(dense).header()
    header["plan"] = json.dumps({**json.loads(header["plan"]), **change})
    save_file({"single-0": torch.arange(5).int()}, tmp_path / "plan.safetensors", header)
    with pytest.raises(UserError, match="damaged pruning plan"):
        PruningPlan.load(tmp_path / "plan.safetensors")


def test_what_is_no_plan_or_no_model_is_said_in_a_sentence(dense, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="is not a pruning plan"):
        PruningPlan.load(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="not a FLUX checkpoint"):
        Dense.open(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="protect fewer layers"):
        curve_of(dense, curves(dense, [1] * 6), {}).until(0.95 * 3072, "neurons")


def store_of(recording, dense):
    return HiddenStates.for_model(recording.states_folder, "flux1", dense.fingerprint)


def test_too_few_rows_are_refused_with_how_many_are_needed(dense, recording):
    store = store_of(recording, dense)
    for site in dense.layout.sites:
        store.append("rows", {f"{site.name}.x": torch.zeros(511, 128), f"{site.name}.image": torch.zeros(511)})
    with pytest.raises(UserError, match=r"holds 511 rows of single-0.*at least 640 are needed"):
        rank("obs", dense, recording)
    with pytest.raises(UserError, match=r"at least 640 are needed"):
        rank("obs", dense, recording, [dense.layout.site("single-0")])


def test_a_ranking_is_kept_for_its_rows_and_made_anew_where_it_is_damaged_or_outgrown(dense, recording):
    store, site = store_of(recording, dense), dense.layout.sites[0]

    def record(images):
        x = torch.randn(len(images), 128, generator=torch.Generator().manual_seed(len(images)))
        rows = {"x": x, "image": images, "sigma": torch.ones(len(images)), "step": torch.zeros(len(images)).long()}
        store.append("rows", {f"{site.name}.{part}": values for part, values in rows.items()})

    def ranked():
        return rank("obs", dense, recording, [site])[site.name].order

    record(torch.arange(600) % 10)
    first = ranked()
    (file,) = (recording.cache / "rankings").iterdir()
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert torch.equal(ranked(), first)
    assert file.stat().st_mtime_ns == written
    file.write_bytes(whole[:1000])
    assert torch.equal(ranked(), first)
    assert file.stat().st_size == len(whole)
    record(torch.arange(700) % 10)
    assert not torch.equal(ranked(), first)
    (newer,) = (recording.cache / "rankings").iterdir()
    assert newer != file
