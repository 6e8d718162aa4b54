"""Tests that need a ComfyUI are skipped, with what would make them run, where ComfyUI itself would not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_a_comfyui_whose_requirements_are_missing_is_skipped_with_the_command_that_installs_them(tmp_path: Path):
    (tmp_path / "main.py").touch()
    (tmp_path / "requirements.txt").write_text("torch\nno-such-package-anywhere>=1 # why\nnot-here; python_version < '3'\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-q", "-p", "no:cacheprovider", str(TESTS / "host" / "test_computing.py")]
    command.append(str(TESTS / "host" / "test_block_taps_on_hosts_blocks.py"))
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, timeout=300)
    assert done.returncode == 0, done.stdout
    assert f"uv pip install -r {tmp_path}/requirements.txt" in done.stdout
    assert "(no-such-package-anywhere)" in done.stdout
    assert "passed" not in done.stdout
