"""`flux-poke fit`: from a checkpoint and prompts to a smaller checkpoint of the size asked for, without ComfyUI.

    fit = Fit(checkpoint, prompts, ByBudget(size=0.0025), Path("fitted.safetensors"), Recording.at("recorded"))
    fit.takes                                        # what it will take, in words, before anything is drawn
    fitted = fit.run(progress)
    fitted.plan.table(), str(fitted)                 # size and error, asked, predicted and measured

Models of the tiny kind alone. Some of the prompts are never recorded: the file that was written is measured on them. Images
that are in the recording already are not drawn again, whatever size is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import check_not_read, check_replaces, check_writable, size_text
from .flux.model import Flux
from .flux.weights import Plain
from .progress import Progress, part, renamed, silent
from .prompts import ENOUGH, split_prompts
from .pruning.checkpoint import Pruned, save_pruned
from .pruning.dense import PRUNED_FORMAT, Dense
from .pruning.plan import PruningPlan
from .pruning.planning import ByBudget, make_plan, require_device
from .pruning.repair import Repairs
from .pruning.scores import REPAIR_OF
from .pruning.surgery import Cut
from .recording.amplification import AmplificationProbe, probed_steps
from .recording.calibration import asked_images, effort_of, missing_images
from .recording.drawing import PROBED_STEPS, calibrate
from .recording.recording import Recording
from .recording.trajectories import Point, relative_error, trajectory, velocity_error
from .tiny.model import STEPS, TinyFlux

#: Images drawn at once.
BATCH = 16
#: From a recording's seed to that of the images that are measured.
APART = 10**9


@dataclass(frozen=True)
class Fitted:
    """A checkpoint that was written: predicted and measured errors are relative, 0 for the dense model.

    `velocity_error` is that of the velocity at the dense model's points, `latent_error` that of the final latents of runs of
    its own, on `measured` prompts that were not recorded.
    """

    path: Path
    plan: PruningPlan
    asked: str
    notes: tuple[str, ...]
    bytes: int
    dense_bytes: int
    velocity_error: float
    latent_error: float
    measured: int

    def __str__(self) -> str:
        predicted = "" if self.plan.velocity_error is None else f"{self.plan.velocity_error:.3g} predicted, "
        return (
            f"{self.path}: {self.asked} asked for, {size_text(self.bytes)} in place of {size_text(self.dense_bytes)}; "
            f"relative error of the velocity {predicted}{self.velocity_error:.3g} measured, of final latents "
            f"{self.latent_error:.3g}, on {self.measured} prompts that were not recorded"
        )


class Fit:
    """Everything is checked when it is made, and nothing is written before `run`.

    Raises `UserError` where the checkpoint is not of the tiny kind, the budget is none or more than may be cut, the recording
    is another model's, there are too few prompts, or `out` is something else or cannot be written.
    """

    def __init__(
        self,
        checkpoint: Path,
        prompts: Sequence[str],
        what: ByBudget,
        out: Path,
        recording: Recording,
        count: int | None = None,
        steps: int = STEPS,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        check_replaces(out, PRUNED_FORMAT)
        check_writable(out)
        require_device(device)
        self.dense = Dense.open(checkpoint)
        check_not_read(out, [self.dense.path])
        what.check(self.dense)
        self.tiny = TinyFlux.load(checkpoint)
        self.what, self.out, self.recording, self.seed, self.device = what, out, recording, seed, device
        recording.check_writable(self.dense.fingerprint, self.dense.source, internals=True)
        recorded, self.measured = split_prompts(prompts)
        number = min(ENOUGH, len(recorded)) if count is None else count
        _, height, width = self.tiny.latent_shape
        asked = asked_images(recorded, number, seed, f"{height}x{width} latents, {steps} steps")
        self.missing, self.asked = missing_images(recording, asked), len(asked)
        self.sigmas = self.tiny.sigmas(steps)
        if self.missing:
            self.effort = effort_of(recording, self.dense.layout, self.asked, len(self.missing), steps, self.tiny.tokens)

    @property
    def takes(self) -> str:
        """What it will take, in sentences."""
        there, steps = self.asked - len(self.missing), len(self.sigmas) - 1
        said = [f"{there} of {self.asked} images are in {self.recording.folder}"] if there else []
        if self.missing:
            known = self.recording.states().amplification if "amplification" in self.recording.kinds else {}
            probed = AmplificationProbe(self.dense.layout, known).calls * len(probed_steps(steps, PROBED_STEPS))
            said.append(f"to draw: {self.effort}")
            if probed:
                said.append(f"{probed:,} model calls, once only, for what an error in each layer does to the picture")
        else:
            said.append("nothing is drawn to record")
        said.append(f"{3 * steps * len(self.measured):,} to measure the file on {len(self.measured)} other prompts")
        return "; ".join(said)

    def run(self, progress: Progress = silent) -> Fitted:
        """Records what is missing, plans, repairs, writes the file and measures it. Whatever stops it, images that are recorded
        and repairs that are worked out are there when it is run again."""
        start = 0
        notes: tuple[str, ...] = ()
        if self.missing:
            start = 50
            within = part(progress, 0, 100, start)
            notes = calibrate(
                self.tiny, self.dense.fingerprint, self.recording, self.missing, self.effort, BATCH, within
            )  # fmt: skip
        rest = part(progress, start, 100, 100 - start)
        planned = make_plan(self.dense, self.recording, self.what, self.device, part(rest, 0, 4, 2))
        plan = planned.plan
        method = REPAIR_OF.get(plan.score, "none")
        repairs = Repairs(self.dense, plan, method, self.recording, self.device)
        save_pruned(self.out, Cut(self.dense, plan, repairs), progress=part(rest, 2, 4), precision=plan.precision)
        velocity, latent = self._measure(renamed(part(rest, 3, 4), f"measuring on {len(self.measured)} other prompts"))
        size, dense_size = self.out.stat().st_size, os.path.getsize(self.dense.path)
        return Fitted(
            self.out, plan, self.what.asked, (*notes, *planned.notes), size, dense_size, velocity, latent, len(self.measured)
        )  # fmt: skip

    def _measure(self, progress: Progress) -> tuple[float, float]:
        """Errors of the velocity and of the final latents of the file that was written."""
        changed = TinyFlux(
            Flux.load(dict(Plain(Pruned.open(self.out).tensors)), torch.float32), self.tiny.words, self.tiny.autoencoder
        )
        points: list[Point] = []
        expected: list[Tensor] = []
        found: list[Tensor] = []
        for first in range(0, len(self.measured), BATCH):
            prompts = self.measured[first : first + BATCH]
            progress("", first, len(self.measured))
            noise = self.tiny.noise(len(prompts), self.seed + APART + first)
            passed, latents = trajectory(self.tiny.flux, noise, self.sigmas, *self.tiny.words(prompts))
            points += passed
            expected.append(latents)
            found.append(changed.sample(prompts, noise, self.sigmas))
        return velocity_error(changed.flux, points), relative_error(torch.cat(expected), torch.cat(found))
