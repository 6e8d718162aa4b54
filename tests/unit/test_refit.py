"""pruning/refit.py, moments.py and weights.py against least squares of numpy, on rows written out."""
# mypy: disable-error-code="union-attr, operator, dict-item"

from dataclasses import replace

import numpy as np
import pytest
import torch
from flux_poke.flux.layout import Site, read_layout
from flux_poke.flux.weights import SiteWeights, full_precision, stored_like
from flux_poke.pruning.moments import Moments, gather
from flux_poke.pruning.obs import eliminate
from flux_poke.pruning.refit import SKETCH, Regression, affine, bias, choose, none, output_energy, sketched
from flux_poke.pruning.scores import obs
from flux_poke.recording.store import Rows
from torch.nn import functional as F

KEPT = torch.tensor([0, 3, 4, *range(10, 200)])


def made_rows(count: int, hidden: int, attn: bool, images: int = 8, seed: int = 0) -> Rows:
    """Rows of a few directions and some noise, so that neurons predict each other."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(12, hidden, generator=generator)
    x = torch.randn(count, 12, generator=generator) @ shape / 4 + 0.1 * torch.randn(count, hidden, generator=generator) + 0.3
    attention = (x.roll(1, 1) + torch.randn(count, hidden, generator=generator)).bfloat16() if attn else None
    zeros = torch.zeros(count)
    return Rows(x.bfloat16(), attention, zeros, torch.arange(count) % images, zeros.long())


@pytest.fixture(params=[("flux1", "double-img-0"), ("flux1", "single-0"), ("flux2", "double-txt-0"), ("flux2", "single-1")])
def site_rows(request, tensors):
    """A site's weights, rows, and what its down projection reads there, by hand: float64 [rows, attention + width]."""
    family, name = request.param
    state = tensors(family)
    site = read_layout({key: value.shape for key, value in state.items()}).site(name)
    rows = made_rows(1500, 128, site.stream == "single")
    up = rows.x.double() @ state[f"{site.up}.weight"].double()[site.up_row :].T
    if site.biased:
        up = up + state[f"{site.up}.bias"].double()[site.up_row :]
    if site.gated:
        up, value = up.chunk(2, dim=1)
        h = F.silu(up) * value
    else:
        h = F.gelu(up, approximate="tanh")
    z = h if rows.attn is None else torch.cat((rows.attn.double(), h), dim=1)
    return SiteWeights.read(state, site), rows, z


def test_moments_are_numpys(site_rows):
    weights, rows, z = site_rows
    moments = gather(weights, [rows[:400], rows[400:1100], rows[1100:]])
    expected = np.cov(z.numpy().T, bias=True) if weights.bias is not None else (z.T @ z).numpy() / len(z)
    np.testing.assert_allclose(moments.mean.numpy(), z.mean(0).numpy(), atol=1e-5 * z.abs().max().item())
    np.testing.assert_allclose(moments.second.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_moments_of_weighted_rows_are_numpys(site_rows):
    weights, rows, z = site_rows
    sigma = torch.linspace(0, 1, len(rows))
    rows = Rows(rows.x, rows.attn, sigma, rows.image, rows.step)
    moments = gather(weights, [rows[:400], rows[400:]], lambda sigma: 3 * sigma**2)
    w, values = 3 * sigma.double().numpy() ** 2, z.numpy()
    expected = np.cov(values.T, bias=True, aweights=w) if weights.bias is not None else (values.T * w) @ values / w.sum()
    assert moments.rows == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-6)
    np.testing.assert_allclose(moments.mean.numpy(), w @ values / w.sum(), atol=1e-5 * np.abs(values).max())
    np.testing.assert_allclose(moments.second.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_merged_moments_are_those_of_all_rows(site_rows):
    weights, rows, _ = site_rows
    together, apart = gather(weights, [rows]), gather(weights, [rows[:300]]).merge(gather(weights, [rows[300:]]))
    assert (apart.count, apart.rows) == (together.count, together.rows)
    torch.testing.assert_close(apart.second, together.second, rtol=1e-4, atol=1e-5 * together.second.abs().max().item())


def test_a_ranking_does_not_depend_on_the_unit_of_weights(site_rows):
    weights, rows, _ = site_rows
    plain, larger = gather(weights, [rows]), gather(weights, [rows], lambda sigma: torch.full_like(sigma, 16.0))
    expected, found = obs(plain, weights.down), obs(larger, weights.down)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-3, atol=1e-6 * expected.energy)


def test_affine_repair_is_numpys_least_squares(site_rows):
    """Ridge regression as ordinary least squares on stacked rows: [z; sqrt(n lam) I] against [h_P; 0]."""
    weights, _, z = site_rows
    count, a, ridge = len(z), weights.attn.shape[1] if weights.attn is not None else 0, 1e-3
    centred = weights.bias is not None
    mean = z.mean(0)
    about = z - mean if centred else z
    moments = Moments(count, count, a, centred, mean, about.T @ about / count)
    repaired = affine(weights, KEPT, moments, ridge, fold=True)

    gone = np.setdiff1d(np.arange(weights.down.shape[1]), KEPT.numpy())
    regressed = np.concatenate((np.arange(a), a + KEPT.numpy()))
    design, target = about.numpy()[:, regressed], about.numpy()[:, a + gone]
    variance = (design**2).mean(0)
    lam = np.concatenate((np.full(a, variance[:a].mean() if a else 0.0), np.full(len(KEPT), variance[a:].mean()))) * ridge
    stacked = np.vstack((design, np.diag(np.sqrt(count * lam))))
    b = np.linalg.lstsq(stacked, np.vstack((target, np.zeros((len(lam), len(gone))))), rcond=None)[0].T
    down = weights.down.double().numpy()
    whole = np.concatenate((weights.attn.double().numpy() if a else np.empty((128, 0)), down), axis=1)
    np.testing.assert_allclose(repaired.down.numpy(), whole[:, regressed] + down[:, gone] @ b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(repaired.fold.matrix.numpy(), b, rtol=1e-4, atol=1e-4)
    error = ((down[:, gone] @ (target.T - b @ design.T)) ** 2).sum() / count
    all_of_it = ((about.numpy()[:, a:] @ down.T) ** 2).sum() / count
    problem = Regression.of(weights, KEPT, moments)
    assert problem.error(problem.solve(ridge), moments) == pytest.approx(error, rel=1e-6)
    assert output_energy(weights.down, moments) == pytest.approx(all_of_it, rel=1e-6)
    if centred:
        offset = mean.numpy()[a + gone] - b @ mean.numpy()[regressed]
        np.testing.assert_allclose(repaired.bias.numpy(), weights.bias.numpy() + down[:, gone] @ offset, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(repaired.fold.offset.numpy(), offset, rtol=1e-4, atol=1e-4)
    else:
        assert repaired.bias is None
        assert repaired.fold.offset is None


def test_greedy_obs_and_ridge_on_the_same_set_agree():
    """The weights that OBS leaves, followed cut by cut, are the ridge solution on what it keeps."""
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(400, 48, generator=generator, dtype=torch.float64) @ torch.randn(48, 48, generator=generator).double()
    second, down = h.T @ h / len(h), torch.randn(16, 48, generator=generator)
    ridge = 1e-3
    hessian = second + ridge * second.diagonal().mean() * torch.eye(48)
    order, _ = eliminate(hessian.clone(), down)
    inverse, w = hessian.inverse(), down.double().clone()
    for j in order[:24]:
        w -= torch.outer(w[:, j], inverse[j]) / inverse[j, j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    kept = order[24:].sort().values
    cut = order[:24].sort().values
    b = torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, cut]).T
    torch.testing.assert_close(w[:, kept], down.double()[:, kept] + down.double()[:, cut] @ b, rtol=1e-8, atol=1e-8)


def test_bias_repair_adds_what_the_cut_neurons_give_on_average(tensors):
    state = tensors("flux1")
    site = read_layout({key: value.shape for key, value in state.items()}).site("double-img-1")
    weights, mean = SiteWeights.read(state, site), torch.randn(512, dtype=torch.float64)
    repaired = bias(weights, KEPT, mean)
    gone = np.setdiff1d(np.arange(512), KEPT.numpy())
    expected = (
        state[f"{site.down}.bias"].double().numpy()
        + state[f"{site.down}.weight"].double().numpy()[:, gone] @ mean.numpy()[gone]
    )
    np.testing.assert_allclose(repaired.bias.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(repaired.down, none(weights, KEPT).down)


def test_held_out_errors_are_those_of_the_outputs(site_rows):
    weights, rows, z = site_rows
    a, centred = z.shape[1] - weights.down.shape[1], weights.bias is not None
    moments = gather(weights, [rows[:900]])
    found = choose(weights, KEPT, moments, gather(weights, [rows[900:1200], rows[1200:]]), ridges=[1e-2])
    repaired = affine(weights, KEPT, moments, 1e-2)

    seen = z[900:].numpy()
    down = weights.down.double().numpy()
    kept = np.concatenate((np.arange(a), a + KEPT.numpy()))
    b2 = 0.0 if weights.bias is None else weights.bias.double().numpy()
    attn = 0.0 if weights.attn is None else seen[:, :a] @ weights.attn.double().numpy().T
    mlp = seen[:, a:] @ down.T
    unit = ((mlp - mlp.mean(0)) ** 2).sum() if centred else (mlp**2).sum()
    dense = attn + mlp + b2

    def error(new_down, new_bias):
        return ((seen[:, kept] @ new_down.double().numpy().T + new_bias - dense) ** 2).sum() / unit

    flap = bias(weights, KEPT, moments.mean[a:])
    assert found.before == pytest.approx(error(none(weights, KEPT).down, b2), rel=1e-3)
    assert found.bias == pytest.approx(error(flap.down, b2 if flap.bias is None else flap.bias.double().numpy()), rel=1e-3)
    new_bias = b2 if repaired.bias is None else repaired.bias.double().numpy()
    assert found.method == "affine"
    assert found.after == pytest.approx(error(repaired.down, new_bias), rel=1e-3)


def test_a_sketch_keeps_squared_errors_within_its_bound():
    """Over many errors of full rank r, the mean is theirs and the deviation sqrt(2 / SKETCH / r) of it."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(1500, 40, generator=generator)
    site = Site("single-0", "single", 0, "up", "act", "down", 0, 0, 40, False, True)
    weights = SiteWeights(site, torch.empty(0), None, down, None, None)
    seen = sketched(weights).down
    assert seen.shape == (SKETCH, 40)
    errors = torch.randn(2000, 40, generator=generator)
    ratios = (errors @ seen.T).square().sum(1) / (errors @ down.T).square().sum(1)
    bound = (2 / SKETCH) ** 0.5  # each is one direction of the output
    assert abs(ratios.mean().item() - 1) < 3 * bound / 40**0.5
    assert ratios.std().item() < 1.1 * bound
    together = (errors @ seen.T).square().sum() / (errors @ down.T).square().sum()
    assert abs(together.item() - 1) < 3 * bound / 40**0.5
    assert sketched(replace(weights, down=down[:SKETCH])).down.equal(down[:SKETCH])


def test_the_bias_alone_is_repaired_where_neurons_do_not_predict_each_other(tensors):
    """Rows to fit on and rows to judge by that have nothing in common: every regression makes it worse."""
    state = tensors("flux1")
    site = read_layout({key: value.shape for key, value in state.items()}).site("double-img-0")
    weights = SiteWeights.read(state, site)
    fit, judge = made_rows(520, 128, False, seed=1), made_rows(520, 128, False, seed=2)
    judge = Rows(torch.randn(520, 128).bfloat16(), None, judge.sigma, judge.image, judge.step)
    report = choose(weights, KEPT, gather(weights, [fit]), gather(weights, [judge]), ridges=[1e-9])
    assert report.method == "bias"
    assert report.after == report.bias


def test_more_regressors_leave_less_error(site_rows):
    weights, rows, _ = site_rows
    moments = gather(weights, [rows])
    problems = [Regression.of(weights, torch.arange(kept), moments) for kept in (50, 150, 300)]
    errors = [problem.error(problem.solve(1e-4), moments) for problem in problems]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_of_8_bits_comes_back_within_its_precision(by_row, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, generator=generator) * torch.tensor([1, 3, 0.1, 1, 1, 20.0])[:, None]
    old = {"a.weight": torch.zeros(6, 10).to(dtype), "a.weight_scale": torch.ones(6, 1) if by_row else torch.tensor(1.0)}
    stored, scale = stored_like(weight, old, "a.weight")
    assert stored.dtype == dtype
    assert scale.shape == old["a.weight_scale"].shape
    back = full_precision({"a.weight": stored, "a.weight_scale": scale}, "a.weight")
    largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
    assert ((back - weight).abs() <= largest / 14).all()
    torch.testing.assert_close(back.abs().max(), weight.abs().max(), rtol=0.01, atol=0)
