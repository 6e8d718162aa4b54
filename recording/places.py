"""Where every MLP neuron of a FLUX is strongest while it draws, without leaving a trace in it.

recorder = PlacesRecorder(layout, layout.sites)
with recorder.watching(model, call):             # any module with the checkpoint's module names
    model(x, sigma, context, vector)
Atlas.new(layout.family, fingerprint, recorder.results(), recorder.images)
recorder.note                                    # what was left out, and why
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flux.layout import Layout, Site
from .atlas import MAP, AtlasImage, Places
from .call import Call
from .hooks import left_out, watching_blocks

#: Tokens that are looked at together on a CPU.
TILE = 32


@dataclass
class _Strongest:
    """Of each image of a run and each neuron, all [images, width]: the strongest activation so far, its token and step, and the
    map of that step [images, 64, width]; whether all numbers were finite, []."""

    value: Tensor
    token: Tensor
    step: Tensor
    map: Tensor | None
    finite: Tensor


class PlacesRecorder:
    """The strongest places of the neurons of `sites` in the images of one run, on whichever device the model runs.

    `images` are known from the first call on. With `maps`, it is also kept how strong the neuron was over the whole image
    there: 64 bytes a place, and one more look at the activations. Calls in which blocks were skipped are left out, and the
    whole run where an activation was not finite; `note` says so.
    """

    def __init__(self, layout: Layout, sites: Sequence[Site], maps: bool = False):
        self.layout, self.sites, self.maps = layout, tuple(sites), maps
        self.images: tuple[AtlasImage, ...] = ()
        self._skipping, self._wrong = 0, ""
        self._found: dict[str, _Strongest] = {}

    @contextmanager
    def watching(self, model: nn.Module, call: Call) -> Iterator[None]:
        """Hooks on `model` for one call of it; tokens outside `call.mask` do not count."""
        if not (call.rows and self.sites):
            yield
            return
        self.images = self.images or _images(call, self.layout.patch)
        seen: list[tuple[str, _Strongest]] = []
        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            for site in self.sites:
                down = model.get_submodule(site.down)
                hooks.enter_context(down.register_forward_pre_hook(self._look(site, call, seen)))
            yield
        self._skipping += ran.skipped
        if ran.whole:
            for name, found in seen:
                self._keep(name, found, call.read)

    def _look(self, site: Site, call: Call, seen: list[tuple[str, _Strongest]]):
        @torch.no_grad()
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            whole = inputs[0]
            keep = call.mask.rows(site.stream, *whole.shape[:2])
            counts = None if keep is None else call.part(keep.view(whole.shape[:2]))
            h = call.part(whole)[..., site.down_column :]
            value, token = strongest(h, counts)
            found = _Strongest(value, token, torch.full_like(token, call.step), None, value.isfinite().all())
            if self.maps:
                found.map = self._map(site, call, h, value)
            seen.append((site.name, found))

        return hook

    def _map(self, site: Site, call: Call, h: Tensor, value: Tensor) -> Tensor:
        """How strong each neuron is over the image [images, 64, width], cell by cell; nothing in the text's own MLPs."""
        image, width = self.images[0], value.shape[1]
        words, size = (image.words if site.stream == "single" else 0), image.rows * image.columns
        if site.stream == "txt" or not size:
            return torch.zeros(len(h), MAP**2, width, dtype=torch.uint8, device=h.device)
        over = h[:, words : words + size].unflatten(1, (image.rows, image.columns))
        cells = [
            over[:, top:bottom, left:right].abs().float().amax((1, 2))
            for top, bottom in _cells(image.rows)
            for left, right in _cells(image.columns)
        ]
        unit = value.abs().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return (torch.stack(cells, 1) / unit * 255).round_().clamp_(0, 255).byte()

    def _keep(self, name: str, found: _Strongest, images: Sequence[int]) -> None:
        """Takes what is stronger than before; `images` are those of its rows."""
        if name not in self._found:
            count, width = len(self.images), found.value.shape[1]
            self._found[name] = _Strongest(
                found.value.new_zeros(count, width), found.token.new_zeros(count, width), found.step.new_zeros(count, width),
                None if found.map is None else found.map.new_zeros(count, *found.map.shape[1:]), found.finite,
            )  # fmt: skip
        known, rows = self._found[name], torch.tensor(images, device=found.value.device)
        better = found.value.abs() > known.value[rows].abs()
        known.finite = known.finite & found.finite.to(known.finite.device)
        for part in ("value", "token", "step"):
            getattr(known, part)[rows] = getattr(found, part).where(better, getattr(known, part)[rows])
        if known.map is not None and found.map is not None:
            known.map[rows] = found.map.where(better[:, None], known.map[rows])

    def results(self) -> dict[str, Places]:
        """What was recorded, by site, on the CPU; empty where nothing ran, or not all of it was finite (see `note`)."""
        self._wrong = next((name for name, found in self._found.items() if not found.finite), "")
        return {} if self._wrong else {name: self._places(found) for name, found in self._found.items()}

    def _places(self, found: _Strongest) -> Places:
        value = found.value.T.float().cpu()
        number = torch.arange(len(self.images), dtype=torch.int32).expand(len(value), -1)
        return Places(
            value=value,
            image=number.masked_fill(value == 0, -1),  # where no token of a text counts
            token=found.token.T.int().cpu(),
            step=found.step.T.short().cpu(),
            map=None if found.map is None else found.map.permute(2, 0, 1).unflatten(2, (MAP, MAP)).cpu(),
        )

    @property
    def note(self) -> str:
        """What `results` leaves out, and why; empty where it is everything."""
        said = [left_out(self._skipping)]
        if self._wrong:
            said.append(
                f"The activations of {self._wrong} are not finite: this run is left out of the atlas. Load the model in "
                "bfloat16 or float32."
            )
        return " ".join(filter(None, said))


def strongest(h: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The activation that is farthest from zero over the tokens of h [images, tokens, width], and its token, [images, width].

    `counts` [images, tokens]: which tokens do; the value is 0 where none does. In one pass: tile by tile on a CPU, where a tile
    stays in the cache and the token is looked up in the best one.
    """
    images, tokens, width = h.shape
    tile = tokens if h.is_cuda else min(TILE, tokens)
    best = torch.full((images, width), -1.0, device=h.device)
    first = torch.zeros(images, width, dtype=torch.int64, device=h.device)
    room = torch.empty(images, tile, width, device=h.device)
    for start in range(0, tokens, tile):
        rows = h[:, start : start + tile]
        now = room[:, : rows.shape[1]].copy_(rows).abs_()
        if counts is not None:
            now.masked_fill_(~counts[:, start : start + tile, None], -1)
        now = now.amax(1)
        better = ~(now <= best)  # what is not a number is the strongest, to be found
        best = torch.where(better, now, best)
        first.masked_fill_(better, start)
    within = (first[:, None] + torch.arange(tile, device=h.device)[None, :, None]).clamp(max=tokens - 1)
    found = h.gather(1, within).float().abs_()
    if counts is not None:
        found.masked_fill_(~counts[..., None].expand_as(h).gather(1, within), -1)
    token = within.gather(1, found.argmax(1, keepdim=True))
    return h.gather(1, token).squeeze(1).float().masked_fill(best < 0, 0), token.squeeze(1)


def _cells(side: int) -> list[tuple[int, int]]:
    """From where to where the cells of a map go over so many rows or columns of tokens; those of few tokens share them."""
    return [(cell * side // MAP, -(-(cell + 1) * side // MAP)) for cell in range(MAP)]


def _images(call: Call, patch: int) -> tuple[AtlasImage, ...]:
    """The images of a run, by its first call; each is told from others by its own noise and text, whatever it is drawn with."""
    rows, columns = (-(-side // patch) for side in call.x.shape[-2:])
    words = 0 if call.context is None else call.context.shape[1]
    first = {image: row for row, image in reversed([*enumerate(call.images)]) if image is not None}
    found = []
    for image in range(call.count):
        told = [] if call.context is None else [call.context[first[image]]]
        parts = [part.float().cpu().numpy().tobytes() for part in (call.x[first[image]], *told)]
        key = hashlib.sha256(b"".join([*parts, repr(call.sigmas).encode()])).hexdigest()[:16]
        found.append(AtlasImage(key, rows, columns, words, *call.asked(image)))
    return tuple(found)
