"""Which neurons of an MLP matter least: four scores, and the order of cutting that each gives.

    rankings = rank("obs", dense, recording)         # {"double-img-0": Ranking(order, error), ...}

| score | neuron j | from | goes with repair |
|---|---|---|---|
| frequency | how often it fires | internals | none; as the original flux-poke |
| magnitude | E[h^2] |w|^2: the error of leaving it out, were it alone (1) | internals | none |
| fluctuation | Var(h) |w|^2: what is left of that when the bias makes up for the mean (2) | internals | bias |
| obs | |w|^2 / [H^-1]_jj, greedy | rows | affine |

(1) Wanda, Sun et al. 2023, arXiv 2306.11695; (2) FLAP, An et al. 2023, arXiv 2312.11983. Lower scores are cut first; of equal
ones, the lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.layout import Site
from ..flux.weights import SiteWeights
from ..progress import Progress, part, silent
from ..recording.internals import Internals
from ..recording.recording import Recording
from ..recording.split import held_out
from ..recording.statistics import SiteInternals
from ..recording.store import HiddenStates
from .cache import Shapes, cache_key, cached_header, read_cached, recorded_rows, write_cached
from .curves import Ranking, measure_affine, ridge_for
from .dense import Dense
from .moments import Moments, gather_recorded
from .obs import eliminate
from .symmetric import add_product, exact_products, quadratic

#: Its number changes with what goes into a ranking from rows.
RANKING_FORMAT = "flux-poke ranking 5"
#: The scores, and the repair that goes with each.
REPAIR_OF = {"frequency": "none", "magnitude": "none", "fluctuation": "bias", "obs": "affine"}
SCORES = tuple(REPAIR_OF)


@exact_products()
def obs(moments: Moments, down: Tensor, progress: Progress = silent) -> Ranking:
    """Greedy Optimal Brain Surgeon: the error that is left when all kept regressors make up for the neuron (`obs.py`).

    Attention channels are never cut; they are projected out first. Ridges are in units of the mean variance.
    """
    ridge = ridge_for(down.shape[1], moments.rows)
    try:
        order, error = eliminate(_hessian(moments, ridge).float(), down, progress)
    except torch.linalg.LinAlgError:  # too nearly singular for float32
        order, error = eliminate(_hessian(moments, ridge), down, progress)
    total = quadratic(down.float(), moments.second[moments.attn :, moments.attn :])
    return Ranking(order.cpu(), error.cpu(), max(total, torch.finfo(torch.float32).tiny))


def _hessian(moments: Moments, ridge: float) -> Tensor:
    """Second moment of the neurons plus a ridge, without what attention channels tell of it [width, width]; float64."""
    a = moments.attn
    hessian = moments.second[a:, a:].clone()
    hessian.diagonal().add_(ridge * _mean_variance(hessian))
    if a:
        attention = moments.second[:a, :a].clone()
        attention.diagonal().add_(ridge * _mean_variance(attention))
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(attention), moments.second[:a, a:], upper=False).float()
        add_product(hessian, half, half, alpha=-1.0)
    return hessian


def _mean_variance(second: Tensor) -> float:
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

    By obs, errors are those of held-out rows; by the others, what the score makes of them: a sum over neurons as if each were
    alone, which is several times too little. A ranking by obs is worked out on `device` and kept in the recording's cache,
    since it takes long; the others take no work.

    Raises `UserError` where the internals or rows that this takes are missing, too few, or of another model.
    """
    sites = dense.layout.sites if sites is None else sites
    if score == "obs":
        rows = require_rows(recording.states(), dense, sites, "the score obs")
    else:
        internals = require_internals(recording.internals(), dense, sites, f"the score {score}")
        if score != "frequency":
            internals.require_sums(f"the score {score}")
    rankings: dict[str, Ranking] = {}
    for done, site in enumerate(sites):
        progress(f"ranking {site.name}", done, len(sites))
        if score == "obs":
            rankings[site.name] = _by_rows(dense, site, recording, rows, device, part(progress, done, len(sites)))
        else:
            rankings[site.name] = _by_internals(score, dense, site, internals.sites[site.name])
    progress("ranked", len(sites), len(sites))
    return rankings


def _by_rows(
    dense: Dense, site: Site, recording: Recording, rows: HiddenStates, device: torch.device | str, progress: Progress
) -> Ranking:
    """The ranking by obs, from the cache or worked out; those of earlier rows are removed there."""
    path = _ranking_file(dense, site, recording)
    known = read_cached(path, RANKING_FORMAT, _ranking_shapes(site))
    if known is not None and torch.equal(known["order"].sort().values, torch.arange(site.width)):
        return Ranking(known["order"], known["error"], known["energy"].item())
    weights = SiteWeights.read(dense.tensors, site, device)
    fit, others = held_out(rows.images(site.name))
    moments = gather_recorded(weights, rows, fit, part(progress, 0, 4))
    ranking = obs(moments, weights.down, progress=part(progress, 1, 4, 2))
    kept_back = gather_recorded(weights, rows, others, part(progress, 3, 4))
    ranking = measure_affine(ranking, weights, moments, kept_back, ridge_for(site.width, moments.rows))
    assert ranking.error is not None
    for other in path.parent.glob(f"obs.{site.name}.*.safetensors"):
        other.unlink(missing_ok=True)
    energy = torch.tensor(ranking.energy, dtype=torch.float64)
    write_cached(path, RANKING_FORMAT, {"order": ranking.order, "error": ranking.error, "energy": energy})
    return ranking


def lacks_ranking(dense: Dense, site: Site, recording: Recording) -> bool:
    """Whether the ranking of a site by obs is still to be worked out."""
    return cached_header(_ranking_file(dense, site, recording), RANKING_FORMAT, _ranking_shapes(site)) is None


def _ranking_file(dense: Dense, site: Site, recording: Recording) -> Path:
    key = cache_key(RANKING_FORMAT, recorded_rows(recording), dense.fingerprint.digest)
    return recording.cache / "rankings" / f"obs.{site.name}.{key}.safetensors"


def _ranking_shapes(site: Site) -> Shapes:
    return {"order": (site.width,), "error": (site.width + 1,), "energy": ()}


def _by_internals(score: str, dense: Dense, site: Site, recorded: SiteInternals) -> Ranking:
    if score == "frequency":
        return Ranking(recorded.rate.argsort(stable=True))
    per_neuron = {"magnitude": recorded.sum_sq / recorded.tokens, "fluctuation": recorded.variance}[score]
    columns = SiteWeights.read(dense.tensors, site, up=False).down.double().square().sum(0)
    ordered, order = (per_neuron * columns).sort(stable=True)
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
