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

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

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
from .curves import Ranking, measure_affine, measure_cut, ridge_for
from .dense import Dense
from .moments import Moments, gather
from .obs import eliminate
from .symmetric import add_product, inner

#: Its number changes with what goes into a ranking from rows.
RANKING_FORMAT = "flux-poke ranking 4"
#: The scores, and the repair that goes with each.
REPAIR_OF = {"frequency": "none", "magnitude": "none", "fluctuation": "bias", "obs": "affine"}
SCORES = tuple(REPAIR_OF)


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
    measured: bool = False,
) -> dict[str, Ranking]:
    """Rankings of `sites` (default: all) by `score`, one site in memory at a time.

    With `measured`, errors are those of held-out rows with the score's own repair, not what the score makes of them: a sum over
    neurons as if each were alone, from internals, which is several times too little. By obs they always are. What is worked out
    from rows is kept in the recording's cache, since it takes long; `device` is where that is done, the rest takes no work.

    Raises `UserError` where the internals or rows that this takes are missing, too few, or of another model.
    """
    sites = dense.layout.sites if sites is None else tuple(sites)
    if score not in SCORES:
        raise UserError(f"There is no score {score!r}; there are {', '.join(SCORES)}.")
    rows = internals = None
    if score == "obs" or measured:
        what = "the score obs" if score == "obs" else f"a budget by {score}"
        rows = require_rows(recording.states(), dense, sites, what)
    if score != "obs":
        internals = require_internals(recording.internals(), dense, sites, f"the score {score}")
        if score != "frequency":
            internals.require_sums(f"the score {score}")
    rankings: dict[str, Ranking] = {}
    for done, site in enumerate(sites):
        progress(f"ranking {site.name}", done, len(sites))
        recorded = None if internals is None else internals.sites[site.name]
        by_itself = None if recorded is None else _by_internals(score, dense, site, recorded)
        if rows is not None:
            within, mean = part(progress, done, len(sites)), None if recorded is None else recorded.mean
            by_itself = _by_rows(score, dense, site, recording, rows, by_itself, mean, device, within)
        assert by_itself is not None
        rankings[site.name] = by_itself
    progress("ranked", len(sites), len(sites))
    return rankings


def ranked_before(dense: Dense, recording: Recording, sites: Sequence[Site]) -> bool:
    """Whether the rankings by obs of all these sites are there already."""
    return all(_cached_ranking(_ranking_file("obs", dense, recording, site, None), site) is not None for site in sites)


def _ranking_file(score: str, dense: Dense, recording: Recording, site: Site, order: Tensor | None) -> Path:
    made_from = "" if order is None else str(order.tolist())
    key = cache_key(RANKING_FORMAT, recorded_rows(recording), dense.fingerprint.digest, made_from)
    return recording.cache / "rankings" / f"{score}.{site.name}.{key}.safetensors"


def _cached_ranking(path: Path, site: Site) -> Ranking | None:
    """A ranking that is there and sound."""
    shapes = {"order": (site.width,), "error": (site.width + 1,), "shift": (site.width + 1,), "energy": ()}
    found = read_cached(path, RANKING_FORMAT, shapes)
    if found is None or not torch.equal(found["order"].sort().values, torch.arange(site.width)):
        return None
    return Ranking(found["order"], found["error"], found["energy"].item(), found["shift"])


def _by_rows(
    score: str,
    dense: Dense,
    site: Site,
    recording: Recording,
    rows: HiddenStates,
    ranking: Ranking | None,
    mean: Tensor | None,
    device: torch.device | str,
    progress: Progress,
) -> Ranking:
    """The ranking with errors measured on held-out rows, from the cache or worked out; those of earlier rows are removed there.

    By obs, rows also make the order; by other scores that of `ranking` stands, and their `mean` is what repairs the bias.
    """
    path = _ranking_file(score, dense, recording, site, None if ranking is None else ranking.order)
    if (known := _cached_ranking(path, site)) is not None:
        return known
    weights = SiteWeights.read(dense.tensors, site, device)
    importance, count = partial(rows.importance, site.name), rows.count(site.name)
    if ranking is None:
        fit, others = held_out(rows.images(site.name))
        moments = gather(weights, rows.rows(site.name, fit), importance, part(progress, 0, 4), count)
        ranking = obs(moments, weights.down, progress=part(progress, 1, 4, 2))
        kept_back = gather(weights, rows.rows(site.name, others), importance, part(progress, 3, 4), count)
        ranking = measure_affine(ranking, weights, moments, kept_back, ridge_for(site.width, moments.rows))
    else:  # only a mean was fitted: all rows tell
        moments = gather(weights, rows.rows(site.name), importance, progress, count)
        ranking = measure_cut(ranking, weights, moments, mean if REPAIR_OF[score] == "bias" else None)
    assert ranking.error is not None
    for other in path.parent.glob(f"{score}.{site.name}.*.safetensors"):
        other.unlink(missing_ok=True)
    shift = torch.zeros_like(ranking.error) if ranking.shift is None else ranking.shift
    energy = torch.tensor(ranking.energy, dtype=torch.float64)
    write_cached(path, RANKING_FORMAT, {"order": ranking.order, "error": ranking.error, "shift": shift, "energy": energy})
    return replace(ranking, shift=shift)


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
