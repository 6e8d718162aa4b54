"""What training starts from: the cut model, whose modulation layers are truncated already.

    cut = start(dense, plan, recording)              # neurons cut, not repaired
    cut = start(dense, plan, recording, "affine")

Only MLPs are trained. What is left of modulation layers is the best there is of its rank, and goes into the retrained layers
as it is.
"""

from __future__ import annotations

import torch

from ..pruning.dense import Dense
from ..pruning.modulation import has_texts
from ..pruning.plan import PruningPlan
from ..pruning.planning import open_recording
from ..pruning.repair import Repairs
from ..pruning.surgery import Cut
from ..recording.recording import Recording


def start(
    dense: Dense, plan: PruningPlan, recording: Recording | None, method: str = "none", device: torch.device | str = "cpu"
) -> Cut:
    """The model that `plan` leaves, repaired by `method` from `recording`.

    Modulation layers are truncated by the texts of `recording`, or by those of the plan's own where it holds none (block states
    alone). Raises `UserError` where neither does, and as `Repairs`.
    """
    by = recording
    if plan.ranks and (recording is None or not has_texts(recording)):
        by = open_recording(plan)
    return Cut(dense, plan, Repairs(dense, plan, method, recording, device, truncated_by=by))
