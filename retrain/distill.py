"""The whole model at once: every kept MLP weight, against the dense model's velocity.

    samples = Trajectories.of(points)                # or recorded ones: Trajectories.open(store)
    distilled = distill(cut, samples, Options(steps=200, learning_rate=5e-4, batch=32))
    distilled.before, distilled.after                # relative velocity error on images it was not trained on
    Flux.load({**cut, **distilled.tensors})

Two copies of the MLPs' weights and the optimiser's state have to fit beside the model. What is small enough for that gains
more than layer by layer: errors of different layers learn to cancel.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..flux.blocks import blocks_of
from ..flux.model import Flux
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.repair import Repairs
from ..pruning.surgery import Cut
from ..recording.store import HiddenStates
from ..recording.trajectories import Trajectories
from .blocks import in_float32
from .files import Layer, made_before, write_layer
from .loop import Loss, fit, held_out_loss, samples_of, split_images, squared
from .options import Options, Report
from .stats import LayerStats, cut_places, plan_stats
from .trainable import mlp_parameters, rounded

DEFAULT = Options(steps=200, learning_rate=5e-4, batch=32, eval_every=50)


@dataclass(frozen=True)
class Distilled:
    """Changed tensors (canonical keys, in the saved dtype), held-out relative velocity error before and after, steps done, and
    the images it was judged by."""

    tensors: Mapping[str, Tensor]
    before: float
    after: float
    steps: int
    images: frozenset[int]


class VelocityProblem:
    """A cut model against dense velocities, split by image; a `loop.Problem`."""

    def __init__(self, flux: Flux, samples: Trajectories, options: Options):
        self.name, self.module, self.samples, self.options = "the whole model", flux, samples, options
        self.images = split_images(samples.image, options)
        self.train, self.judge = (samples_of(images, samples.image, samples.groups) for images in self.images)

    def errors(self, samples: Tensor) -> Tensor:
        point = self.samples.batch(samples, self.options.device)
        return squared(point.run(self.module), point.velocity)[None]


def distill(
    cut: Mapping[str, Tensor],
    samples: Trajectories,
    options: Options | None = None,
    saved: Path | None = None,
    report: Report | None = None,
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
    weights = dict(flux.named_parameters())
    start = {key: rounded(weights[key].detach(), options.dtype) for key in keys}
    held_out = frozenset(problem.images[1])
    before = _loss_with(problem, start, options)  # as it would be saved
    if options.just_evaluate:
        return Distilled(start, before.relative, before.relative, 0, held_out)
    steps = fit(problem, before, options, saved, report).steps
    trained = {key: rounded(weights[key].detach(), options.dtype) for key in keys}
    if (after := _loss_with(problem, trained, options)).relative < before.relative:
        return Distilled(trained, before.relative, after.relative, steps, held_out)
    return Distilled(start, before.relative, before.relative, steps, held_out)


def distill_layers(
    dense: Dense,
    plan: PruningPlan,
    store: HiddenStates,
    folder: str | os.PathLike[str],
    options: Options | None = None,
    report: Report | None = None,
    repairs: str | os.PathLike[str] | None = None,
    prepare: Callable[[Repairs], None] = Repairs.compute,
) -> list[LayerStats]:
    """`distill` on recorded trajectories, with every block's share written to `folder` as a retrained layer.

    It starts from affine repair where `store` holds rows as well (kept in the folder `repairs`, worked out by `prepare`), else
    from the cut alone. The losses in the stats are the whole model's: its relative velocity error as cut, at the start, and at
    the end. What was made in the very same way before is not made again.
    """
    options, begun, folder = options or DEFAULT, time.monotonic(), Path(folder)
    store.require(dense.fingerprint, dense.source)
    samples = Trajectories.open(store)
    rows = any(shard.kind == "rows" for shard in store.manifest.shards)
    repair = Repairs(
        dense, plan, "affine" if rows else "none", rows=store, folder=repairs or folder / "repairs", device=options.device
    )
    described = replace(options, device="", tensorboard=None)
    story = (
        f"{dense.fingerprint} {plan.digest} {store.digest('trajectories', 'rows', 'amplification')} {repair.method} {described}"
    )
    made = hashlib.sha256(story.encode()).hexdigest()[:16]
    places = sorted(cut_places(dense.layout, plan))
    if not options.just_evaluate and (before := made_before(folder, places, made)):
        return before
    evaluated = replace(options, just_evaluate=True, recompute=False)
    as_cut = distill(Cut(dense, plan), samples, evaluated).before
    prepare(repair)
    found = distill(Cut(dense, plan, repair), samples, options, folder / f".distill.{made}.training.safetensors", report)
    stats = [
        LayerStats(
            layer=place,
            name=blocks_of(dense.layout)[place].name,
            **plan_stats(dense.layout, plan, place),
            initial_loss=as_cut,
            final_loss=found.after,
            train_loss=None,
            relative_cut=as_cut,
            relative_start=found.before,
            relative_final=found.after,
            method="distill",
            data="trajectories",
            steps=found.steps,
            seconds=round(time.monotonic() - begun, 3),
            held_out_images=sorted(found.images),
            save_dtype=options.save_dtype,
        )
        for place in places
    ]
    for layer in [] if options.just_evaluate else stats:
        write_layer(folder, Layer.of(dense, plan, layer.layer, found.tensors, layer, made))
    return stats


def _loss_with(problem: VelocityProblem, tensors: Mapping[str, Tensor], options: Options) -> Loss:
    problem.module.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=False)
    return held_out_loss(problem, options)
