"""Watching every MLP of a FLUX while it runs, without leaving a trace in it.

    recorder = InternalsRecorder(layout.sites)
    with recorder.watching(model):                   # any module with the checkpoint's module names
        model(x, sigma, context, vector)
    recorder.results()                               # {"double-img-0": SiteInternals(...), ...}

Hooks stand for the length of the `with` and are removed whatever happens in it. What the model computes is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..flux.layout import Site
from .call import TokenMask
from .hooks import hooks_heard
from .statistics import NeuronStatistics, SiteInternals


class InternalsRecorder:
    """Accumulates the statistics of `sites` over any number of calls, on whichever devices the model runs."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = tuple(sites)
        self._statistics: dict[tuple[str, torch.device], NeuronStatistics] = {}

    @contextmanager
    def watching(self, model: nn.Module, mask: TokenMask | None = None) -> Iterator[None]:
        """Hooks on `model` while the `with` lasts; tokens outside `mask` do not count."""
        mask = mask or TokenMask()
        with ExitStack() as hooks:
            hooks.enter_context(hooks_heard())
            for site in self.sites:
                gates: list[Tensor] = []
                if site.gated:
                    act = model.get_submodule(site.act)
                    hooks.callback(act.register_forward_pre_hook(_keep_gate(gates)).remove)
                down = model.get_submodule(site.down)
                hooks.callback(down.register_forward_pre_hook(self._count(site, mask, gates)).remove)
            yield

    def _count(self, site: Site, mask: TokenMask, gates: list[Tensor]):
        @torch.no_grad()
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            h = inputs[0][..., site.down_column :]
            keep = mask.rows(site.stream, h.shape[0], h.shape[1])
            statistics = self._statistics.get((site.name, h.device))
            if statistics is None:
                statistics = self._statistics[site.name, h.device] = NeuronStatistics(h.shape[-1], h.device)
            gate = gates.pop().flatten(0, -2) if gates else None
            statistics.add(h.flatten(0, -2), gate, keep)

        return hook

    def results(self) -> dict[str, SiteInternals]:
        """What was recorded, by site, on the CPU; empty where nothing ran."""
        found: dict[str, SiteInternals] = {}
        for (name, _), statistics in self._statistics.items():
            part = statistics.result()
            found[name] = part if name not in found else added(found[name], part)
        return found


def added(a: SiteInternals, b: SiteInternals) -> SiteInternals:
    """Both recordings of one MLP together."""
    return SiteInternals(a.fires + b.fires, a.tokens + b.tokens, a.sum + b.sum, a.sum_sq + b.sum_sq)


def _keep_gate(gates: list[Tensor]):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gates[:] = [inputs[0].chunk(2, dim=-1)[0]]

    return hook
