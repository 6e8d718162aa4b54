"""What the header of a pruned file certifies: how far off its velocity is, predicted and on prompts that were held out.

    found = certificate(changed, report, "fp8")      # once everything is worked out
    certificate_text(found)
    facts(plan, report, found)                       # what a node says: predicted, and measured after the cut

The held-out error is made of the errors that repairs, truncated modulation and rounding leave on held-out images, each times
the amplification that was measured where it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..parsing import finite, from_json
from ..recording.amplification import MODULATION
from ..recording.recording import Recording
from .budget import velocity_error
from .curves import Ranking
from .modulation import modulation_errors
from .plan import PruningPlan
from .refit import RepairReport
from .rounded import Rounded
from .rounding_errors import velocity_errors
from .surgery import Changed

#: What held-out rows were of.
_MEASURED_ON = ("prompts", "rows", "scarcest")


def certificate(changed: Changed, report: Mapping[str, RepairReport], precision: str) -> dict[str, Any]:
    """As data, for a file's header.

    `precision`; `predicted` and `held_out` relative squared velocity error, and what of the latter `rounding` to 8 bits adds,
    None where that was not measured; `prompts` that rows were recorded of, and the `rows` of the `scarcest` MLP.
    """
    found: dict[str, Any] = {
        "precision": precision,
        "predicted": changed.plan.velocity_error,
        "held_out": None,
        "rounding": None,
    }
    recording = changed.recording
    if recording is None or "rows" not in recording.kinds:
        return found
    store = recording.states()
    scarcest = store.scarcest(changed.dense.layout.sites)
    found |= {"prompts": store.image_count("rows"), "rows": store.count(scarcest.name), "scarcest": scarcest.name}
    cut = _by_cuts(changed, report, recording)
    rounding: float | None = 0.0
    if isinstance(changed, Rounded) and precision == "fp8":
        errors = changed.errors()
        moved = velocity_errors(changed.dense, changed.plan, recording, errors, whole=False)
        rounding = moved.kept if moved is not None and len(errors) == len(changed.dense.layout.sites) else None
        found["rounding"] = rounding
    if cut is not None and rounding is not None:
        found["held_out"] = cut + rounding
    return found


def _by_cuts(changed: Changed, report: Mapping[str, RepairReport], recording: Recording) -> float | None:
    """Of what was cut and truncated; None where something of it was not measured on held-out images."""
    plan, amplification, total = changed.plan, recording.states().amplification, 0.0
    if plan.unknown:
        return None
    for name in plan.kept:
        site = report[name]
        if site.after is None or site.energy is None or name not in amplification:
            return None
        left = torch.tensor([site.after * site.energy], dtype=torch.float64)
        total += velocity_error(Ranking(torch.empty(0), left, site.energy), amplification, name).item()
    if any(f"{name}{MODULATION}" not in amplification for name in plan.ranks):
        return None
    truncated = modulation_errors(changed.dense, recording) if plan.ranks else {}
    for name, rank in plan.ranks.items():
        errors = truncated[name]
        total += amplification[f"{name}{MODULATION}"] * (errors[rank].item() if rank < len(errors) else 0.0)
    return total


def read_certificate(text: str) -> dict[str, Any]:
    """The certificate in a file's header, empty where it has none; raises `ValueError` where it is damaged."""
    told = from_json(text)
    if told == {}:
        return told
    if not isinstance(told, dict):
        raise ValueError("its certificate is no object")
    measured = told.get("held_out") is not None or not told.keys().isdisjoint(_MEASURED_ON)
    for name in ("precision", *(("scarcest",) if measured else ())):
        if not isinstance(told.get(name), str):
            raise ValueError(f"it says {told.get(name)!r:.100} of {name}, expected a text")
    for name in ("predicted", "held_out", "rounding"):
        if told.get(name) is not None:
            finite(told[name], name, -1.0)
    for name in ("prompts", "rows") if measured else ():
        finite(told.get(name), name)
    return told


def certificate_text(found: Mapping[str, Any]) -> str:
    """In one line."""
    said = [f"saved in precision {found.get('precision')}"]
    for name, words in (("predicted", "predicted"), ("held_out", "held-out"), ("rounding", "of it by rounding")):
        if found.get(name) is not None:
            said.append(f"{words} {found[name]:.3g}")
    text = f"{said[0]}; relative velocity error {', '.join(said[1:])}" if said[1:] else said[0]
    if found.get("prompts"):
        text += f", from {found['prompts']:,} prompts and {found['rows']:,} rows of {found['scarcest']}"
    return text


def facts(plan: PruningPlan, report: Mapping[str, RepairReport], found: Mapping[str, Any]) -> list[str]:
    """What a plan says of itself, with the error that was measured after the cut under the one that was predicted."""
    said = plan.facts()
    if found.get("held_out") is not None:
        images = f"the fifth of {found['prompts']:,} images that repair did not see"
        said.append(f"measured relative velocity error {found['held_out']:.3g}, after the cut, by the rows of {images}")
    elif plan.velocity_error is not None and any(site.after is None for site in report.values()):
        said.append("The prediction is for affine repair: without it, the error is larger")
    return said
