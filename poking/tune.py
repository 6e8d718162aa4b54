"""How much the others have to count, and by which factor to turn, for a concept to be gone: measured on velocities alone.

    exam = Exam.of(tiny, with_prompts, without_prompts)
    tuned = tune(exam, lambda spare: find(tensors, layout, with_it, without, Search(spare=spare)))
    tuned.factor                                     # to poke with
    exam.pull([Poke(tuned, tuned.factor)]), exam.change([...])

At points of drawings of the concept, u = v(concept's prompt) - v(other prompts) is what the prompt pulls towards. Poked, the
share of the pull that is left is <v - v(other prompts), u> / <u, u>: 1 is all of it, 0 is none. At points of other drawings, a
poke costs |v - v(dense)|^2 / |v(dense)|^2. Nothing is decoded, and nobody has to tell what a picture shows. For each choice of
neurons a factor is worked out that leaves about `LEFT` of the pull, and the choice is taken that leaves and costs the least: a
cost of `CHANGE` counts as all of the pull.

Only the first steps are looked at: what an image is of is decided at high noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.integrators import euler
from ..progress import Progress, silent
from ..tiny.model import TinyFlux
from .neurons import Neurons
from .poke import BlockPoke, Poke, poked

#: The share of the pull that factors aim at, the lowest of them, and the cost that counts as much as all of the pull.
LEFT, LOWEST, CHANGE = 0.0, -3.0, 0.005
#: Below this share of the velocity's square, a prompt pulls nowhere.
LEAST_PULL = 1e-8
#: How much the others count, in the choices that are tried.
SPARES = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
#: The seed of the first drawing, and of the first of those that nothing was tuned or learned on.
SEED, HELD_OUT = 700_000, 900_000


@dataclass(frozen=True)
class Extent:
    """How many drawings of the concept and of others, other prompts at each point, and at which parts of the steps."""

    concept: int = 6
    others: int = 24
    prompts: int = 6
    steps: tuple[float, ...] = (0.0, 0.15, 0.3)


@dataclass(frozen=True)
class Point:
    """One step of some drawings: latents x, noise level, text, and the dense model's velocities."""

    x: Tensor
    sigma: Tensor
    texts: tuple[Tensor, Tensor | None]
    dense: Tensor

    def part(self, which: Tensor) -> Point:
        """Some of the drawings."""
        text, vector = self.texts
        return Point(
            self.x[which], self.sigma[which], (text[which], None if vector is None else vector[which]), self.dense[which]
        )

    def velocity(self, tiny: TinyFlux) -> Tensor:
        """The model's, as it is now."""
        return tiny.flux(self.x, self.sigma, *self.texts)

    def change(self, velocity: Tensor) -> Tensor:
        """The squared change to `velocity`, relative to its square."""
        return (velocity - self.dense).square().sum() / self.dense.square().sum()


@dataclass(frozen=True)
class Exam:
    """Points of drawings with the concept, the mean velocity there of other prompts, and points of others."""

    tiny: TinyFlux
    concept: Sequence[Point]
    neutral: Sequence[Tensor]
    others: Sequence[Point]

    @classmethod
    @torch.no_grad()
    def of(
        cls, tiny: TinyFlux, with_it: Sequence[str], without: Sequence[str], seed: int = SEED, extent: Extent | None = None
    ) -> Exam:
        """Draws with the prompts `with_it` and `without`, as many as are needed, in turns.

        Raises `UserError` where there are none, or one `with_it` makes no difference.
        """
        if not with_it or not without:
            raise UserError("There are no prompts with the concept, or none without it: at least one of each is needed.")
        extent = extent or Extent()
        asked = _some(with_it, extent.concept)
        concept = _points(tiny, asked, seed, extent.steps)
        others = _points(tiny, _some(without, extent.others), seed + extent.concept, extent.steps)
        texts = [tiny.words([prompt] * extent.concept) for prompt in _some(without, min(extent.prompts, len(without)))]
        neutral = [sum(tiny.flux(at.x, at.sigma, *text) for text in texts) / len(texts) for at in concept]
        for at, mean in zip(concept, neutral, strict=True):
            pulls = (at.dense - mean).flatten(1).square().sum(1) / at.dense.flatten(1).square().sum(1)
            if pulls.min() < LEAST_PULL:
                prompt = asked[int(pulls.argmin())]
                raise UserError(
                    f"With '{prompt}' this model draws what it does with the prompts without the concept: there is nothing to "
                    "find. Choose prompts that differ, in words that it knows."
                )
        return cls(tiny, concept, neutral, others)  # type: ignore[arg-type]

    def pull(self, pokes: Sequence[Poke | BlockPoke]) -> float:
        """The share of the concept's pull that is left."""
        velocities = self._velocities(self.concept, pokes)
        return torch.stack([self.pull_at(place, velocity) for place, velocity in enumerate(velocities)]).mean().item()

    def pull_at(self, place: int, velocity: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """The share that `velocity` leaves of the pull at one of the concept's points, of each drawing in `which`."""
        neutral = self.neutral[place][which]
        pull = (self.concept[place].dense[which] - neutral).flatten(1)
        return ((velocity - neutral).flatten(1) * pull).sum(1) / pull.square().sum(1)

    def change(self, pokes: Sequence[Poke | BlockPoke]) -> float:
        """The squared change of the others' velocity, relative to its square."""
        pairs = zip(self.others, self._velocities(self.others, pokes), strict=True)
        return torch.stack([at.change(velocity) for at, velocity in pairs]).mean().item()

    @torch.no_grad()
    def _velocities(self, points: Sequence[Point], pokes: Sequence[Poke | BlockPoke]) -> list[Tensor]:
        with poked(self.tiny.flux, pokes):
            return [at.velocity(self.tiny) for at in points]


def tune(exam: Exam, find: Callable[[float], Neurons], progress: Progress = silent) -> Neurons:
    """Of what `find` gives for each of `SPARES`, the neurons that erase the concept at the least cost, with their factor."""
    tried: list[tuple[float, Neurons]] = []
    for done, spare in enumerate(SPARES):
        progress("turning neurons down", done, len(SPARES))
        try:
            found = find(spare)
        except UserError:  # none is left, nor will be where the others count more
            if not tried:
                raise
            break
        left = exam.pull([Poke(found, -1.0)])  # falls nearly in a line with the factor, from 1 at 1
        factor = round(max(1 - 2 * (1 - LEFT) / max(1 - left, 1e-3), LOWEST), 2)
        poke = [Poke(found, factor)]
        tried.append((max(exam.pull(poke), 0.0) + exam.change(poke) / CHANGE, replace(found, factor=factor)))
    return min(tried, key=lambda one: one[0])[1]


def _points(tiny: TinyFlux, prompts: Sequence[str], seed: int, at: Sequence[float]) -> list[Point]:
    """Points of the drawings of `prompts`, number n from `seed` + n, at these parts of the steps."""
    sigmas, found, texts = tiny.sigmas(), [], tiny.words(prompts)
    steps = {round(part * (len(sigmas) - 1)) for part in at}
    last = max(steps)

    def keep(step: int, x: Tensor, velocity: Tensor) -> None:
        if step in steps:
            found.append(Point(x, sigmas[step].expand(len(x)), texts, velocity))

    euler(lambda x, sigma: tiny.flux(x, sigma, *texts), tiny.noise(len(prompts), seed), sigmas[: last + 2], keep)
    return found


def _some(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of them, spread over all, again from the first where there are fewer."""
    if len(prompts) < count:
        return [prompts[n % len(prompts)] for n in range(count)]
    return [prompts[n * len(prompts) // count] for n in range(count)]
