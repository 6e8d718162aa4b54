"""Host tests where a ComfyUI is there and cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_host_tests_are_skipped_with_the_command_that_would_make_them_run(tmp_path):
    (tmp_path / "main.py").write_text("import no_such_package")
    (tmp_path / "requirements.txt").write_text("torch\nno-such-package==1.2  # as it is\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "host" / "test_client.py")]
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert f"(no-such-package): uv pip install -r {tmp_path}/requirements.txt" in ended.stdout
