"""Watching every MLP of a FLUX while it runs, without leaving a trace in it.

    recorder = InternalsRecorder(layout.sites)
    with recorder.watching(model, call):             # any module with the checkpoint's module names
        model(x, sigma, context, vector)
    recorder.results()                               # {"double-img-0": SiteInternals(...), ...}
    recorder.note                                    # what was left out, and why

Hooks stand for the length of the `with` and are removed whatever happens in it. What the model computes is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..flux.layout import Site
from .call import Call, TokenMask
from .hooks import left_out, watching_blocks
from .statistics import NeuronStatistics, SiteInternals, Sums


class InternalsRecorder:
    """Accumulates the statistics of `sites` over any number of calls, on whichever devices the model runs.

    `calls` are those that were recorded. Calls in which blocks were skipped are left out, and so is everything where an
    activation was not finite; `note` says so.
    """

    def __init__(self, sites: Sequence[Site]):
        self.sites = tuple(sites)
        self.calls = 0
        self._skipping = 0
        self._not_finite: dict[str, int] = {}
        self._statistics: dict[tuple[str, torch.device], NeuronStatistics] = {}

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
                    hooks.callback(act.register_forward_pre_hook(_keep_gate(gates)).remove)
                down = model.get_submodule(site.down)
                hooks.callback(down.register_forward_pre_hook(_measure(site, call.mask, gates, seen)).remove)
            yield
        if not ran.whole:
            self._skipping += bool(ran.blocks)
            return
        self.calls += 1
        for name, sums in seen:
            key = name, sums.fires.device
            if key not in self._statistics:
                self._statistics[key] = NeuronStatistics(len(sums.fires), sums.fires.device)
            self._statistics[key].add(sums)

    def results(self) -> dict[str, SiteInternals]:
        """What was recorded, by site, on the CPU; empty where nothing ran, or not all of it was finite (see `note`)."""
        found: dict[str, SiteInternals] = {}
        for (name, _), statistics in self._statistics.items():
            part = statistics.result()
            found[name] = part if name not in found else merge(found[name], part)
        wrong = {name: int((~(site.sum.isfinite() & site.sum_sq.isfinite())).sum()) for name, site in found.items()}
        self._not_finite = {name: count for name, count in wrong.items() if count}
        return {} if self._not_finite else found

    @property
    def note(self) -> str:
        """What `results` leaves out, and why; empty where it is everything."""
        said = [left_out(self._skipping)] if self._skipping else []
        if self._not_finite:
            first, neurons = next(iter(self._not_finite.items()))
            said.append(
                f"The activations of {len(self._not_finite)} of {len(self.sites)} MLPs are not finite (first {first}: "
                f"{neurons} neurons): this run is left out of the recording. Load the model in bfloat16 or float32."
            )
        return " ".join(said)


def merge(a: SiteInternals, b: SiteInternals) -> SiteInternals:
    """Both recordings of one MLP together."""
    return SiteInternals(a.fires + b.fires, a.tokens + b.tokens, a.sum + b.sum, a.sum_sq + b.sum_sq)


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
