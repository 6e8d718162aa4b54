"""Turning neurons, directions and whole blocks down or up while a FLUX runs, without changing it.

    with poking(model, layout, [Poke(neurons, factor=-1.0)], moment):        # hooks, gone when the `with` ends
        model(x, sigma, context, vector)
    with poked(flux, [Poke(neurons), BlockPoke.of(layout, "single 3", "mlp")]):      # a `Flux`, any number of calls
        tiny.draw(["three"])

A neuron becomes m' + factor (h - m'), with m' the mean of the others: at 1 it is as it was, to the bit, at 0 it is m', at -1
it is mirrored, and at 2 it is boosted. With a weight w that was learned (`learn.py`), 1 + (factor - 1) w stands for the factor.
With a direction, that holds for what of all neurons lies along it, and with several, in
the space they span. A block's contribution is what its attention or its MLP adds to the tokens, times the factor.

A poke may be for a range of noise levels, for a part of the image, and for positive prompts alone. Where it does not apply,
nothing is changed, to the bit. Hooks stand before those that record: recordings hold what was poked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..flux.blocks import Block, choose_blocks
from ..flux.layout import Layout, Site
from ..recording.hooks import force_eager
from .neurons import Measured, Neurons, unit

Part = Literal["attention", "mlp", "both"]
Stream = Literal["img", "txt", "both"]
#: Tokens that are turned together on a CPU: what is read of them is in the cache when it is written.
TILE = 16


@dataclass(frozen=True)
class Where:
    """When and where a poke applies: at noise levels from `sigmas[0]` to `sigmas[1]`, both included.

    mask [rows, columns] is 1 where the image is poked and 0 where it is not, of any size; the text is left alone then, and so
    are pictures of reference. `positive_only` leaves rows of the negative prompt alone. Raises `UserError` where a range is
    empty or a mask is none.
    """

    sigmas: tuple[float, float] = (0.0, 1.0)
    mask: Tensor | None = None
    positive_only: bool = False

    def __post_init__(self) -> None:
        low, high = self.sigmas
        if not 0 <= low <= high <= 1:
            raise UserError(f"Noise levels go from 0 to 1, the lower one first; found {low:g} to {high:g}.")
        if self.mask is not None and (self.mask.ndim != 2 or not self.mask.numel() or not self.mask.isfinite().all()):
            raise UserError(f"A mask is a picture of one channel; found {tuple(self.mask.shape)}.")


@dataclass(frozen=True)
class Poke:
    """Neurons and by which factor they are turned about `about`: the mean of the others, or a value (0: they are scaled).

    `factor` 0 about a value sets them to it; 0 about 0 cuts them. Weights that were learned are for turning about the mean.
    `kept`, by site, tells of a pruned model which neurons are left of the one that these are of: others are passed over.
    """

    neurons: Neurons
    factor: float = 0.0
    about: float | None = None
    where: Where = field(default_factory=Where)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def turning(self, known: Measured) -> tuple[Tensor, Tensor]:
        """What n neurons are turned about [n], and their weights [n]."""
        if self.about is None:
            return known.mean, known.weight
        return torch.full_like(known.mean, self.about), torch.ones_like(known.mean)


@dataclass(frozen=True)
class BlockPoke:
    """Blocks, and by which factor what they add to the tokens is multiplied; 0 skips it."""

    blocks: tuple[Block, ...]
    part: Part = "both"
    stream: Stream = "both"
    factor: float = 0.0
    where: Where = field(default_factory=Where)

    @classmethod
    def of(
        cls,
        layout: Layout,
        blocks: str,
        part: Part = "both",
        stream: Stream = "both",
        factor: float = 0.0,
        where: Where | None = None,
    ) -> BlockPoke:
        """`blocks` as "double 0, single 3-5" names them; raises `UserError` where the model has no such."""
        return cls(tuple(sorted(choose_blocks(blocks, layout))), part, stream, factor, where or Where())


@dataclass(frozen=True)
class Moment:
    """One call of a model, as a poke has to know it.

    sigma [batch]; `tokens` are rows and columns of the image's patches, `words` how many text tokens come first in a single
    block; `negative` [batch] is True for rows of the negative prompt.
    """

    sigma: Tensor
    tokens: tuple[int, int]
    words: int
    negative: tuple[bool, ...] = ()

    @classmethod
    def at(cls, layout: Layout, x: Tensor, sigma: Tensor, context: Tensor, negative: Sequence[bool] = ()) -> Moment:
        """Of latents x [batch, channels, height, width] and text [batch, words, width]."""
        rows, columns = (-(-side // layout.patch) for side in x.shape[-2:])
        return cls(sigma, (rows, columns), context.shape[1], tuple(negative))

    def strength(self, where: Where) -> Strength:
        """How much of a poke each token gets, from 0 to 1, on the device of `sigma`, which is not waited for."""
        low, high = where.sigmas
        rows = None
        if where.sigmas != (0.0, 1.0):
            rows = ((self.sigma >= low) & (self.sigma <= high)).float()
        if where.positive_only and any(self.negative):
            positive = (~torch.tensor(self.negative)).float().to(self.sigma.device)
            rows = positive if rows is None else rows * positive
        mask = None
        if where.mask is not None:
            given = where.mask.to(self.sigma.device, torch.float32).clamp(0, 1)
            mask = F.adaptive_avg_pool2d(given[None, None], self.tokens).flatten()
        return Strength(None if rows is None else rows[:, None, None], mask, self.words, self.sigma.device)


@dataclass(frozen=True)
class Strength:
    """`rows` [batch, 1, 1] and the image's `mask` [tokens], from 0 to 1; None is 1 everywhere."""

    rows: Tensor | None
    mask: Tensor | None
    words: int
    device: torch.device

    def of(self, stream: str, tokens: int, factor: float, only: Stream = "both") -> Tensor | float:
        """The factor at every one of `tokens` tokens of a layer of `stream`: a number, or [batch or 1, tokens or 1, 1].

        Of a single block, whose `stream` is "single", `only` the text or the image is poked.
        """
        strength = self.rows
        first = self.words if stream == "single" else 0
        if self.mask is not None:
            placed = self.mask.new_zeros(tokens)
            if stream != "txt":
                shown = self.mask[: max(tokens - first, 0)]
                placed[first : first + len(shown)] = shown
            strength = placed[None, :, None] if strength is None else strength * placed[None, :, None]
        if stream == "single" and only != "both":
            text = torch.arange(tokens, device=self.device) < first
            chosen = (text if only == "txt" else ~text).float()[None, :, None]
            strength = chosen if strength is None else strength * chosen
        return factor if strength is None else 1 + (factor - 1) * strength


@contextmanager
def poking(
    model: nn.Module,
    layout: Layout,
    pokes: Sequence[Poke | BlockPoke],
    moment: Moment,
) -> Iterator[None]:
    """Hooks on `model` (its module names are the checkpoint's) for one call of it, in the order of `pokes`.

    `layout` is the model's own. Inputs of down projections are changed in place, unless gradients are asked for.
    """
    changes: dict[str, list[Any]] = {}
    ends: dict[str, list[Any]] = {}
    for poke in pokes:
        if poke.factor == 1:
            continue
        strength = moment.strength(poke.where)
        if isinstance(poke, Poke):
            for site in layout.sites:
                for change in _of_neurons(poke, site, strength):
                    changes.setdefault(site.down, []).append(change)
        else:
            for path, change, at_end in _of_blocks(poke, layout, strength):
                (ends if at_end else changes).setdefault(path, []).append(change)
    with ExitStack() as hooks:
        if changes or ends:
            hooks.enter_context(force_eager())
        for path, some in changes.items():
            hook = partial(_before, some)
            hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(hook, prepend=True))
        for path, some in ends.items():
            hooks.enter_context(model.get_submodule(path).register_forward_hook(partial(_after, some)))
        yield


@contextmanager
def poked(flux: Any, pokes: Sequence[Poke | BlockPoke]) -> Iterator[None]:
    """Pokes a `Flux` in every call while the `with` lasts; raises `UserError` where MLPs have other widths than the neurons'
    model."""
    for poke in pokes:
        if isinstance(poke, Poke) and not poke.kept:
            require_widths(poke.neurons, flux.layout)
    standing = ExitStack()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("x", "sigma", "context"), args, strict=False)) | kwargs
        moment = Moment.at(flux.layout, given["x"], given["sigma"], given["context"])
        standing.enter_context(poking(flux, flux.layout, pokes, moment))

    with (
        standing,
        flux.register_forward_pre_hook(before, with_kwargs=True),
        flux.register_forward_hook(lambda *_: standing.close(), always_call=True),
    ):
        yield


def read_poke(text: str) -> Poke:
    """FILE:FACTOR, or a FILE alone at its own factor, else -1; raises `UserError` where that is neither."""
    path, _, last = text.rpartition(":")
    try:
        factor = float(last) if path else None
    except ValueError:
        factor = None
        if Path(path).is_file() and not Path(text).is_file():
            raise UserError(f"{text}: expected a factor from -100 to 100 after the file, found '{last}'.") from None
    neurons = Neurons.load(text if factor is None else path)
    if factor is None:
        factor = neurons.own_factor
    if not abs(factor) <= 100:
        raise UserError(f"{text}: expected a factor from -100 to 100.")
    return Poke(neurons, factor)


def require_widths(neurons: Neurons, layout: Layout) -> None:
    """Raises `UserError` where an MLP of `layout` has another width than the neurons' model."""
    widths = {site.name: site.width for site in layout.sites}
    for name in (*neurons.sites, *neurons.directions):
        if widths.get(name) != neurons.widths[name]:
            raise UserError(
                f"The neurons are of another model: {name} has {neurons.widths[name]:,} neurons there and "
                f"{widths.get(name, 'none')} here. Choose those that were found in this model."
            )


def _before(changes: Sequence[Any], module: nn.Module, args: tuple) -> tuple | None:
    given = args[0]
    if given.requires_grad and torch.is_grad_enabled():
        changed = given.clone()
        for change in changes:
            change(changed)
        return (changed, *args[1:])
    for change in changes:
        change(given)
    return None


def _after(changes: Sequence[Any], module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    for change in changes:
        output = change(output)
    return output


def _of_neurons(poke: Poke, site: Site, strength: Strength) -> Iterator[Any]:
    """What a poke does with the input [batch, tokens, ...] of the site's down projection, in place."""
    kept = poke.kept.get(site.name)
    if (own := poke.neurons.sites.get(site.name)) is not None:
        places, known = own.indices, own.measured
        if kept is not None:
            there = torch.isin(places, kept)
            places, known = torch.searchsorted(kept, places[there]), known.part(there)
        if len(places):
            centre, weights = poke.turning(known)
            each = weights if (weights != 1).any() else None
            yield partial(_turn, site, places + site.down_column, centre, each, strength, poke.factor)
    if (along := poke.neurons.directions.get(site.name)) is not None:
        if kept is not None:
            raise UserError(
                f"Directions of {site.name} are of the dense model, and this one is pruned there: poke the dense model, or "
                "poke neurons."
            )
        basis, mean = _spanned(along.vectors, along.measured.mean if poke.about is None else None, poke.about or 0.0)
        yield partial(_turn_along, site, basis, mean, strength, poke.factor)


def _turn(
    site: Site, columns: Tensor, centre: Tensor, weights: Tensor | None, strength: Strength, factor: float, given: Tensor
) -> None:
    places, middle, tokens = columns.to(given.device), centre.to(given.device), given.shape[-2]
    amount = strength.of(site.stream, tokens, factor)
    if weights is not None:
        amount = 1 + (amount - 1) * weights.to(given.device)
    tile = TILE if given.device.type == "cpu" else max(tokens, 1)
    each = isinstance(amount, Tensor) and amount.ndim > 1 and amount.shape[-2] > 1
    amounts = amount.split(tile, -2) if each else repeat(amount)  # type: ignore[union-attr]
    for rows, own in zip(given.split(tile, -2), amounts, strict=False):
        picked = rows.gather(-1, places.expand(*rows.shape[:-1], -1)).float()
        turned = torch.lerp(middle.expand_as(picked), picked, own)
        rows.index_copy_(-1, places, turned.to(rows.dtype))


def _spanned(vectors: Tensor, means: Tensor | None, about: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis [n, width] of the space of `vectors`, and the point in it, along the basis [n], with the given means
    along each of the vectors."""
    directions = unit(vectors).double()
    left, sizes, right = torch.linalg.svd(directions, full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum())
    wanted = torch.full((len(directions),), about, dtype=torch.float64) if means is None else means.double()
    centre = (left.T @ wanted)[:rank] / sizes[:rank]
    return right[:rank].float(), centre.float()


def _turn_along(site: Site, basis: Tensor, centre: Tensor, strength: Strength, factor: float, given: Tensor) -> None:
    own = given[..., site.down_column :]
    axes = basis.to(own.device)
    along = own.float() @ axes.T
    weight = strength.of(site.stream, given.shape[-2], factor)
    change = torch.lerp(centre.to(along).expand_as(along), along, weight) - along
    own.copy_((own.float() + change @ axes).to(own.dtype))


def _of_blocks(poke: BlockPoke, layout: Layout, strength: Strength) -> Iterator[tuple[str, Any, bool]]:
    """Module, what is done there, and whether with its output (else with its input, in place)."""
    for block in poke.blocks:
        if block.kind == "single":
            site = layout.site(block.name)
            weight = partial(strength.of, "single", factor=poke.factor, only=poke.stream)
            if poke.part == "both":
                yield site.down, partial(_scaled, weight), True
            else:  # its bias belongs to both, and stays
                columns = slice(0, site.down_column) if poke.part == "attention" else slice(site.down_column, None)
                yield site.down, partial(_scale, columns, weight), False
            continue
        for stream in ("img", "txt"):
            weight = partial(strength.of, stream, factor=poke.factor)
            parts = {"attention": f"{block.path}.{stream}_attn.proj", "mlp": layout.site(f"double-{stream}-{block.index}").down}
            for part, path in parts.items():
                if poke.stream in (stream, "both") and poke.part in (part, "both"):
                    yield path, partial(_scaled, weight), True


def _scaled(weight: Any, given: Tensor) -> Tensor:
    return (given * weight(given.shape[-2])).to(given.dtype)


def _scale(columns: slice, weight: Any, given: Tensor) -> None:
    own = given[..., columns]
    own.copy_(_scaled(weight, own))
