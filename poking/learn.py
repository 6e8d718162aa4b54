"""Which neurons to turn for a concept to be gone, and how far each of them: learned by gradients, on velocities alone.

    exam = Exam.of(tiny, with_prompts, without_prompts, extent=LEARNING)
    known = find(tensors, layout, with_it, without, Search(share=1.0, spare=0.0, chance=False))      # all neurons
    learned = learn(exam, known, count=61)
    exam.pull([Poke(learned, learned.factor)]), exam.change([...])

Every neuron has a weight w_j, 0 at first: h_j <- h_j - w_j (h_j - m'_j), with m'_j the mean of the others. Adam makes

    mean (pull - LEFT)^2  +  change of the others / CHANGE  +  SPARSE sum |w|

small, pull and change as `tune.py` has them, of some drawings in each step. Then those that matter least are left out in four
times, learning on in between: of the least w_j^2 E[(dL/dw_j)^2], which is what the loss gains by w_j to the second order with
Adam's mean of squared gradients for the second derivative (optimal brain damage, LeCun, Denker and Solla 1990, with Fisher's
information for the Hessian).

A difference of means (`find.py`) looks at each neuron by itself and turns all alike. That does for a concept that neurons carry
side by side. Where words reach the image past the neurons too, as in FLUX.2, the few that are turned have to make up for that,
each by as much as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Site
from ..progress import Progress, part, renamed, silent
from ..tiny.model import TinyFlux
from .find import strongest
from .neurons import Neurons
from .tune import CHANGE, Exam, Extent, Point

#: What is looked at: more drawings than for a factor, up to half of the steps.
LEARNING = Extent(concept=26, others=234, prompts=9, steps=(0.0, 0.1, 0.2, 0.35, 0.5))
#: The share of the pull that is aimed at: its contrary, since some of it is left.
LEFT = -0.6
#: Weights: no neuron is boosted more than three times, or mirrored at more than seven times its distance.
LEAST, MOST = -2.0, 8.0
#: Steps with all neurons, and again with those that are left; how many times too many stay before that, for half as many steps.
STEPS, TOO_MANY = 120, (6.5, 3.3, 2.0)
#: Rates of Adam with all neurons and with some, and what |w| costs with all.
RATES, SPARSE = (0.03, 0.05), 0.0004
#: How many drawings of the concept, and of others, a step looks at.
AT_ONCE = 13, 26


def learn(exam: Exam, known: Neurons, count: int, progress: Progress = silent, seed: int = 0) -> Neurons:
    """At most `count` of the neurons in `known`, with weights that erase the concept at factor 0, as far as that goes.

    Raises `UserError` where there are none to choose of, or where the loss is no finite number.
    """
    if not known.sites:
        raise UserError("There are no neurons to learn with: expected all that were compared.")
    learner = _Learner(exam, known, seed)
    fewer = [(round(many * count), STEPS // 2) for many in TOO_MANY] + [(count, STEPS)]
    done, total = STEPS, STEPS + sum(steps for _, steps in fewer)
    learner.train(STEPS, RATES[0], SPARSE, part(renamed(progress, "learning with all neurons"), 0, total, STEPS))
    for number, steps in fewer:
        learner.leave(number)
        learner.train(steps, RATES[1], 0.0, part(renamed(progress, f"learning with {number:,} neurons"), done, total, steps))
        done += steps
    return learner.neurons()


class _Learner:
    """Weights [width] of every MLP, which of them are learned (`free`), and what they are learned on."""

    def __init__(self, exam: Exam, known: Neurons, seed: int):
        self.exam, self.known = exam, known
        self.sites = [site for site in exam.tiny.flux.layout.sites if site.name in known.sites]
        self.weights = {site.name: torch.zeros(site.width, requires_grad=True) for site in self.sites}
        places = {site.name: (known.sites[site.name], site.width) for site in self.sites}
        self.free = {name: own.placed(torch.ones(len(own.indices)), width) for name, (own, width) in places.items()}
        self.centres = {name: own.placed(own.measured.mean, width) for name, (own, width) in places.items()}
        self.matters: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def turns(self) -> dict[str, Tensor]:
        return {name: weight.clamp(LEAST, MOST) * self.free[name] for name, weight in self.weights.items()}

    def loss(self, step: int) -> Tensor:
        place = step % len(self.exam.concept)
        other = self.exam.others[int(torch.randint(len(self.exam.others), (), generator=self._generator))]
        other = other.part(self._some(other, AT_ONCE[1]))
        which = self._some(self.exam.concept[place], AT_ONCE[0])
        with turned(self.exam.tiny, self.sites, self.turns(), self.centres):
            pull = self.exam.pull_at(place, self.exam.concept[place].part(which).velocity(self.exam.tiny), which)
            change = other.change(other.velocity(self.exam.tiny))
        return (pull - LEFT).square().mean() + change / CHANGE

    def _some(self, at: Point, count: int) -> Tensor:
        return torch.randperm(len(at.x), generator=self._generator)[:count]

    def train(self, steps: int, rate: float, sparse: float, progress: Progress) -> None:
        weights = list(self.weights.values())
        adam = torch.optim.Adam(weights, lr=rate)
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.05, steps)
        for step in range(steps):
            progress("learning", step, steps)
            with torch.enable_grad():
                loss = self.loss(step) + sparse * sum(weight.abs().sum() for weight in weights)
                gradients = torch.autograd.grad(loss, weights)
            if not loss.isfinite():
                raise UserError("The loss is not a finite number: the model draws what is none.")
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            adam.step()
            falling.step()
        self.matters = {
            name: turn.detach().square() * adam.state[weight]["exp_avg_sq"]
            for (name, weight), turn in zip(self.weights.items(), self.turns().values(), strict=True)
        }

    def leave(self, count: int) -> None:
        """Learns on with the `count` that matter most."""
        chosen, _ = strongest(self.matters, count)
        self.free = {name: torch.zeros(len(one)).index_fill(0, chosen[name], 1.0) for name, one in self.matters.items()}

    def neurons(self) -> Neurons:
        sites = {}
        for name, turn in self.turns().items():
            own = self.known.sites[name]
            weight = turn.detach()[own.indices]
            if len(chosen := weight.nonzero().squeeze(1)):
                sites[name] = replace(own, measured=replace(own.measured, weight=weight)).part(chosen)
        ours, everyones = (sum(site.measured.strength for site in some.values()) for some in (sites, self.known.sites))
        explained = (self.known.explained or 1.0) * ours / max(everyones, 1e-300)
        return replace(self.known, sites=sites, explained=explained, chance=None, spare=None, factor=0.0)


@contextmanager
def turned(tiny: TinyFlux, sites: list[Site], turns: Mapping[str, Tensor], centres: Mapping[str, Tensor]) -> Iterator[None]:
    """Every neuron of `sites` turned, in a way that gradients go through; `turns` and `centres` [width] by site."""

    def turn(site: Site, module: nn.Module, args: tuple) -> tuple:
        first, own = args[0][..., : site.down_column], args[0][..., site.down_column :]
        own = own - turns[site.name] * (own - centres[site.name])
        return (torch.cat([first, own], dim=-1) if site.down_column else own, *args[1:])

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(tiny.flux.get_submodule(site.down).register_forward_pre_hook(partial(turn, site)))
        yield
