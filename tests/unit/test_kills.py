"""Commands that are killed lose nothing, and go on where they were (`kills.py`, which runs for hours as well)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Retraining has tests of its own that kill it (`test_retrain_again.py`, `test_distill_layers.py`).
QUICK = ("record", "thin", "calibrate", "merge", "plan", "prune", "replace", "lens", "convert", "queue")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_is_killed_at_operations_on_files_loses_nothing_and_run_again_ends_as_without():
    script = Path(__file__).with_name("kills.py")
    run = subprocess.run([sys.executable, str(script), *QUICK, "--kills", "2"], capture_output=True, text=True, timeout=1500)
    assert run.stdout, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == set(QUICK)
    assert {name: told["losses"] for name, told in found.items()} == {name: [] for name in QUICK}
    assert sum(told["kills"] for told in found.values()) >= len(QUICK), run.stderr
