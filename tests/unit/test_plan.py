"""Scores, plans and budgets: against numbers worked out by hand, and every sentence for what cannot be planned."""
# mypy: disable-error-code="index"

import itertools

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.pruning.budget import BudgetCurve, by_budget, neuron_parameters, protected_sites, rising_means
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan, by_count, by_threshold
from flux_poke.pruning.scores import Ranking, rank
from flux_poke.recording.internals import Internals
from flux_poke.recording.statistics import SiteInternals
from flux_poke.recording.store import HiddenStates
from safetensors.torch import save_file
from scipy.optimize import isotonic_regression


@pytest.fixture
def dense(tensors) -> Dense:
    return Dense.of(tensors("flux1"))


@pytest.fixture
def internals(dense) -> Internals:
    """100 tokens of every site; neuron j fired j % 50 times."""
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for site in dense.layout.sites:
        h = torch.randn(100, site.width, generator=generator, dtype=torch.float64) + torch.rand(site.width, generator=generator)
        sites[site.name] = SiteInternals(torch.arange(site.width) % 50, 100, h.sum(0), h.square().sum(0))
    return Internals.new("flux1", dense.fingerprint, sites, steps=1)


def curves(dense, slopes):
    """Rankings 0, 1, 2, ... whose error grows as slope * cut^2."""
    cut = torch.arange(513, dtype=torch.float64)
    return {
        site.name: Ranking(torch.arange(site.width), slope * cut**2)
        for site, slope in zip(dense.layout.sites, slopes, strict=True)
    }


def test_frequency_cuts_the_rarest_and_of_equal_ones_the_first(dense, internals):
    order = rank("frequency", dense, internals)["double-img-0"].order
    assert order[:12].tolist() == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 1]


@pytest.mark.parametrize("score", ["magnitude", "fluctuation"])
def test_scores_are_the_neurons_own_share_of_the_output(dense, internals, score):
    ranking = rank(score, dense, internals)["single-1"]
    site = internals.sites["single-1"]
    down = dense.tensors["single_blocks.1.linear2.weight"][:, 128:].double()
    second = site.sum_sq / 100 - (0 if score == "magnitude" else (site.sum / 100) ** 2)
    expected = [(second[j] * (down[:, j] ** 2).sum()).item() for j in range(512)]
    assert ranking.order.tolist() == sorted(range(512), key=lambda j: expected[j])
    assert ranking.error[-1].item() == pytest.approx(sum(expected))


def test_by_count_cuts_the_first_of_the_ranking_in_the_given_layers(dense, internals):
    rankings = rank("fluctuation", dense, internals)
    plan = by_count(dense, rankings, "fluctuation", img_cut=100, txt_cut=0, single_cut=7, double=(1, 1), single=(0, 0))
    assert plan.cut == {"double-img-1": 100, "single-0": 7}
    assert plan.removed("double-img-1").tolist() == sorted(rankings["double-img-1"].order[:100].tolist())
    assert plan.masked_count == "img100_txt0_single7"
    assert plan.neurons == (6 * 512 - 107, 6 * 512)


def test_by_threshold_keeps_what_fires_often_enough(dense, internals):
    plan = by_threshold(dense, internals, img_threshold=10, txt_threshold=0.0, single_threshold=49)
    assert plan.kept["double-img-0"].tolist() == [j for j in range(512) if j % 50 >= 10]
    assert plan.kept["single-0"].tolist() == list(range(49, 512, 50))
    assert "double-txt-0" not in plan.kept
    rate = by_threshold(dense, internals, img_threshold=0.1, on="rate")
    assert torch.equal(rate.kept["double-img-0"], plan.kept["double-img-0"])


def test_a_budget_is_the_cheapest_of_all_ways_to_cut_as_much(dense):
    """Against every combination of widths, for two sites that may be cut."""
    slopes = [1.0, 2.7, 5.0, 1.0, 1.0, 1.0]
    rankings = curves(dense, slopes)
    amplification = {site.name: 1.0 + n for n, site in enumerate(dense.layout.sites)}
    protected = [site.name for site in dense.layout.sites[2:]]
    curve = BudgetCurve.of(dense.layout, rankings, amplification, multiple=64, protected=protected)
    plan = by_budget(dense, rankings, curve, "obs", share=448 / 3072)
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
    curve = BudgetCurve.of(dense.layout, rankings, None, multiple=64, protected=protected)
    assert by_budget(dense, rankings, curve, "obs", share=192 / 3072).cut == {"double-img-0": 192}


def test_prices_are_the_isotonic_regression_of_the_marginal_costs():
    generator = torch.Generator().manual_seed(0)
    costs, weights = torch.randn(40, generator=generator).double(), torch.rand(40, generator=generator).double() + 0.1
    expected = isotonic_regression((costs / weights).numpy(), weights=weights.numpy()).x
    assert rising_means(costs.tolist(), weights.tolist()) == pytest.approx(expected.tolist())


def test_budget_widths_are_multiples_and_never_zero(dense):
    rankings = curves(dense, [1e-9, 1, 1, 1, 1, 1])
    for multiple in (64, 100):
        plan = by_budget(dense, rankings, BudgetCurve.of(dense.layout, rankings, None, multiple), "obs", share=0.75)
        assert len(plan.kept["double-img-0"]) == multiple
        assert all(len(kept) % multiple == 0 and len(kept) for kept in plan.kept.values())
        assert plan.velocity_error is None


def test_a_budget_in_gigabytes_saves_that_much(dense):
    rankings = curves(dense, range(1, 7))
    curve = BudgetCurve.of(dense.layout, rankings, None)
    plan = by_budget(dense, rankings, curve, "obs", gigabytes=2e-4, dtype=torch.float32)
    cut = sum(plan.cut.values())
    each = neuron_parameters(dense.layout, dense.layout.sites[0])
    assert each == 128 + 1 + 128
    assert cut * each * 4 >= 2e5 > (cut - 64) * each * 4


def test_the_same_recording_gives_the_same_plan(dense, internals):
    plans = [by_count(dense, rank("magnitude", dense, internals), "magnitude", img_cut=99) for _ in range(2)]
    assert plans[0].digest == plans[1].digest
    assert by_count(dense, rank("fluctuation", dense, internals), "fluctuation", img_cut=99).digest != plans[0].digest


def test_a_plan_is_read_as_it_was_saved(dense, tmp_path):
    rankings = curves(dense, range(1, 7))
    amplification = {site.name: 2.0 for site in dense.layout.sites}
    plan = by_budget(dense, rankings, BudgetCurve.of(dense.layout, rankings, amplification), "obs", share=0.4)
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert loaded.digest == plan.digest
    assert loaded.table() == plan.table()
    assert (loaded.predicted, loaded.velocity_error, loaded.widths) == (plan.predicted, plan.velocity_error, plan.widths)
    assert loaded.fingerprint.matches(dense.fingerprint)


def test_the_curve_is_drawn_with_the_plan_on_it(dense):
    rankings = curves(dense, range(1, 7))
    curve = BudgetCurve.of(dense.layout, rankings, None)
    plan = by_budget(dense, rankings, curve, "obs", share=0.5)
    axes = curve.figure(plan).axes[0]
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


def test_what_cannot_be_planned_is_said_in_a_sentence(dense, internals, tensors, tmp_path):
    rankings = rank("frequency", dense, internals)
    other = Dense.of(tensors("flux1", seed=9), source="other.safetensors")
    with pytest.raises(UserError, match=r"recorded on another model than other.safetensors"):
        rank("frequency", other, internals)
    with pytest.raises(UserError, match="Internals are missing"):
        rank("fluctuation", dense)
    with pytest.raises(UserError, match="Rows are missing"):
        rank("obs", dense, internals)
    with pytest.raises(UserError, match=r"single_cut is 512, but single-0 has 512 neurons: cut 0 to 511"):
        by_count(dense, rankings, "frequency", single_cut=512)
    with pytest.raises(UserError, match=r"double layers 0 to 2 .* blocks are 0 to 1"):
        by_count(dense, rankings, "frequency", img_cut=1, double=(0, 2))
    with pytest.raises(UserError, match=r"all of them would be cut"):
        by_threshold(dense, internals, img_threshold=50)
    with pytest.raises(UserError, match="score frequency predicts none"):
        BudgetCurve.of(dense.layout, rankings)
    smooth = curves(dense, [1] * 6)
    curve = BudgetCurve.of(dense.layout, smooth)
    with pytest.raises(UserError, match="protect fewer layers"):
        by_budget(dense, smooth, curve, "obs", share=0.95)
    with pytest.raises(UserError, match="between 0 and 1"):
        by_budget(dense, smooth, curve, "obs", share=50)
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="is not a pruning plan"):
        PruningPlan.load(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="not a FLUX checkpoint"):
        Dense.open(tmp_path / "no.safetensors")


def test_too_few_rows_are_refused_with_how_many_are_needed(dense, tmp_path):
    store = HiddenStates.for_model(tmp_path, "flux1", dense.fingerprint)
    for site in dense.layout.sites:
        store.append("rows", {f"{site.name}.x": torch.zeros(511, 128), f"{site.name}.image": torch.zeros(511)})
    with pytest.raises(UserError, match=r"holds 511 rows of single-0.*at least 640 are needed"):
        rank("obs", dense, rows=store)
    with pytest.raises(UserError, match=r"at least 640 are needed"):
        rank("obs", dense, rows=store, sites=[dense.layout.site("single-0")])


def test_a_ranking_is_kept_for_its_rows_and_made_anew_where_it_is_damaged_or_outgrown(dense, tmp_path):
    store, site = HiddenStates.for_model(tmp_path, "flux1", dense.fingerprint), dense.layout.sites[0]

    def record(images):
        x = torch.randn(len(images), 128, generator=torch.Generator().manual_seed(len(images)))
        rows = {"x": x, "image": images, "sigma": torch.ones(len(images)), "step": torch.zeros(len(images)).long()}
        store.append("rows", {f"{site.name}.{part}": values for part, values in rows.items()})

    def ranked():
        return rank("obs", dense, rows=store, sites=[site])[site.name].order

    record(torch.arange(600) % 10)
    first = ranked()
    (file,) = (tmp_path / "rankings").iterdir()
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert torch.equal(ranked(), first)
    assert file.stat().st_mtime_ns == written
    file.write_bytes(whole[:1000])
    assert torch.equal(ranked(), first)
    assert file.read_bytes() == whole
    record(torch.arange(700) % 10)
    assert not torch.equal(ranked(), first)
    (newer,) = (tmp_path / "rankings").iterdir()
    assert newer != file
