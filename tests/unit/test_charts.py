"""What is drawn on nodes, as data."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from flux_poke.analysis.charts import internals_map
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.pruning.budget import BudgetCurve, Step
from flux_poke.recording.internals import Internals
from flux_poke.recording.statistics import SiteInternals

#: Of what a node sends to the page and ComfyUI keeps in its history.
MOST_BYTES = 100_000


def recorded(widths: dict[str, int]) -> Internals:
    generator, sites = torch.Generator().manual_seed(3), {}
    for name, width in widths.items():
        fires, nothing = torch.randint(0, 1001, (width,), generator=generator), torch.zeros(width, dtype=torch.float64)
        sites[name] = SiteInternals(fires, 1000, nothing, nothing)
    return Internals.new("flux1", Fingerprint("shapes", (0.5,), (2.0**-9,)), sites, steps=20)


def numbers(text: str, columns: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(-1, columns)


def test_the_map_of_internals_names_each_neuron_with_its_rate_the_most_active_first():
    internals = recorded({"double-img-0": 256, "single-0": 100})
    chart = internals_map(internals)
    rates, neurons = (numbers(chart[key], chart["columns"]) for key in ("values", "neurons"))
    assert chart["names"] == ["double-img-0", "single-0"]
    for name, row, whose in zip(chart["names"], rates / 65535, neurons, strict=True):
        rate = internals.sites[name].rate.numpy()
        np.testing.assert_allclose(row, rate[whose], atol=1e-5)
        assert (np.diff(row) <= 0).all()
        assert {*whose.tolist()} == {*range(len(rate))}  # where there is room for all of them
        assert row[0] == pytest.approx(rate.max(), abs=1e-5)
        assert row[-1] == pytest.approx(rate.min(), abs=1e-5)


def test_the_map_of_the_largest_flux_is_small():
    doubles = {f"double-{stream}-{block}": 12288 for block in range(19) for stream in ("img", "txt")}
    chart = internals_map(recorded({**doubles, **{f"single-{block}": 12288 for block in range(38)}}))
    assert len(json.dumps(chart)) < MOST_BYTES
    assert chart["columns"] > 150


def test_the_curve_of_a_budget_tells_what_to_ask_for_at_every_point():
    size = 64, 64 * 9000, 64 * 18000
    steps = [Step(f"single-{n % 38}", "neurons", 0, *size, 1e-9 * 1.003**n, 1e-15 * 1.003**n) for n in range(5000)]
    curve, words = BudgetCurve(steps), "GB to save"
    chart = curve.chart(1000, {words: lambda memory, neurons, parameters: memory / 1e9})
    assert len(json.dumps(chart)) < MOST_BYTES
    mark, to = chart["mark"], chart["drag"]["to"][words]
    assert to[mark] == pytest.approx(1000 * 64 * 18000 / 1e9, rel=1e-3)
    assert chart["more"]["neurons cut"][mark] == 64 * 1000
    assert chart["series"][0]["y"][mark] == pytest.approx(curve.error(1000), rel=1e-3)
    for number in (0, mark, -1):  # asked for that, the budget takes as many steps
        taken = curve.until(to[number] * 1e9, "bytes")
        assert 64 * taken == pytest.approx(chart["more"]["neurons cut"][number], rel=2e-3)
    assert to == sorted(to)
    assert len(to) == len(chart["x"]) == len(chart["series"][0]["y"])
