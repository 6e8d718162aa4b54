"""The whole model at once: every kept MLP weight, against the dense model's velocity.

    samples = Trajectories.of(points)                # or recorded ones: Trajectories.open(recording.states())
    distilled = distill(cut, samples, Options(steps=200, learning_rate=5e-4, batch=32))
    distilled.before, distilled.after                # relative velocity error on images it was not trained on
    Flux.load({**cut, **distilled.tensors})

Two copies of the MLPs' weights and the optimiser's state have to fit beside the model. What is small enough for that gains
more than layer by layer: errors of different layers learn to cancel.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..flux.model import Flux
from ..progress import Progress, part, silent
from ..pruning.cache import cache_key
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.repair import Repairs
from ..pruning.surgery import Cut
from ..recording.recording import Recording
from ..recording.split import held_out
from ..recording.trajectories import Trajectories
from .blocks import in_float32, mlp_parameters
from .files import Layer, LayerStats, cut_blocks, finished_stats, require_own_folder, write_layer
from .loop import Losses, train_best
from .options import Options, Report
from .problem import samples_of, squared

DEFAULT = Options(steps=200, learning_rate=5e-4, batch=32, eval_every=50)


@dataclass(frozen=True)
class Distilled:
    """Changed tensors (canonical keys, in the saved dtype; 8-bit ones as float32), the held-out losses, and the images that
    were held out."""

    tensors: Mapping[str, Tensor]
    losses: Losses
    images: frozenset[int]

    @property
    def before(self) -> float:
        """Held-out relative velocity error as training began."""
        return self.losses.start.relative

    @property
    def after(self) -> float:
        return self.losses.final.relative

    @property
    def steps(self) -> int:
        return self.losses.steps


class VelocityProblem:
    """A cut model against dense velocities, split by image; a `Problem`."""

    def __init__(self, flux: Flux, samples: Trajectories, options: Options):
        self.name, self.module, self.samples, self.options = "the whole model", flux, samples, options
        self.images = held_out(samples.image, options.eval_share, options.seed)
        self.train, self.held_out = (samples_of(images, samples.image, samples.groups) for images in self.images)

    def errors(self, samples: Tensor) -> Tensor:
        point = self.samples.batch(samples, self.options.device)
        return squared(point.run(self.module), point.velocity)[None]


def distill(
    cut: Mapping[str, Tensor],
    samples: Trajectories,
    options: Options | None = None,
    saved: Path | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> Distilled:
    """Trains the MLPs of the pruned checkpoint `cut` (canonical keys, quantised or not) on `samples`.

    Where no training does better on held-out images than `cut` itself, `cut`'s own tensors come back. `saved`: where its state
    is kept, to go on after a kill. Raises `UserError` where there are too few images.
    """
    options = options or DEFAULT
    numbers = (key for key in cut if key.endswith((".weight", ".bias", ".scale")))  # not what quantisation keeps beside them
    flux = Flux.load({key: in_float32(cut, key, options.device) for key in numbers})
    keys = mlp_parameters(flux, flux.layout.sites)
    if options.recompute:
        for block in (*flux.double_blocks, *flux.single_blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    problem = VelocityProblem(flux, samples, options)
    losses = train_best(problem, keys, None, options, saved, report, progress)
    weights = dict(flux.named_parameters())
    dtype = options.dtype if options.dtype.itemsize > 1 else weights[keys[0]].dtype
    return Distilled({key: weights[key].detach().to(dtype) for key in keys}, losses, frozenset(problem.images[1]))


def distill_layers(
    dense: Dense,
    plan: PruningPlan,
    recording: Recording,
    folder: str | os.PathLike[str],
    options: Options | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> list[LayerStats]:
    """`distill` on recorded trajectories, with every block's share written to `folder` as a retrained layer.

    It starts from affine repair where the recording holds rows, else from repaired biases where it holds internals, else from
    the cut alone. The losses in the stats are the whole model's, of the velocity: as cut, at the start, and at the end. What
    was made in the very same way before is not made again. Raises `UserError` where the folder holds something else.
    """
    options, begun, folder = options or DEFAULT, time.monotonic(), Path(folder)
    plan.require(dense)
    if not options.just_evaluate:
        require_own_folder(folder, plan)
    store, kinds = recording.states(), recording.kinds
    store.require(dense.fingerprint, dense.source)
    samples = Trajectories.open(store)
    method = "affine" if "rows" in kinds else "bias" if "internals" in kinds and recording.internals().fingerprint else "none"
    start = {"affine": "affine repair", "bias": "bias repair", "none": "cut"}[method]
    progress(f"starting from {start}", 0, 1)
    repairs = Repairs(dense, plan, method, recording, options.device)
    sources = {"affine": ("rows", "amplification"), "bias": ("internals",), "none": ()}[method]
    described = str(replace(options, device="", tensorboard=None))
    key = cache_key(dense.fingerprint.to_json(), plan.digest, recording.digest("trajectories", *sources), method, described)
    indices = sorted(cut_blocks(dense.layout, plan))
    if not options.just_evaluate and (finished := finished_stats(folder, indices, key)):
        return finished
    evaluated = replace(options, just_evaluate=True, recompute=False)
    as_cut = distill(Cut(dense, plan), samples, evaluated, progress=part(progress, 0, 1, 0.05)).losses.cut
    repairs.compute(part(progress, 0.05, 1, 0.25))
    saved = folder / f".distill.{key}.training.safetensors"
    found = distill(Cut(dense, plan, repairs), samples, options, saved, report, part(progress, 0.3, 1, 0.7))
    losses, seconds = replace(found.losses, cut=as_cut), time.monotonic() - begun
    more = {"method": "distill", "data": "trajectories", "together": indices, "start": start}
    stats = [LayerStats.of(dense, plan, index, options, losses, seconds, found.images, **more) for index in indices]
    for layer in [] if options.just_evaluate else stats:
        write_layer(folder, Layer.of(dense, plan, layer.layer, found.tensors, layer, key))
    return stats
