"""The command line as a program: how it starts, and what it prints on consoles of any kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from flux_poke.commands.terminal import typed
from PIL import Image


def flux_poke(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flux_poke.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, encoding="latin-1")


def test_help_is_there_at_once_nothing_heavy_is_imported_for_it():
    heavy = ("torch", "numpy", "matplotlib", "scipy", "sklearn", "PIL", "requests")
    told = "import sys, flux_poke.cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", told, *heavy], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_it_runs_as_a_module_and_tells_its_version():
    ended = flux_poke("--version")
    assert ended.returncode == 0
    assert re.fullmatch(r"flux-poke( \d+\.\d+\.\d+|, not installed.*)\n", ended.stdout)


def test_without_a_command_it_tells_which_there_are():
    ended = flux_poke()
    assert ended.returncode == 2
    assert "Usage: flux-poke" in ended.stdout + ended.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_a_console_that_lacks_characters_gets_the_others(tmp_path, encoding):
    picture = tmp_path / "\u0416.png"
    Image.new("RGB", (16, 16)).save(picture)
    ended = flux_poke("compare", picture, picture, PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "?.png" in ended.stdout


def test_what_to_type_next_is_what_runs_here(monkeypatch):
    monkeypatch.setenv("UV", "/bin/uv")
    assert typed("inspect", "a b.safetensors") == "uv run flux-poke inspect 'a b.safetensors'"
    monkeypatch.delenv("UV")
    assert typed("inspect", "x", "-o", 3) == "flux-poke inspect x -o 3"
