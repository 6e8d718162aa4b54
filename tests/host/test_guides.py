"""The guide to long recordings, followed to the letter on a real server, with three prompts for a thousand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from flux_poke.cli import app
from flux_poke.recording.recording import Recording
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
SERVER = "127.0.0.1:8188"


def test_a_night_is_recorded_resumed_shown_and_planned_as_the_guide_says(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "workflows"):
        Path(name).symlink_to(ROOT / name)
    Path("digits.txt").write_text("a handwritten three\nseven\na 5")
    guide = (ROOT / "docs" / "overnight.md").read_text(encoding="utf-8").replace(SERVER, server.address)
    said = []
    for line in "".join(re.findall(r"^```sh\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)).splitlines():
        program, *arguments = shlex.split(line.removeprefix("uv run "))
        assert program == "flux-poke"
        ended = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
        said.append(ended.output)
    trial, night, resumed, *_ = said
    assert re.search(r"done on \S+ in [\d.]+ s", trial)
    assert "3 of 3 runs done" in night
    assert "Run 0" not in resumed
    assert Recording.open("trial/trial").internals().runs == 1
    assert Recording.open("night/thousand").internals().runs == 3
    assert Path("night.png").exists()
    assert Path("plan.safetensors").exists()
