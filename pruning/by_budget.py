"""What a plan by budget is asked for, and how it is answered: one budget for the whole model.

request = ByBudget(size=10)                      # a file of 10 GB
request.check(dense)                             # a sentence where it makes no sense, before neurons are ranked
request.plan(dense, recording, "cuda", progress)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..files import size_text
from ..flux.layout import Layout
from ..flux.vectors import VECTOR
from ..progress import Progress, part
from ..prompts import ENOUGH
from ..recording.amplification import MODULATION
from ..recording.recording import Recording
from ..recording.store import HiddenStates
from .budget import Amounts, BudgetCurve, neuron_parameters, neuron_steps, protected_sites, rank_steps, velocity_error
from .checkpoint import overhead
from .curves import Ranking
from .dense import Dense
from .modulation import modulation_errors, require_modulated
from .plan import PruningPlan, from_rankings
from .precision import ALIGNED, dense_bytes, number_bytes, rank_multiple, require_precision, thin_bytes
from .requests import Planned
from .rounding_errors import rounding_errors
from .scores import rank
from .surgery import shape_of

#: Below so many recorded images, errors on other prompts were up to 35 times those predicted (benchmarks/README.md).
FEW = 24
#: Where less than a share of the rows lie on one side of a middle noise level, drawings whose steps lie evenly had errors
#: 1.5 to 100 times those predicted; where more did, less than 2 times (benchmarks/README.md).
MIDDLE, SCARCE = 0.5, 0.4
#: Widths are rounded to multiples of this at most.
MOST_MULTIPLE = 65_536

#: What the amount of a budget can be, by field of `ByBudget`, in words.
AMOUNTS = {
    "size": "size of the file in GB",
    "saved": "GB to save",
    "share": "share of all parameters",
    "neurons": "share of the neurons",
}


@dataclass(frozen=True)
class ByBudget:
    """Cuts what costs the output least, until one of these is reached: `size`, GB of the file (10^9 bytes); `saved`, GB less
    than the dense model; `share` of all parameters cut; or `neurons`, the share of MLP neurons cut, and nothing else touched.

    Neurons are ranked by obs alone: by other scores, budgets draw worse pictures than the same share by count. Widths are
    multiples of `multiple` (None = 64, in a small model 8), ranks of an eighth of it; MLPs named in `protect` ("double-18,
    single-0") stay whole, and so do the modulation layers of their streams.

    Attributes:
        touch: what may be cut: MLP neurons, the rank of modulation layers, or both. Where a model has none to truncate
            (FLUX.2), both are neurons alone.
        precision: of the file that will be saved, which gigabytes are counted in (`precision.py`).
    """

    size: float | None = None
    saved: float | None = None
    share: float | None = None
    neurons: float | None = None
    touch: Literal["both", "neurons", "modulation"] = "both"
    precision: str = "stored"
    multiple: int | None = None
    protect: str = ""

    def check_options(self) -> None:
        """Raises `UserError` where the budget is not one, of whatever model."""
        given = {name: value for name in AMOUNTS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UserError(
                "A budget is either the size of the file in GB, GB to save, a share of all parameters, or a share of the "
                f"neurons: give one of the four; found {' and '.join(given) or 'none'}."
            )
        ((name, value),) = given.items()
        if name in ("share", "neurons") and not 0 < value < 1:
            raise UserError(f"The share to cut lies between 0 and 1, both excluded; found {value:g}.")
        if not 0 < value < math.inf:
            raise UserError(f"The gigabytes of a budget are a number above 0; found {value:g}.")
        if self.multiple is not None and not 1 <= self.multiple <= MOST_MULTIPLE:
            most = f"at most {MOST_MULTIPLE:,}"
            raise UserError(f"Widths are rounded to a multiple of at least 1 neuron, and {most}; found {self.multiple}.")
        if self.touch not in ("both", "neurons", "modulation"):
            raise UserError(f"A budget may touch both, neurons or modulation; found {self.touch!r}.")
        require_precision(self.precision)

    def check(self, dense: Dense) -> None:
        """Raises `UserError` where the budget is not one, or more than may be cut, whatever that is worth."""
        self.check_options()
        if self.touch == "modulation":
            require_modulated(dense)
        nothing = {site.name: torch.zeros(site.width + 1) for site in dense.layout.sites}
        curve = self._curve(dense, nothing, dict.fromkeys(nothing, torch.zeros(1)), True)
        self._taken(dense, curve)
        if self.size is not None:
            every = len(curve.steps)
            kept = {name: torch.arange(dense.layout.site(name).width - cut) for name, cut in curve.cuts(every).items()}
            smallest = replace(PruningPlan.keeping_all(dense), kept=kept, ranks=curve.ranks(every))
            self._taken(dense, curve, overhead(dense, smallest, self.precision))

    def plan(self, dense: Dense, recording: Recording, device: torch.device | str, progress: Progress) -> Planned:
        layout, amplification = dense.layout, recording.states().amplification
        touches_neurons, touches_ranks = self._touches(layout)
        needed = [site.name for site in layout.sites] * touches_neurons
        needed += [f"{site.name}{MODULATION}" for site in layout.modulated] * touches_ranks
        unmeasured = [name for name in needed if name not in amplification]
        if unmeasured and touches_ranks:
            raise UserError(
                f"What an error in {unmeasured[0]} does to the picture was not measured, and a budget weighs neurons and ranks "
                "by that: record again with probe steps (Record or `uv run flux-poke record`), or cut neurons alone."
            )
        parts = 5 if self.precision == "fp8" else 4
        ranks_errors = modulation_errors(dense, recording, device, part(progress, 0, parts)) if touches_ranks else {}
        rankings = rank("obs", dense, recording, None, device, part(progress, 1, parts, 3)) if touches_neurons else {}
        amplified = not unmeasured
        errors = {name: velocity_error(ranking, amplification if amplified else {}, name) for name, ranking in rankings.items()}
        truncated = {name: error * amplification[f"{name}{MODULATION}"] for name, error in ranks_errors.items()}
        curve = self._curve(dense, errors, truncated, amplified)
        planned = self._planned(dense, rankings, curve, 0)
        if self.size is not None:  # once more, with what such a file holds beside the model
            planned = self._planned(dense, rankings, curve, overhead(dense, planned.plan, self.precision))
        relative = {f"{name}{MODULATION}": _relative(ranks_errors[name], rank) for name, rank in planned.plan.ranks.items()}
        plan = replace(planned.plan, predicted={**planned.plan.predicted, **relative})
        notes = []
        if self.precision == "fp8" and plan.velocity_error is not None:
            rounding = rounding_errors(dense, plan, recording, device, part(progress, 4, parts))
            if rounding is None:
                notes.append("What rounding to fp8 does to the picture is not in the predicted error: record more rows.")
            else:
                plan = replace(plan, velocity_error=plan.velocity_error + rounding.kept)
                notes.append(
                    f"Of the predicted error, {rounding.kept:.3g} is rounding to fp8; plain, it would be {rounding.plain:.3g}."
                )
        if self.touch == "both" and not layout.modulated:
            notes.append(
                "No block of this model has modulation layers of its own, so nothing is to gain there: neurons alone are cut."
            )
        if unmeasured:
            notes.append(
                "An error counts alike wherever it is made, since what it does to the picture was measured of "
                f"{len(needed) - len(unmeasured)} of {len(needed)} MLPs (not of {unmeasured[0]}, for one): record again with "
                "probe steps (Record, or `uv run flux-poke record`) for a better plan with a predicted error."
            )
        notes += _narrow(recording.states(), layout.sites[0].name if touches_neurons else VECTOR)
        return replace(planned, plan=plan, notes=tuple(notes))

    def _planned(self, dense: Dense, rankings: Mapping[str, Ranking], curve: BudgetCurve, extra: int) -> Planned:
        """What the curve gives for a file that holds `extra` bytes beside the model."""
        taken = self._taken(dense, curve, extra)
        saved, size = curve.saved(taken), dense_bytes(dense, self.precision)
        weighed = "times amplification" if curve.amplified else "counted alike everywhere"
        plan = from_rankings(dense, rankings, curve.cuts(taken), "obs", f"by budget, {self.asked}, score obs, errors {weighed}")
        plan = replace(plan, ranks=curve.ranks(taken), velocity_error=curve.error(taken) if curve.amplified else None)
        file = size - sum(saved.values()) + overhead(dense, plan, self.precision)
        sizes = {"dense": size, "file": file, "neurons": saved["neurons"], "ranks": saved["ranks"]}
        return Planned(replace(plan, sizes=sizes), (), curve, taken, self._amounts(dense, curve, file + sum(saved.values())))

    def _amounts(self, dense: Dense, curve: BudgetCurve, whole: int) -> Amounts:
        """What to ask for to save so many bytes, neurons and parameters of this curve, by the words for a kind of budget; a
        file from which nothing is cut takes `whole` bytes."""
        parameters = sum(math.prod(shape_of(dense.tensors, key)) for key in dense.tensors)
        found: Amounts = {
            AMOUNTS["size"]: lambda memory, neurons, cut: (whole - memory) / 1e9,
            AMOUNTS["saved"]: lambda memory, neurons, cut: memory / 1e9,
            AMOUNTS["share"]: lambda memory, neurons, cut: cut / parameters,
            AMOUNTS["neurons"]: lambda memory, neurons, cut: neurons / dense.layout.neurons,
        }
        if any(step.kind == "ranks" for step in curve.steps):
            del found[AMOUNTS["neurons"]]  # this kind cuts neurons alone, by another curve
        elif self.neurons is not None and self.touch != "neurons" and dense.layout.modulated:
            found = {AMOUNTS["neurons"]: found[AMOUNTS["neurons"]]}  # the others cut ranks too
        return found

    def _touches(self, layout: Layout) -> tuple[bool, bool]:
        """Whether neurons, and ranks of modulation layers, are cut."""
        ranks = self.touch != "neurons" and self.neurons is None and bool(layout.modulated)
        return self.touch != "modulation" or self.neurons is not None, ranks

    def _curve(
        self, dense: Dense, errors: Mapping[str, Tensor], truncated: Mapping[str, Tensor], amplified: bool
    ) -> BudgetCurve:
        """Of the predicted errors of cut neurons and of ranks, by site."""
        layout, steps = dense.layout, []
        protected = protected_sites(layout, self.protect)
        neurons, ranks = self._touches(layout)
        unit = self.multiple or (64 if layout.hidden >= 1024 else 8)
        for site in (site for site in layout.sites if site.name not in protected):
            if neurons:
                number = number_bytes(dense, f"{site.down}.weight", self.precision)
                each, error = neuron_parameters(layout, site), errors[site.name].tolist()
                multiple = math.lcm(unit, ALIGNED) if self.precision == "fp8" else unit
                steps += neuron_steps(site, each, error, multiple, number)
            if ranks:
                weight = f"{site.modulation}.weight"
                shape, multiple = shape_of(dense.tensors, weight), rank_multiple(dense, unit, self.precision)
                sizes = number_bytes(dense, weight, self.precision), thin_bytes(dense, site, self.precision)
                steps += rank_steps(site, shape, truncated[site.name].tolist(), multiple, *sizes)
        return BudgetCurve(steps, amplified)

    @property
    def asked(self) -> str:
        """What is asked for, in words."""
        if self.neurons is not None:
            return f"{100 * self.neurons:.4g}% of the neurons"
        if self.share is not None:
            return f"{100 * self.share:.4g}% of all parameters"
        inside = "" if self.precision == "stored" else f" in {self.precision}"
        if self.saved is not None:
            return f"{size_text(self.saved * 1e9)} less{inside}"
        return f"a file of {size_text((self.size or 0) * 1e9)}{inside}"

    def _taken(self, dense: Dense, curve: BudgetCurve, extra: int = 0) -> int:
        """How many steps of the curve save as much as is asked for; the file holds `extra` bytes beside the model."""
        if self.neurons is not None:
            return curve.until(self.neurons * dense.layout.neurons, "neurons")
        if self.share is not None:
            parameters = sum(math.prod(shape_of(dense.tensors, key)) for key in dense.tensors)
            return curve.until(self.share * parameters, "parameters")
        if self.saved is not None:
            return curve.until(self.saved * 1e9, "bytes")
        assert self.size is not None
        whole = dense_bytes(dense, self.precision)
        if whole <= self.size * 1e9:
            raise UserError(
                f"The whole model takes {size_text(whole)}, and {self.asked} is asked for: nothing has to be cut. Ask for a "
                "smaller one."
            )
        return curve.until(whole + extra - self.size * 1e9, "bytes")


def _narrow(store: HiddenStates, site: str) -> list[str]:
    """Sentences where what was recorded of a site is too little of what people draw for predictions to hold there."""
    notes, images, sigma = [], len(store.images(site)), store.sigmas(site)
    if images < FEW:
        notes.append(
            f"The rows are of {images} images: prompts that say anything else may come out far worse than predicted. "
            f"Record {ENOUGH} images of different prompts."
        )
    below = (sigma < MIDDLE).float().mean().item()
    if min(below, 1 - below) < SCARCE:
        rare = f"{below:.0%} of them below {MIDDLE:g}" if below < SCARCE else f"{1 - below:.0%} of them from {MIDDLE:g} on"
        notes.append(
            f"The rows are of noise levels {sigma.min().item():.2g} to {sigma.max().item():.2g}, {rare}: with another shift, "
            "number of steps or denoise, errors may be several times those predicted. Record with the sampler settings that "
            "you draw with."
        )
    return notes


def _relative(errors: Tensor, rank: int) -> float:
    """A layer's error at `rank` relative to its output's energy about the mean."""
    return (errors[rank] / errors[0]).item() if rank < len(errors) else 0.0
