"""The scripts in benchmarks/ are run by hand; what they import is checked here."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_everything_that_a_benchmark_imports_is_there(script: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # as when it is run; they import each other
    assert callable(runpy.run_path(str(script)).get("main")) or script.stem in ("turns", "figures")
