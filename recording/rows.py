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

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..flux.layout import Layout, Site
from ..flux.vectors import VECTOR
from .call import Call
from .manifest import Limit
from .run import Recorder, Run, StepDraw
from .store import HiddenStates

#: Rows in memory before they are written, in the middle of a run if need be.
SHARD_BYTES = 256_000_000
#: Bytes that a row has of its sigma, image and step; all else is bf16.
KNOWN = 4 + 4 + 4


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
        super().__post_init__()
        if self.rows < 1:
            raise UserError(f"At least 1 row per image and step is recorded; asked for {self.rows}.")


def estimated_bytes(layout: Layout, choice: RowChoice, steps: int, images: int) -> int:
    """What `images` images of `steps` steps take on disk at most.

    It is less where an image has fewer tokens than `choice.rows`, or fewer steps within `choice.sigmas` than are asked for,
    which the sampler's schedule alone tells.
    """
    row = sum(row_bytes(layout, site) for site in layout.sites)
    return images * choice.count(steps) * (choice.rows * row + 2 * (layout.vector or 0) + KNOWN)


def row_bytes(layout: Layout, site: Site) -> int:
    """What one row of a site takes on disk."""
    return 2 * (layout.hidden + site.down_column) + KNOWN


class RowRecorder(Recorder):
    """Records rows of `sites`; what it thins out is left as many rows as a regression on all that the MLP reads needs.

    Rows in memory are written before they exceed `shard_bytes`; where that is infinite, a run leaves all of its rows or none.
    """

    kind = "rows"
    choice: RowChoice

    def __init__(
        self,
        sites: Sequence[Site],
        store: HiddenStates,
        choice: RowChoice,
        limit: Limit | None = None,
        shard_bytes: float = SHARD_BYTES,
    ):
        super().__init__(store, choice, limit and replace(limit, least={site.name: site.regressors for site in sites}))
        self.sites, self.shard_bytes = tuple(sites), shard_bytes

    def begin(self) -> RowRun:
        return RowRun(self)


@dataclass
class _Drawn:
    """Tokens of one call that all sites of a stream give, or its pooled texts.

    `tokens` [images, rows], or all texts, on the device; on the CPU, of each of these rows, whether it counts, and its image's
    number.
    """

    tokens: Tensor
    counts: Tensor
    image: Tensor
    step: int
    sigma: float


class RowRun(Run):
    recorder: RowRecorder

    def __init__(self, recorder: RowRecorder):
        super().__init__(recorder)
        self.halvings = recorder.store.manifest.halvings
        self.rows = recorder.choice.rows >> self.halvings
        #: Site, "x" or "attn", and its values [images * rows, hidden] bf16 of what was drawn.
        self._pieces: list[tuple[str, str, Tensor, _Drawn]] = []
        self._events: list[torch.cuda.Event] = []

    def wants(self, call: Call) -> bool:
        return super().wants(call) and self.rows > 0

    def hook(self, hooks: ExitStack, model: nn.Module, call: Call) -> Callable[[], None]:
        drawn: dict[str, _Drawn] = {}
        pieces: list[tuple[str, str, Tensor, _Drawn]] = []

        def recording(site: Site, part: str) -> Callable[..., None]:
            @torch.no_grad()
            def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                values = inputs[0] if part == "x" else inputs[0][..., : site.down_column]
                if site.stream not in drawn:
                    drawn[site.stream] = self._draw(call, site.stream, values)
                chosen = drawn[site.stream]
                rows = call.part(values).gather(1, chosen.tokens[..., None].expand(-1, -1, values.shape[-1]))
                pieces.append((site.name, part, to_host(rows.flatten(0, 1).bfloat16()), chosen))

            return record

        def record_vector(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            pooled = call.part(inputs[0])
            image = self.numbers(call).int()
            drawn[VECTOR] = _Drawn(pooled, torch.ones_like(image, dtype=torch.bool), image, call.step, call.sigma_now)
            pieces.append((VECTOR, "x", to_host(pooled.bfloat16()), drawn[VECTOR]))

        if isinstance(embedder := getattr(model, VECTOR, None), nn.Module):
            hooks.enter_context(embedder.register_forward_pre_hook(record_vector))
        for site in self.recorder.sites:
            hooks.enter_context(model.get_submodule(site.up).register_forward_pre_hook(recording(site, "x")))
            if site.down_column:
                hooks.enter_context(model.get_submodule(site.down).register_forward_pre_hook(recording(site, "attn")))

        def take() -> None:
            self._pieces += pieces
            for device in {chosen.tokens.device for chosen in drawn.values()}:
                if device.type == "cuda":
                    self._events.append(torch.cuda.current_stream(device).record_event())
            if sum(values.numel() for _, _, values, _ in self._pieces) * 2 >= self.recorder.shard_bytes:
                self.finish()

        return take

    def _draw(self, call: Call, stream: str, values: Tensor) -> _Drawn:
        """Tokens of `values` [batch, tokens, ...] at random; those outside `call.mask` do not count."""
        batch, tokens = values.shape[:2]
        order = torch.rand(batch, tokens, generator=self.generator(call, stream)).to(values.device)
        allowed = call.mask.rows(stream, batch, tokens)
        if allowed is not None:
            order = order.masked_fill(~allowed.view(batch, tokens), -1.0)
        best, chosen = call.part(order).topk(min(self.rows, tokens), dim=1)
        image = self.numbers(call).int().repeat_interleave(best.shape[1])
        return _Drawn(chosen, to_host((best >= 0).flatten()), image, call.step, call.sigma_now)

    def finish(self) -> None:
        """Writes what was recorded so far as one shard; where a row is not finite, nothing, and nothing more of this run."""
        for event in self._events:
            event.synchronize()
        found: defaultdict[str, list[Tensor]] = defaultdict(list)
        for site, part, values, drawn in self._pieces:
            found[f"{site}.{part}"].append(values[drawn.counts])
            if part == "x":
                image = drawn.image[drawn.counts]
                found[f"{site}.image"].append(image)
                found[f"{site}.sigma"].append(torch.full((len(image),), drawn.sigma))
                found[f"{site}.step"].append(torch.full_like(image, drawn.step))
        self._pieces, self._events = [], []
        if found:
            self.write({key: torch.cat(parts) for key, parts in found.items()}, self.halvings)
        if self._wrong:
            self.steps = frozenset()


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory; from a CUDA device it is under way, to be used after an event that is recorded later."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
