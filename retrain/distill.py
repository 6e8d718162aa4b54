"""The whole model at once: every kept MLP weight, against the dense model's velocity.

    samples = Trajectories.of(points)                # or recorded ones: Trajectories.open(recording.states())
    trained = distill(cut, samples, Options(steps=200, learning_rate=5e-4, batch=32))
    trained.start.relative, trained.final.relative   # velocity errors on images it was not trained on
    Flux.load({**cut, **trained.tensors})

Two copies of the MLPs' weights and the optimiser's state have to fit beside the model. What is small enough for that gains
more than layer by layer: errors of different layers learn to cancel.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..flux.blocks import blocks_of
from ..flux.model import Flux
from ..flux.weights import full_precision
from ..progress import Progress, part, silent
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..recording.recording import Recording
from ..recording.trajectories import Trajectories
from .blocks import train_mlps_alone
from .cutting import start
from .files import LayerStats, Output
from .loop import Trained, train_best
from .options import Options, Report
from .problem import Problem, squared

DISTILL = "distill"
DEFAULT = Options(steps=200, learning_rate=5e-4, batch=32, eval_every=50)

#: By the repair that training starts from: what it is called, and what else of the recording it depends on.
_REPAIRS: dict[str, tuple[str, tuple[str, ...]]] = {
    "affine": ("affine repair", ("rows", "amplification")),
    "bias": ("bias repair", ("internals",)),
    "none": ("cut", ()),
}


class VelocityProblem(Problem):
    """A cut model against dense velocities, only its MLPs trainable, split by image."""

    def __init__(self, flux: Flux, samples: Trajectories, options: Options):
        super().__init__("the whole model", flux, samples.image, samples.groups, options)
        train_mlps_alone(flux, flux.layout.sites)
        self.samples = samples

    def errors(self, samples: Tensor) -> Tensor:
        point = self.samples.batch(samples, self.options.device)
        return squared(point.run(self.module), point.velocity)[None]


def distill(
    cut: Mapping[str, Tensor],
    samples: Trajectories,
    options: Options = DEFAULT,
    saved: Path | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> Trained:
    """Trains the MLPs of the pruned checkpoint `cut` (canonical keys, quantised or not) on `samples`.

    Where no training does better on held-out images than `cut` itself, `cut`'s own tensors come back. `saved`: where its state
    is kept, to go on after a kill. Raises `UserError` where there are too few images.
    """
    numbers = (key for key in cut if key.endswith((".weight", ".bias", ".scale")))  # not what quantisation keeps beside them
    flux = Flux.load({key: full_precision(cut, key, options.device).clone() for key in numbers})
    if options.recompute:
        for block in (*flux.double_blocks, *flux.single_blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return train_best(VelocityProblem(flux, samples, options), None, saved, report, progress)


def distill_layers(
    dense: Dense,
    plan: PruningPlan,
    recording: Recording,
    folder: str | os.PathLike[str],
    options: Options = DEFAULT,
    report: Report | None = None,
    progress: Progress = silent,
) -> list[LayerStats]:
    """`distill` on recorded trajectories, with every block's share written to `folder` as a retrained layer.

    It starts from affine repair where the recording holds rows, else from repaired biases where it holds internals, else from
    the cut alone. The losses in the stats are the whole model's, of the velocity: as cut, at the start, and at the end. What
    was made in the very same way before is not made again. Raises `UserError` where the folder holds something else.
    """
    begun = time.monotonic()
    plan.require(dense)
    store, kinds = recording.states(), recording.kinds
    store.require(dense.fingerprint, dense.source)
    samples = Trajectories.open(store)
    method = "affine" if "rows" in kinds else "bias" if "internals" in kinds and recording.internals().fingerprint else "none"
    origin, sources = _REPAIRS[method]
    repaired = start(dense, plan, recording, method, options.device)
    output = Output(folder, repaired, options, "trajectories", recording.digest("trajectories", *sources), method)
    progress(f"starting from {origin}", 0, 1)
    indices = range(len(blocks_of(dense.layout)))  # whole MLPs are trained as well
    key = output.key(indices)
    if finished := output.finished(indices, key):
        return finished
    evaluated = replace(options, just_evaluate=True, recompute=False)
    repaired.work_out(part(progress, 0, 1, 0.25))
    as_cut = distill(start(dense, plan, recording), samples, evaluated, progress=part(progress, 0.25, 1, 0.05)).cut
    within = part(progress, 0.3, 1, 0.7)
    trained = distill(repaired, samples, options, output.saved(key, DISTILL), report, within)
    return output.write(indices, key, replace(trained, cut=as_cut), DISTILL, origin, begun)
