"""Watching every MLP of a FLUX while it runs, without leaving a trace in it.

recorder = InternalsRecorder(layout.sites)
with recorder.watching(model, call):             # any module with the checkpoint's module names
    model(x, sigma, context, vector)
recorder.results()                               # {"double-img-0": SiteInternals(...), ...}
recorder.note                                    # what was left out, and why
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..flux.layout import Site
from .call import Call, TokenMask
from .hooks import left_out, watching_blocks
from .statistics import SiteInternals, Sums


class InternalsRecorder:
    """Accumulates the statistics of `sites` over any number of calls, on whichever devices the model runs.

    `calls` are those that were recorded, `padded` whether padding may be among the words of any. Calls in which blocks were
    skipped are left out, and so is everything where an activation was not finite; `note` says so.
    """

    def __init__(self, sites: Sequence[Site]):
        self.sites = tuple(sites)
        self.calls = 0
        self.padded = False
        self._skipping = 0
        self._not_finite: dict[str, int] = {}
        self._sums: dict[tuple[str, torch.device], Sums] = {}

    @contextmanager
    def watching(self, model: nn.Module, call: Call) -> Iterator[None]:
        """Hooks on `model` for one call of it; tokens outside `call.mask` do not count."""
        seen: list[tuple[str, Sums]] = []
        with ExitStack() as hooks:
            ran = hooks.enter_context(watching_blocks(model))
            for site in self.sites:
                gates: list[Tensor] = []
                if site.gated:
                    act = model.get_submodule(site.act)
                    hooks.enter_context(act.register_forward_pre_hook(_keep_gate(gates)))
                down = model.get_submodule(site.down)
                hooks.enter_context(down.register_forward_pre_hook(_measure(site, call.mask, gates, seen)))
            yield
        self._skipping += ran.skipped
        if not ran.whole:
            return
        self.calls += 1
        self.padded |= call.padded
        for name, sums in seen:
            key = name, sums.fires.device
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def results(self) -> dict[str, SiteInternals]:
        """What was recorded, by site, on the CPU; empty where nothing ran, or not all of it was finite (see `note`)."""
        found: dict[str, SiteInternals] = {}
        for (name, _), sums in self._sums.items():
            part = sums.result()
            found[name] = found[name] + part if name in found else part
        wrong = {name: int((~(site.sum.isfinite() & site.sum_sq.isfinite())).sum()) for name, site in found.items()}
        self._not_finite = {name: count for name, count in wrong.items() if count}
        return {} if self._not_finite else found

    @property
    def note(self) -> str:
        """What `results` leaves out, and why; empty where it is everything."""
        said = [left_out(self._skipping)]
        if self._not_finite:
            first, neurons = next(iter(self._not_finite.items()))
            said.append(
                f"The activations of {len(self._not_finite)} of {len(self.sites)} MLPs are not finite (first {first}: "
                f"{neurons} neurons): this run is left out of the recording. Load the model in bfloat16 or float32."
            )
        return " ".join(filter(None, said))


def _measure(site: Site, mask: TokenMask, gates: list[Tensor], seen: list[tuple[str, Sums]]):
    @torch.no_grad()
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        h = inputs[0][..., site.down_column :]
        keep = mask.rows(site.stream, h.shape[0], h.shape[1])
        gate = gates.pop().flatten(0, -2) if gates else None
        seen.append((site.name, Sums.of(h.flatten(0, -2), gate, keep)))

    return hook


def _keep_gate(gates: list[Tensor]):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gates[:] = [inputs[0].chunk(2, dim=-1)[0]]

    return hook
