"""Sampling token rows of every MLP's input while a FLUX draws, without leaving a trace in it.

    recorder = RowRecorder(layout.sites, store, RowChoice(rows=64), Limit(gigabytes=20))
    with recorder.run(sigmas, images=4) as run:                      # one sampling run of four images
        for step in range(20):
            with run.watching(model, step):                          # hooks only at the steps that were drawn for it
                model(x, sigma, context, vector)

Rows are all that repair and retraining need of a model. Each image gives the same number of rows, at steps drawn at random
(5 % of them, at least one); a run writes them to the store when it ends well, or in between when it holds `SHARD_BYTES` of
them. On a GPU they leave it by asynchronous copies to pinned memory; nothing waits for the device before a shard is
written.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Site
from .call import TokenMask
from .hooks import hooks_heard
from .store import Drawing, HiddenStates, Limit

#: Rows in memory before they are written, in the middle of a run if need be.
SHARD_BYTES = 256_000_000
#: Share of an image's steps that is recorded where nothing else is asked for.
STEP_SHARE = 0.05


@dataclass(frozen=True)
class RowChoice:
    """Which rows: `rows` tokens per site, image and step, at `steps` steps of each image (None = 5 %, at least one).

    Only steps whose sigma lies in `sigmas` are drawn. The same seed draws the same steps and tokens.
    """

    rows: int = 64
    steps: int | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.steps is not None and self.steps < 1):
            raise UserError(f"At least 1 row and 1 step per image are recorded; asked for {self.rows} and {self.steps}.")
        if self.sigmas[0] > self.sigmas[1]:
            raise UserError(f"A sigma range runs from low to high, within 0 and 1; found {self.sigmas[0]} to {self.sigmas[1]}.")

    def drawn_steps(self, sigmas: Sequence[float], lot: str) -> frozenset[int]:
        """Steps to record of a `Drawing` with that lot; `sigmas` has one number more than there are steps."""
        return draw_steps(sigmas, lot, self.steps, self.sigmas, self.seed)


def draw_steps(sigmas: Sequence[float], lot: str, steps: int | None, within: tuple[float, float], seed: int) -> frozenset[int]:
    """`steps` (None = 5 %, at least one) steps whose sigma lies `within` a range; the same for the same seed and lot."""
    low, high = within
    known = [step for step, sigma in enumerate(sigmas[:-1]) if low <= sigma <= high]
    count = min(len(known), steps if steps is not None else max(1, round(STEP_SHARE * (len(sigmas) - 1))))
    return frozenset(random.Random(f"{seed} {lot}").sample(known, count))


def estimated_bytes(sites: Sequence[Site], hidden: int, choice: RowChoice, steps: int, images: int) -> int:
    """What `images` images of `steps` steps take on disk at most: fewer where an image has fewer tokens than `choice.rows`."""
    drawn = len(choice.drawn_steps([1.0] * (steps + 1), "")) if choice.sigmas[1] >= 1 else choice.steps or 1
    row = sum(2 * (hidden + site.down_column) + 4 + 4 + 4 for site in sites)  # x, attn in bf16; sigma, image, step
    return images * drawn * choice.rows * row


class RowRecorder:
    """Records rows of `sites` into `store`, over any number of runs, until `limit` says stop (`full`).

    What it thins out is left as many rows as a regression on all that the MLP reads needs.
    """

    def __init__(self, sites: Sequence[Site], store: HiddenStates, choice: RowChoice | None = None, limit: Limit | None = None):
        self.sites = tuple(sites)
        self.store = store
        self.choice = choice or RowChoice()
        self.limit = limit and replace(limit, least={site.name: site.regressors for site in sites})
        self.full = False

    @contextmanager
    def run(self, sigmas: Sequence[float] | Tensor, images: int = 1, what: str | None = None) -> Iterator[RowRun]:
        """One sampling run of `images` images along `sigmas` (all of them); written when it ends well.

        `what` tells these images from others: the same ones keep their numbers when they are recorded again.
        """
        run = self.begin(sigmas, images, what)
        yield run
        run.finish()

    def begin(self, sigmas: Sequence[float] | Tensor, images: int = 1, what: str | None = None) -> RowRun:
        """As `run`, where the end is known elsewhere: `finish` it when it ended well."""
        levels = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
        return RowRun(self, levels, self.store.numbered(images, what))


class RowRun:
    """One sampling run; `steps` are those that are recorded."""

    def __init__(self, recorder: RowRecorder, sigmas: list[float], drawing: Drawing):
        self.recorder = recorder
        self.sigmas = sigmas
        self.drawing = drawing
        self.halvings = recorder.store.manifest.halvings
        self.rows = recorder.choice.rows >> self.halvings
        idle = recorder.full or self.rows == 0
        self.steps = frozenset() if idle else recorder.choice.drawn_steps(sigmas, drawing.lot)
        self._pieces: list[_Piece] = []
        self._events: list[torch.cuda.Event] = []

    @contextmanager
    def watching(
        self, model: nn.Module, step: int, mask: TokenMask | None = None, images: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Hooks on `model` while the `with` lasts, if `step` is one of `steps`.

        Args:
            mask: tokens that may be drawn.
            images: which image of the run each row of the batch belongs to; default 0, 1, 2, …
        """
        if step not in self.steps:
            yield
            return
        call = _Call(self, step, mask or TokenMask(), images)
        with ExitStack() as hooks:
            hooks.enter_context(hooks_heard())
            for site in self.recorder.sites:
                hooks.callback(model.get_submodule(site.up).register_forward_pre_hook(call.hook(site, "x")).remove)
                if site.down_column:
                    hooks.callback(model.get_submodule(site.down).register_forward_pre_hook(call.hook(site, "attn")).remove)
            yield
        if call.device is not None and call.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(call.device))
            self._events.append(event)
        if sum(piece.values.numel() for piece in self._pieces) * 2 >= SHARD_BYTES:
            self.flush()

    def finish(self) -> None:
        """Writes the rest, and takes down that these images were recorded."""
        self.flush()
        self.recorder.store.recorded(self.drawing)

    def flush(self) -> None:
        """Writes what was recorded so far as one shard."""
        for event in self._events:
            event.synchronize()
        found: dict[str, list[Tensor]] = {}
        for piece in self._pieces:
            keep = piece.drawn
            found.setdefault(f"{piece.site}.{piece.part}", []).append(piece.values[keep])
            if piece.part == "x":
                count = int(keep.sum())
                sigma = torch.full((count,), self.sigmas[piece.step])
                found.setdefault(f"{piece.site}.sigma", []).append(sigma)
                found.setdefault(f"{piece.site}.image", []).append(piece.image[keep])
                found.setdefault(f"{piece.site}.step", []).append(torch.full((count,), piece.step, dtype=torch.int32))
        self._pieces, self._events = [], []
        recorder = self.recorder
        tensors = {key: torch.cat(parts) for key, parts in found.items()}
        if tensors and not recorder.store.append("rows", tensors, recorder.limit, self.halvings):
            recorder.full = True
            self.steps = frozenset()


@dataclass
class _Piece:
    """What one hook drew: values [rows, hidden] bf16, which of them count, and the image of each."""

    site: str
    part: str
    step: int
    values: Tensor
    drawn: Tensor
    image: Tensor


class _Call:
    """One call of the model: all sites of a stream give the same tokens."""

    def __init__(self, run: RowRun, step: int, mask: TokenMask, images: Sequence[int] | None):
        self.run, self.step, self.mask, self.images = run, step, mask, images
        self.device: torch.device | None = None
        self._drawn: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def hook(self, site: Site, part: str):
        @torch.no_grad()
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0] if part == "x" else inputs[0][..., : site.down_column]
            self.device = values.device
            if site.stream not in self._drawn:
                self._drawn[site.stream] = self._draw(site.stream, values.shape[0], values.shape[1], values.device)
            tokens, drawn, image = self._drawn[site.stream]
            rows = values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1])).flatten(0, 1).bfloat16()
            self.run._pieces.append(_Piece(site.name, part, self.step, to_host(rows), drawn, image))

        return record

    def _draw(self, stream: str, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [batch, rows] on the device; which of them count, and their image's number [batch · rows], on the CPU."""
        run = self.run
        seed = hashlib.sha256(f"{run.recorder.choice.seed} {run.drawing.lot} {self.step} {stream}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7]))
        lot = torch.rand(batch, tokens, generator=generator).to(device)
        allowed = self.mask.rows(stream, batch, tokens)
        if allowed is not None:
            lot = lot.masked_fill(~allowed.view(batch, tokens), -1.0)
        best, chosen = lot.topk(min(run.rows, tokens), dim=1)
        places = list(self.images) if self.images is not None else list(range(batch))
        image = (torch.tensor(places, dtype=torch.int32) + run.drawing.first)[:, None].expand(-1, best.shape[1]).flatten()
        return chosen, to_host((best >= 0).flatten()), image


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory; from a CUDA device it is under way, to be used after an event that is recorded later."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
