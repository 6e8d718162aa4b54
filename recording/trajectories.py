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
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.integrators import euler
from .shards import HeldShard, Samples, ShardFile
from .states import METHOD, REFERENCE
from .store import HiddenStates

#: velocity = model(x, sigma, context, vector, guidance); `flux.model.Flux` is one.
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """One call of a FLUX: latents x [batch, ...], sigma [batch], what it is told, and the velocity that came of it.

    `references`: latents of the pictures that are edited, [batch, ...] each.
    """

    x: Tensor
    sigma: Tensor
    context: Tensor
    vector: Tensor | None
    guidance: Tensor | None
    velocity: Tensor
    references: tuple[Tensor, ...] = ()

    def __getitem__(self, images: slice | list[int]) -> Point:
        return Point.of({name: value[images] for name, value in self.tensors.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Point:
        """The point of such `tensors`."""
        plain: dict[str, Any] = {name: value for name, value in tensors.items() if not name.startswith(REFERENCE)}
        numbered = [f"{REFERENCE}{number}" for number in range(len(tensors) - len(plain))]
        return cls(**{"vector": None, "guidance": None, **plain}, references=tuple(tensors[name] for name in numbered))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is of it, by name, references numbered: `reference0`, ..."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return found | {f"{REFERENCE}{number}": value for number, value in enumerate(self.references)}

    def run(self, model: Model) -> Tensor:
        """The velocity of another model there."""
        edited = {"references": self.references} if self.references else {}
        return model(self.x, self.sigma, self.context, self.vector, self.guidance, **edited)


@torch.no_grad()
def trajectory(
    model: Model,
    noise: Tensor,
    sigmas: Tensor,
    context: Tensor,
    vector: Tensor | None = None,
    references: Sequence[Tensor] = (),
) -> tuple[list[Point], Tensor]:
    """Every point an Euler run goes through, and the latents it ends at."""
    points: list[Point] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        asked = Point(x, sigma, context, vector, None, x, tuple(references))
        points.append(replace(asked, velocity=asked.run(model)))
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


class Trajectories(Samples):
    """Points of one image and step, each read when it is asked for; latents and texts of a group have equal shapes."""

    @classmethod
    def open(cls, store: HiddenStates) -> Trajectories:
        """What was recorded.

        Raises `UserError` where that is nothing, or edits whose reference pictures stand where the reference transformer does
        not put them.
        """
        files = store.files("trajectories")
        for file in files:
            _require_point(file)
        if others := sorted({name for file in files for name in file.names if name.startswith(METHOD)}):
            raise UserError(
                f"{store.folder} holds edits of reference pictures by the method {others[0].removeprefix(METHOD)!r}, which "
                "cannot be trained on: record them without Edit Model Reference Method and Flux KV Cache."
            )
        return cls(files, _alike(files), store.digest("trajectories"))

    @classmethod
    def of(cls, points: Sequence[Point]) -> Trajectories:
        """Of points whose row i is the same image in all of them."""
        held = [HeldShard(point.tensors, torch.arange(len(point.x))) for point in points]
        return cls(held, _alike(held))

    def batch(self, samples: Tensor, device: torch.device | str = "cpu") -> Point:
        """The samples of one group together, float32 on `device`."""
        names = self.places(samples)[0][0].names
        return Point.of({name: self.read(samples, name).to(device).float() for name in names})


def _require_point(file: ShardFile) -> None:
    """Raises `UserError` where a file does not hold points, whole."""
    plain = {name for name in file.names if not name.startswith((REFERENCE, METHOD))}
    references = {name for name in file.names if name.startswith(REFERENCE)}
    numbered = {f"{REFERENCE}{number}" for number in range(len(references))}
    needed = {"x", "sigma", "context", "velocity"}
    rows = len(file.images)
    shapes = {name: file.shape(name) for name in plain}
    sound = (
        shapes.get("x", ())[:1] == (rows,)
        and shapes.get("velocity") == shapes.get("x")
        and all(shape[:1] == (rows,) for shape in shapes.values())
    )
    if not sound or not needed <= plain <= {fact.name for fact in fields(Point)} or references != numbered:
        raise UserError(
            f"{file.path} is damaged: it holds {', '.join(sorted(file.names))}, expected {', '.join(sorted(needed))} and what "
            "else a model is told. Record again into a new folder."
        )


def _alike(files: Sequence[ShardFile | HeldShard]) -> tuple[str, ...]:
    """What is to be of one shape in a batch: latents, texts, and every reference picture."""
    return ("x", "context", *sorted({name for file in files for name in file.names if name.startswith(REFERENCE)}))
