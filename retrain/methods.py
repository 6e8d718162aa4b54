"""Retraining by any method, as nodes and commands offer it.

    stats = retrain("both", dense, plan, Path("hidden_states"), Path("retrained_layers"), layers="0-18", steps=400)

What is not given is left to the method: a layer takes fewer and smaller steps than the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from ..errors import UserError
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.repair import Repairs
from ..recording.store import HiddenStates
from .distill import DEFAULT, distill_layers
from .layers import open_data, retrain_layers
from .options import Method, Options, Report
from .stats import LayerStats

DISTILL = "distill"
METHODS = (*get_args(Method), DISTILL)


def retrain(
    method: str,
    dense: Dense,
    plan: PruningPlan,
    recorded: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    layers: str = "all",
    on: Literal["auto", "blocks", "rows"] = "auto",
    report: Report | None = None,
    repairs: str | os.PathLike[str] | None = None,
    prepare: Callable[[Repairs], None] = Repairs.compute,
    **given: Any,
) -> list[LayerStats]:
    """Retrains what `plan` leaves of `layers` on what is recorded in the folder `recorded`, and writes them to `folder`.

    `given` are fields of `Options`, None where they are left to the method. `repairs`: where distill keeps what it starts from,
    which `prepare` works out. Raises `UserError` where plan, data and model do not belong together, or a choice makes
    no sense with the method.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if method != DISTILL:
        return retrain_layers(dense, plan, open_data(recorded, on), layers, folder, Options(method=method, **given), report)  # type: ignore[arg-type]
    if layers != "all" or on != "auto" or given.get("thickness", 1) > 1 or given.get("sequential"):
        raise UserError(
            "distill trains all layers at once, on trajectories: leave layers at 'all', the data at 'auto', thickness at 1 and "
            "sequential off, or choose another method."
        )
    store = HiddenStates.open(recorded)
    return distill_layers(dense, plan, store, folder, replace(DEFAULT, **given), report, repairs, prepare)
