"""Where a dense model goes from noise to image, and how far a changed one strays from it there.

    points, latents = trajectory(dense, noise, sigmas, context, vector)
    velocity_error(pruned, points)                   # at the dense run's x_t
    relative_error(latents, other_latents)

    samples = Trajectories.of(points)                # single images and steps, in memory ...
    samples = Trajectories.open(store)               # ... or recorded, each read when it is asked for
    point = samples.batch(torch.tensor([3, 14]))

How trajectories are recorded is in `states.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.sampling import euler
from .manifest import record_first
from .shards import ShardSlices
from .store import HiddenStates

#: velocity = model(x, sigma, context, vector, guidance); `flux.model.Flux` is one.
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """One call of a FLUX: latents x [batch, ...], sigma [batch], what it is told, and the velocity that came of it."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    vector: Tensor | None
    guidance: Tensor | None
    velocity: Tensor

    def __getitem__(self, images: slice | list[int]) -> Point:
        """The same for some images of the batch."""
        parts = (self.x, self.sigma, self.context, self.vector, self.guidance, self.velocity)
        return Point(*(None if part is None else part[images] for part in parts))  # type: ignore[arg-type]

    def run(self, model: Model) -> Tensor:
        """The velocity of another model there."""
        return model(self.x, self.sigma, self.context, self.vector, self.guidance)


@torch.no_grad()
def trajectory(
    model: Model, noise: Tensor, sigmas: Tensor, context: Tensor, vector: Tensor | None = None, guidance: Tensor | None = None
) -> tuple[list[Point], Tensor]:
    """Every point an Euler run goes through, and the latents it ends at."""
    points: list[Point] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        points.append(Point(x, sigma, context, vector, guidance, model(x, sigma, context, vector, guidance)))
        return points[-1].velocity

    return points, euler(velocity, noise, sigmas)


@torch.no_grad()
def velocity_error(model: Model, points: Sequence[Point]) -> float:
    """Sum over all points of |difference to the velocity there|^2, divided by the sum of |velocity|^2."""
    difference, energy = 0.0, 0.0
    for point in points:
        difference += (point.run(model).double() - point.velocity.double()).square().sum().item()
        energy += point.velocity.double().square().sum().item()
    return difference / energy


def relative_error(expected: Tensor, found: Tensor) -> float:
    """|found - expected|^2 / |expected|^2."""
    expected = expected.double()
    return ((found.double() - expected).square().sum() / expected.square().sum()).item()


class Trajectories:
    """Points of one image and step, each read when it is asked for.

    Attributes:
        image: [samples] number of the image each belongs to, int64.
        groups: indices of samples that can stand in one batch: their latents and texts have equal shapes.
        digest: hexadecimal; another one whenever trajectories are recorded. Empty for points in memory.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]], shapes: Sequence[tuple], images: Sequence[Tensor], digest: str = ""):
        """`parts` hold `x`, `sigma`, `velocity`, `context` and, where there are such, `vector` and `guidance`, each [n, ...];
        `shapes` tell which parts go together, `images` [n] the image of each sample."""
        self.parts = parts
        self.digest = digest
        self.image = torch.cat([image.long() for image in images])
        self._place = [(number, row) for number, image in enumerate(images) for row in range(len(image))]
        starts = torch.tensor([0, *(len(image) for image in images)]).cumsum(0).tolist()
        by_shape: dict[tuple, list[Tensor]] = {}
        for number, shape in enumerate(shapes):
            by_shape.setdefault(shape, []).append(torch.arange(starts[number], starts[number + 1]))
        self.groups = [torch.cat(group) for group in by_shape.values()]

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def open(cls, store: HiddenStates) -> Trajectories:
        """What was recorded; raises `UserError` where that is nothing, or edits of reference pictures."""
        shards = [shard for shard in store.manifest.shards if shard.kind == "trajectories"]
        if not shards:
            raise UserError(f"{store.folder} holds no trajectories. {record_first('trajectories')}")
        parts = [ShardSlices(store.folder / shard.file) for shard in shards]
        if any(name.startswith("reference") for part in parts for name in part):
            raise UserError(
                f"{store.folder} holds edits of reference pictures, which cannot be trained on: record without them."
            )
        shapes = [(part.shape("x")[1:], part.shape("context")[1:]) for part in parts]
        return cls(
            parts,
            shapes,
            [torch.tensor([capture.image for capture in shard.captures]) for shard in shards],
            store.digest("trajectories"),
        )

    @classmethod
    def of(cls, points: Sequence[Point], first_image: int = 0) -> Trajectories:
        """Of points whose row i is the same image in all of them."""
        parts = [{name: value for name, value in vars(point).items() if value is not None} for point in points]
        shapes = [(point.x.shape[1:], point.context.shape[1:]) for point in points]
        return cls(parts, shapes, [torch.arange(first_image, first_image + len(point.x)) for point in points])

    def batch(self, samples: Tensor, device: torch.device | str = "cpu") -> Point:
        """The samples of one group together, float32 on `device`."""
        found: dict[str, list[Tensor]] = {"vector": [], "guidance": []}
        for sample in samples.tolist():
            number, row = self._place[sample]
            part = self.parts[number]
            for name in part:
                one = part.row(name, row) if isinstance(part, ShardSlices) else part[name][row : row + 1]
                found.setdefault(name, []).append(one)
        return Point(**{name: torch.cat(rows).to(device).float() if rows else None for name, rows in found.items()})  # type: ignore[arg-type]
