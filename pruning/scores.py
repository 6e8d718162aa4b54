"""Which neurons of an MLP matter least: four scores, and the order of cutting that each gives.

    rankings = rank("obs", dense, recording)         # {"double-img-0": Ranking(order, error), ...}

| score | neuron j | from | goes with repair |
|---|---|---|---|
| frequency | how often it fires | internals | none; as the original flux-poke |
| magnitude | E[h^2] |w|^2 | internals | none |
| fluctuation | Var(h) |w|^2 | internals | bias |
| obs | |w|^2 / [H^-1]_jj, greedy | rows | affine |

Lower scores are cut first; of equal ones, the lower index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Site
from ..flux.weights import SiteWeights, down_energy
from ..progress import Progress, part, silent
from ..recording.internals import Internals
from ..recording.recording import Recording
from ..recording.split import held_out
from ..recording.statistics import SiteInternals
from ..recording.store import HiddenStates
from .cache import cache_key, read_cached, recorded_rows, write_cached
from .dense import Dense
from .moments import Moments, gather
from .obs import eliminate
from .refit import Problem, output_energy, sketched
from .symmetric import add_product, inner

#: Its number changes with what goes into a ranking by obs.
RANKING_FORMAT = "flux-poke ranking 3"
#: The scores, and the repair that goes with each.
REPAIR_OF = {"frequency": "none", "magnitude": "none", "fluctuation": "bias", "obs": "affine"}
SCORES = tuple(REPAIR_OF)

#: Shares of a site's neurons at which the errors of cutting are measured on held-out images.
GRID = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Ranking:
    """The order in which a site's neurons are cut, and what that costs.

    Attributes:
        order: int64 [width], first to go first.
        error: predicted squared error per token at the MLP's output after cutting the first k, float64 [width + 1];
            None where the score predicts none (frequency).
        energy: of that output per token, about its mean where the MLP has a bias: the unit of relative errors.
    """

    order: Tensor
    error: Tensor | None = None
    energy: float = 1.0

    def relative_error(self, cut: int) -> float | None:
        """Predicted error after cutting the first `cut`, relative to the output's energy."""
        return None if self.error is None else self.error[cut].item() / self.energy


def frequency(site: SiteInternals) -> Tensor:
    """How often each neuron fires, per token (the original flux-poke's score)."""
    return site.rate


def magnitude(site: SiteInternals, energy: Tensor) -> Tensor:
    """E[h^2] |w|^2: the error of leaving the neuron out, were it alone (Wanda, Sun et al. 2023, arXiv 2306.11695)."""
    return site.sum_sq / max(site.tokens, 1) * energy


def fluctuation(site: SiteInternals, energy: Tensor) -> Tensor:
    """Var(h) |w|^2: what is left of it when the bias makes up for the mean (FLAP, An et al. 2023, arXiv 2312.11983)."""
    return site.variance * energy


def obs(moments: Moments, down: Tensor, ridge: float | None = None, progress: Progress = silent) -> Ranking:
    """Greedy Optimal Brain Surgeon: the error that is left when all kept regressors make up for the neuron (`obs.py`).

    Attention channels are never cut; they are projected out first. `ridge` is in units of the mean variance; by default
    `ridge_for` these rows.
    """
    a, width = moments.attn, down.shape[1]
    ridge = ridge_for(width, moments.rows) if ridge is None else ridge
    wide = down.double()
    gram = wide.new_zeros(width, width)
    add_product(gram, wide, wide)
    energy = inner(gram, moments.second[a:, a:])
    hessian = moments.second[a:, a:].clone()
    hessian.diagonal().add_(ridge * mean_variance(hessian))
    if a:
        attention = moments.second[:a, :a].clone()
        attention.diagonal().add_(ridge * mean_variance(attention))
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(attention), moments.second[:a, a:], upper=False)
        add_product(hessian, half, half, alpha=-1.0)
    order, error = eliminate(hessian, gram, progress)
    return Ranking(order.cpu(), error.cpu(), max(energy, torch.finfo(torch.float32).tiny))


def measured(
    ranking: Ranking, weights: SiteWeights, moments: Moments, held_out: Moments, grid: Sequence[float] = GRID
) -> Ranking:
    """The same order, with the errors that affine repair leaves on other images (`held_out`) than the order was made from.

    They are measured at a few widths, and the ranking's own errors are scaled to meet them; those are what the regression
    leaves on the rows it saw, too little where rows are few or alike (as text tokens are).
    """
    assert ranking.error is not None
    width = len(ranking.order)
    weights, ridge = sketched(weights), ridge_for(width, moments.rows)
    unit = ranking.energy / output_energy(weights.down, held_out)
    cuts = sorted({cut for share in grid if 0 < (cut := round(share * width)) < width})
    if not cuts:
        return ranking
    factors = []
    for cut in cuts:
        problem = Problem.of(weights, ranking.order[cut:].sort().values, moments)
        found = min(problem.error(None, held_out), problem.error(problem.solve(ridge), held_out)) * unit
        factors.append(found / max(ranking.error[cut].item(), 1e-30))
    scale = np.interp(np.arange(width + 1), [0, *cuts, width], [factors[0], *factors, 1.0])
    return replace(ranking, error=(ranking.error * torch.from_numpy(scale)).cummax(0).values)


def ridge_for(width: int, rows: float) -> float:
    """What serves a regression without being chosen by held-out images: less, the more rows there are for each neuron."""
    return min(0.1, 0.1 * width / rows)


def mean_variance(second: Tensor) -> float:
    """Mean of the diagonal, above zero: the unit of ridges."""
    return max(second.diagonal().mean().item(), torch.finfo(torch.float32).tiny)


def rank(
    score: str,
    dense: Dense,
    recording: Recording,
    sites: Sequence[Site] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> dict[str, Ranking]:
    """Rankings of `sites` (default: all) by `score`, one site in memory at a time.

    Those by obs are kept in the recording's cache, since they take long and every budget starts from them; `device` is where
    obs computes, the others take no work. Raises `UserError` where the internals or rows that the score needs are missing, too
    few, or of another model.
    """
    sites = dense.layout.sites if sites is None else tuple(sites)
    if score not in SCORES:
        raise UserError(f"There is no score {score!r}; there are {', '.join(SCORES)}.")
    internals, rows = None, None
    if score == "obs":
        rows = require_rows(recording.states(), dense, sites, "the score obs")
    else:
        internals = require_internals(recording.internals(), dense, sites, f"the score {score}")
        if score != "frequency":
            internals.require_sums(f"the score {score}")
    rankings: dict[str, Ranking] = {}
    for done, site in enumerate(sites):
        progress(f"ranking {site.name}", done, len(sites))
        if internals is not None:
            rankings[site.name] = _by_internals(score, dense, site, internals.sites[site.name])
        elif rows is not None:
            rankings[site.name] = _by_rows(dense, site, recording, rows, device, part(progress, done, len(sites)))
    progress("ranked", len(sites), len(sites))
    return rankings


def ranked_before(dense: Dense, recording: Recording, sites: Sequence[Site]) -> bool:
    """Whether the rankings by obs of all these sites are there already."""
    return all(_cached_ranking(_ranking_file(dense, recording, site), site) is not None for site in sites)


def _ranking_file(dense: Dense, recording: Recording, site: Site) -> Path:
    key = cache_key(RANKING_FORMAT, recorded_rows(recording), dense.fingerprint.digest)
    return recording.cache / "rankings" / f"{site.name}.{key}.safetensors"


def _cached_ranking(path: Path, site: Site) -> Ranking | None:
    """A ranking that is there and sound."""
    found = read_cached(path, RANKING_FORMAT, {"order": (site.width,), "error": (site.width + 1,), "energy": ()})
    if found is None or not torch.equal(found["order"].sort().values, torch.arange(site.width)):
        return None
    return Ranking(found["order"], found["error"], found["energy"].item())


def _by_rows(
    dense: Dense, site: Site, recording: Recording, rows: HiddenStates, device: torch.device | str, progress: Progress
) -> Ranking:
    """The ranking by obs, from the cache or worked out; those of earlier rows are removed from the cache."""
    path = _ranking_file(dense, recording, site)
    if (known := _cached_ranking(path, site)) is not None:
        return known
    weights = SiteWeights.read(dense.tensors, site, device)
    fit, others = held_out(rows.images(site.name))
    importance, count = partial(rows.importance, site.name), rows.count(site.name)
    moments = gather(weights, rows.rows(site.name, fit), importance, part(progress, 0, 4), count)
    ranking = obs(moments, weights.down, progress=part(progress, 1, 4, 2))
    kept_back = gather(weights, rows.rows(site.name, others), importance, part(progress, 3, 4), count)
    ranking = measured(ranking, weights, moments, kept_back)
    assert ranking.error is not None
    for other in path.parent.glob(f"{site.name}.*.safetensors"):
        other.unlink(missing_ok=True)
    energy = torch.tensor(ranking.energy, dtype=torch.float64)
    write_cached(path, RANKING_FORMAT, {"order": ranking.order, "error": ranking.error, "energy": energy})
    return ranking


def _by_internals(score: str, dense: Dense, site: Site, recorded: SiteInternals) -> Ranking:
    if score == "frequency":
        return Ranking(frequency(recorded).argsort(stable=True))
    energy = down_energy(SiteWeights.read(dense.tensors, site, up=False))
    scores = magnitude(recorded, energy) if score == "magnitude" else fluctuation(recorded, energy)
    ordered, order = scores.sort(stable=True)
    error = torch.cat((torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)))
    return Ranking(order, error, max(error[-1].item(), torch.finfo(torch.float32).tiny))


def require_internals(internals: Internals, dense: Dense, sites: Sequence[Site], what: str) -> Internals:
    """`internals`, or `UserError` where they do not cover `sites` of `dense`; `what` needs them."""
    internals.require(dense.fingerprint, {site.name: site.width for site in dense.layout.sites}, dense.source)
    for site in sites:
        if site.name not in internals.sites or internals.sites[site.name].tokens == 0:
            raise UserError(
                f"The internals hold nothing of {site.name}, and {what} needs all MLPs that may be cut: record again."
            )
    return internals


def require_rows(rows: HiddenStates, dense: Dense, sites: Sequence[Site], what: str) -> HiddenStates:
    """`rows`, or `UserError` where they do not cover `sites` of `dense` with enough rows; `what` needs them.

    Each row counts for one here, whatever its importance: fewer are in effect a matter of the ridge, not of an error.
    """
    rows.require(dense.fingerprint, dense.source)
    if sites:
        site = rows.scarcest(sites)
        count, least = rows.count(site.name), site.regressors
        if count < least:
            raise UserError(
                f"{rows.folder} holds {count:,} rows of {site.name}, too few for {what}: at least {least:,} are needed, "
                f"one for each value it reads ({5 * least:,} do best). Record more images, steps per image or rows per step."
            )
    return rows


def predicted_errors(rankings: Mapping[str, Ranking], kept: Mapping[str, Tensor]) -> dict[str, float]:
    """By site, the predicted error relative to its output's energy; only where the score predicts one."""
    found = {name: rankings[name].relative_error(len(rankings[name].order) - len(indices)) for name, indices in kept.items()}
    return {name: error for name, error in found.items() if error is not None}
