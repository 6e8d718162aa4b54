"""Sampling token rows of every MLP's input while a FLUX draws, without leaving a trace in it.

    recorder = RowRecorder(layout.sites, store, RowChoice(rows=64), Limit(gigabytes=20))
    with recorder.run() as run:                                      # one sampling run
        for ...:
            with run.watching(model, call):                          # hooks only at the steps that were drawn for it
                model(x, sigma, context, vector)
    run.note                                                         # what was left out, and why

Rows are all that repair and retraining need of a model. Each image gives the same number of rows, at steps drawn at random
(5 % of them, at least one); a run writes them to the store when it ends well, or in between when it holds `SHARD_BYTES` of
them. On a GPU they leave it by asynchronous copies to pinned memory; nothing waits for the device before a shard is
written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Site
from .call import Call
from .hooks import watching_blocks
from .manifest import Limit
from .run import Recorder, Run, StepDraw
from .store import HiddenStates

#: Rows in memory before they are written, in the middle of a run if need be.
SHARD_BYTES = 256_000_000


@dataclass(frozen=True)
class RowChoice(StepDraw):
    """Which rows: `rows` tokens per site, image and step, at `steps` steps of each image (None = 5 %, at least one).

    Only steps whose sigma lies in `sigmas` are drawn. The same seed draws the same steps and tokens.
    """

    rows: int = 64
    steps: int | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        self.check()
        if self.rows < 1:
            raise UserError(f"At least 1 row per image and step is recorded; asked for {self.rows}.")


def estimated_bytes(sites: Sequence[Site], hidden: int, choice: RowChoice, steps: int, images: int) -> int:
    """What `images` images of `steps` steps take on disk at most.

    It is less where an image has fewer tokens than `choice.rows`, or fewer steps within `choice.sigmas` than are asked for,
    which the sampler's schedule alone tells.
    """
    row = sum(2 * (hidden + site.down_column) + 4 + 4 + 4 for site in sites)  # x, attn in bf16; sigma, image, step
    return images * choice.count(steps) * choice.rows * row


class RowRecorder(Recorder):
    """Records rows of `sites` into `store`, over any number of runs, until `limit` says stop (`full`).

    What it thins out is left as many rows as a regression on all that the MLP reads needs.
    """

    choice: RowChoice

    def __init__(self, sites: Sequence[Site], store: HiddenStates, choice: RowChoice | None = None, limit: Limit | None = None):
        self.sites = tuple(sites)
        self.store = store
        self.choice = choice or RowChoice()
        self.limit = limit and replace(limit, least={site.name: site.regressors for site in sites})

    def begin(self) -> RowRun:
        """A run of the sampler: `finish` it when it ended well."""
        return RowRun(self)


class RowRun(Run):
    """One sampling run (see `Run`)."""

    def __init__(self, recorder: RowRecorder):
        super().__init__(recorder, "rows")
        self.recorder = recorder
        self.halvings = recorder.store.manifest.halvings
        self.rows = recorder.choice.rows >> self.halvings
        self._pieces: list[_Piece] = []
        self._events: list[torch.cuda.Event] = []

    @contextmanager
    def watching(self, model: nn.Module, call: Call) -> Iterator[None]:
        """Hooks on `model` for one call of it, if its step is one of `steps`; tokens outside `call.mask` are not drawn."""
        if not self.wants(call) or not self.rows:
            yield
            return
        drawn = _Draw(self, call)
        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            for site in self.recorder.sites:
                hooks.callback(model.get_submodule(site.up).register_forward_pre_hook(drawn.hook(site, "x")).remove)
                if site.down_column:
                    hooks.callback(model.get_submodule(site.down).register_forward_pre_hook(drawn.hook(site, "attn")).remove)
            yield
        if not self.is_whole(ran):
            return
        self._pieces += drawn.pieces
        if drawn.device is not None and drawn.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(drawn.device))
            self._events.append(event)
        if sum(piece.values.numel() for piece in self._pieces) * 2 >= SHARD_BYTES:
            self.flush()

    def finish(self) -> None:
        """Writes the rest, and that these images were recorded."""
        self.flush()
        if self.drawing is not None and not self._wrong:
            self.recorder.store.note_recorded(self.drawing, "rows")

    def flush(self) -> None:
        """Writes what was recorded so far as one shard; nothing, and nothing more of this run, where a row is not finite."""
        for event in self._events:
            event.synchronize()
        found: dict[str, list[Tensor]] = {}
        for piece in self._pieces:
            keep = piece.drawn
            count = int(keep.sum())
            found.setdefault(f"{piece.site}.{piece.part}", []).append(piece.values[keep])
            if piece.part == "x":
                found.setdefault(f"{piece.site}.sigma", []).append(torch.full((count,), piece.sigma))
                found.setdefault(f"{piece.site}.image", []).append(piece.image[keep])
                found.setdefault(f"{piece.site}.step", []).append(torch.full((count,), piece.step, dtype=torch.int32))
        self._pieces, self._events = [], []
        recorder = self.recorder
        tensors = {key: torch.cat(parts) for key, parts in found.items()}
        if not self.all_finite(tensors.items()):
            self.steps = frozenset()
        elif tensors and not recorder.store.append("rows", tensors, recorder.limit, self.halvings):
            recorder.full = True
            self.steps = frozenset()


@dataclass
class _Piece:
    """What one hook drew: values [rows, hidden] bf16, which of them count, and the image of each."""

    site: str
    part: str
    step: int
    sigma: float
    values: Tensor
    drawn: Tensor
    image: Tensor


class _Draw:
    """What is drawn of one call of the model: all sites of a stream give the same tokens."""

    def __init__(self, run: RowRun, call: Call):
        assert run.drawing is not None
        self.run, self.call, self.first = run, call, run.drawing.first
        self.pieces: list[_Piece] = []
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
            rows = self.call.part(values).gather(1, tokens[..., None].expand(-1, -1, values.shape[-1])).flatten(0, 1).bfloat16()
            step = self.call.step
            self.pieces.append(_Piece(site.name, part, step, self.call.sigma_now, to_host(rows), drawn, image))

        return record

    def _draw(self, stream: str, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [images, rows] on the device; which of them count, and their image's number [images * rows], on the CPU."""
        run, call = self.run, self.call
        seed = hashlib.sha256(f"{run.recorder.choice.seed} {run.key} {call.step} {stream}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        order = torch.rand(batch, tokens, generator=generator).to(device)
        allowed = call.mask.rows(stream, batch, tokens)
        if allowed is not None:
            order = order.masked_fill(~allowed.view(batch, tokens), -1.0)
        best, chosen = call.part(order).topk(min(run.rows, tokens), dim=1)
        image = (torch.tensor(call.read, dtype=torch.int32) + self.first)[:, None].expand(-1, best.shape[1]).flatten()
        return chosen, to_host((best >= 0).flatten()), image


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory; from a CUDA device it is under way, to be used after an event that is recorded later."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
