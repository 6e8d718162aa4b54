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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..analysis.blocks import blocks_of
from ..analysis.trajectories import Trajectories
from ..flux.model import Flux
from ..pruning.dense import Dense
from ..pruning.plan import PruningPlan
from ..pruning.surgery import Cut
from .files import Layer, LayerStats, block_sites, plan_stats, write_layer
from .loop import Loss, fit, held_out_loss, samples_of, split_images, squared
from .options import Options, Report
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
        point = self.samples.batch(samples).to(self.options.device, torch.float32)
        return squared(point.run(self.module), point.velocity)[None]


def distill(
    cut: Mapping[str, Tensor],
    samples: Trajectories,
    options: Options | None = None,
    saved: Path | None = None,
    report: Report | None = None,
) -> Distilled:
    """Trains the MLPs of the pruned checkpoint `cut` (canonical keys) on `samples`.

    Where no training does better on held-out images than `cut` itself, `cut`'s own tensors come back. `saved`: where its state
    is kept, to go on after a kill. Raises `UserError` where there are too few images.
    """
    options = options or DEFAULT
    own = {key: tensor.to(options.device, torch.float32, copy=True) for key, tensor in cut.items()}
    flux = Flux.load(own)
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
    cut: Cut,
    samples: Trajectories,
    folder: str | os.PathLike[str],
    options: Options | None = None,
    report: Report | None = None,
) -> list[LayerStats]:
    """`distill`, with every block's share written to `folder` as a retrained layer.

    The losses in the stats are the whole model's: its relative velocity error, before and after.
    """
    options, begun, folder = options or DEFAULT, time.monotonic(), Path(folder)
    made = hashlib.sha256(
        f"{cut.plan.digest} {len(samples)} {replace(options, device='', tensorboard=None)}".encode()
    ).hexdigest()
    found = distill(cut, samples, options, folder / f".distill.{made[:16]}.training.safetensors", report)
    places = [place for place in range(len(blocks_of(dense.layout))) if _is_cut(dense, cut.plan, place)]
    stats = [
        LayerStats(
            layer=place,
            name=blocks_of(dense.layout)[place].name,
            **plan_stats(dense.layout, cut.plan, place),
            initial_loss=found.before,
            final_loss=found.after,
            train_loss=None,
            relative_cut=found.before,
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
        write_layer(folder, Layer.of(dense, cut.plan, layer.layer, found.tensors, layer, made[:16]))
    return stats


def _is_cut(dense: Dense, plan: PruningPlan, place: int) -> bool:
    return any(site.name in plan.kept for site in block_sites(dense.layout, place))


def _loss_with(problem: VelocityProblem, tensors: Mapping[str, Tensor], options: Options) -> Loss:
    problem.module.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=False)
    return held_out_loss(problem, options)
