"""Making plans: one function that answers what is asked for from what was recorded.

    planned = make_plan(dense, recording, ByBudget(size=10))         # or ByCount(img=2000), ByThreshold(img=0.1, on="rate")
    planned.plan.save("plan.safetensors")
    planned.figure(), planned.notes

    dense, recording = open_dense(plan), open_recording(plan)        # what a plan that was read knows to belong to it

A request that makes no sense, or that nothing can fulfil, is refused before neurons are ranked, which may take hours.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..progress import Progress, silent
from ..recording.recording import Recording
from .by_budget import ByBudget
from .dense import Dense
from .plan import PruningPlan
from .requests import ByCount, ByThreshold, Planned

Request = ByCount | ByThreshold | ByBudget


def make_plan(
    dense: Dense, recording: Recording, what: Request, device: torch.device | str = "cpu", progress: Progress = silent
) -> Planned:
    """The plan that `what` asks for. Nothing is cut yet; rankings that took long are kept in the recording's cache.

    `device` is where neurons are ranked by rows. Raises `UserError`, before any work, where the request cannot be fulfilled,
    the recording is of another model, or the device is not there.
    """
    require_device(device)
    what.check(dense)
    recording.require(dense.fingerprint, dense.source)
    planned = what.plan(dense, recording, device, progress)
    plan = replace(planned.plan, recording=os.path.abspath(recording.folder), settings=settings_of(what))
    return replace(planned, plan=plan)


def settings_of(what: Request) -> dict[str, Any]:
    """A request as data, as it is read back from a file: `by` and its fields."""
    by = {ByCount: "count", ByThreshold: "threshold", ByBudget: "budget"}[type(what)]
    return json.loads(json.dumps({"by": by, **asdict(what)}))


def open_dense(plan: PruningPlan, override: str | os.PathLike[str] | None = None) -> Dense:
    """The dense model of a plan: from the file it was made from, or from `override` where that moved.

    Raises `UserError` where neither is there, or it is another model.
    """
    dense = Dense.open(_found(override or plan.checkpoint, "dense model", "checkpoint FILE"))
    plan.require(dense)
    return dense


def open_recording(plan: PruningPlan, override: str | os.PathLike[str] | None = None) -> Recording:
    """The recording of a plan: the folder it was made from, or `override` where that moved.

    Raises `UserError` where neither is there, or it is of another model.
    """
    recording = Recording.open(_found(override or plan.recording, "recording", "recording FOLDER"))
    recording.require(plan.fingerprint, "the plan's model")
    return recording


def _found(path: str | os.PathLike[str], what: str, option: str) -> str | os.PathLike[str]:
    """`path`; raises `UserError` where there is none, or nothing is there."""
    choose = f"(Load Plan, or --{option})."
    if not path:
        raise UserError(f"The plan does not tell what {option.split()[0]} it is of: choose it {choose}")
    if not Path(path).exists():
        raise UserError(
            f"The {what} {path} is not there, and the plan was made from it: put it back, or choose where it is now {choose}"
        )
    return path


def require_device(device: torch.device | str) -> None:
    """Raises `UserError` where torch cannot compute on `device`."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {device} cannot be used ({reason}): choose cpu, or one that this machine has.") from error
