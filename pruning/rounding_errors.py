"""What rounding to 8 bits does to the velocity, predicted before anything is cut.

    found = rounding_errors(dense, plan, recording, device, progress)
    found.kept, found.plain                          # relative and squared: as it is done, and without compensation

An error at the output of an MLP, times the amplification that was measured there (recording/amplification.py), is one of the
velocity; of a modulation layer alike. Errors of MLPs are measured on held-out rows (`rounding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ..flux.layout import Site
from ..flux.weights import full_precision
from ..progress import Progress, part, silent
from ..recording.amplification import MODULATION
from ..recording.recording import Recording
from .cache import cache_key, read_cached, recorded_rows, write_cached
from .dense import Dense
from .modulation import LowRanks, has_texts, recorded_vectors
from .plan import PruningPlan
from .precision import rounded_layers, rounds_to_fp8
from .rounded import FORMAT, rounded_plainly
from .rounding import RoundingErrors, round_site


@dataclass(frozen=True)
class VelocityErrors:
    """What rounding does to the velocity, relative and squared: as it is done, and plain."""

    kept: float
    plain: float


def velocity_errors(
    dense: Dense, plan: PruningPlan, recording: Recording, errors: Mapping[str, RoundingErrors], whole: bool
) -> VelocityErrors | None:
    """What rounding to 8 bits does to the velocity; None where amplifications were not measured.

    MLPs and the attention beside them count by `errors` of their sites, modulation layers by what they read. Errors of `whole`
    sites count by the share of their neurons that `plan` keeps.
    """
    amplification = recording.states().amplification
    eight = set(rounded_layers(dense, "fp8"))
    kept = bare = 0.0
    for name, site_errors in errors.items():
        if name not in amplification:
            return None
        width = plan.widths[name]
        share = (width - plan.cut.get(name, 0)) / width if whole else 1.0
        mine = (site_errors.up + site_errors.down) * share + site_errors.attention
        kept += amplification[name] * mine
        bare += amplification[name] * ((site_errors.plain_up + site_errors.plain_down) * share + site_errors.plain_attention)
    if dense.layout.modulated and has_texts(recording):
        vectors, low_ranks = recorded_vectors(dense, recording), LowRanks(dense, plan, recording)
        for site in dense.layout.modulated:
            if f"{site.modulation}.weight" not in eight:
                continue
            if f"{site.name}{MODULATION}" not in amplification:
                return None
            lost = _lost_weight(dense, site, low_ranks)
            if lost is None:
                continue
            moved = amplification[f"{site.name}{MODULATION}"]
            varying = (lost.double() @ vectors.spread).square().sum().item()
            kept += moved * varying
            bare += moved * (varying + (lost.double() @ vectors.mean).square().sum().item())
    return VelocityErrors(kept, bare)


def _lost_weight(dense: Dense, site: Site, low_ranks: LowRanks) -> Tensor | None:
    """What rounding takes off a modulation layer [out, hidden]; None where it stays in 16 bits."""
    if site.name not in low_ranks.ranks:
        whole = full_precision(dense.tensors, f"{site.modulation}.weight")
        return whole - rounded_plainly(whole).numbers
    layer = low_ranks[site.name]
    if not rounds_to_fp8(dense.layout, f"{site.modulation}.down.weight", layer.down.shape):
        return None
    return layer.up @ layer.down - rounded_plainly(layer.up).numbers @ rounded_plainly(layer.down).numbers


def rounding_errors(
    dense: Dense,
    plan: PruningPlan,
    recording: Recording,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> VelocityErrors | None:
    """What rounding the model that `plan` leaves to 8 bits does to the velocity; None where rows or amplifications are missing.

    It is predicted from rounding the dense model, which is done once and kept in the recording's cache.
    """
    eight, store = set(rounded_layers(dense, "fp8")), recording.states()
    sites = [site for site in dense.layout.sites if {f"{site.up}.weight", f"{site.down}.weight"} <= eight]
    if any(store.count(site.name) < site.regressors for site in sites):
        return None
    key, found = cache_key(FORMAT, recorded_rows(recording), dense.fingerprint.digest), {}
    for done, site in enumerate(sites):
        progress(f"rounding {site.name}", done, len(sites))
        path = recording.cache / "rankings" / f"rounding.{site.name}.{key}.safetensors"
        known = read_cached(path, FORMAT, {"errors": (6,)})
        if known is None:
            errors = round_site(dense.tensors, site, store, device, part(progress, done, len(sites))).errors
            known = {"errors": torch.tensor(astuple(errors), dtype=torch.float64)}
            for other in path.parent.glob(f"rounding.{site.name}.*.safetensors"):
                other.unlink(missing_ok=True)
            write_cached(path, FORMAT, known)
            dense.release()
        found[site.name] = RoundingErrors(*known["errors"].tolist())
    progress("rounded", 1, 1)
    return velocity_errors(dense, plan, recording, found, whole=True)
