"""A real ComfyUI server with this pack in its custom_nodes, for the host and browser tests.

It is looked for at $COMFYUI_PATH, else ~/comfy/ComfyUI; where there is none, or what it requires is not installed in this
environment, these tests are skipped. $COMFYUI_PATH_OLD names
an older one for the compatibility tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from flux_poke.headless.client import ComfyClient
from flux_poke.headless.server import ComfyServer
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()

#: Nodes that tests of the whole family of FLUX have on the server.
FAMILY = ROOT / "tests" / "host" / "small_family_nodes.py"

#: What the pack's folder in custom_nodes is called.
PACK = "flux-poke-under-test"


class Host:
    """A server's folders, and how to start it."""

    def __init__(self, comfyui: Path, base: Path, options: tuple[str, ...] = ()):
        self.comfyui, self.base, self.options = comfyui, base, options
        (base / "custom_nodes").mkdir(parents=True)
        for kind in ("diffusion_models", "loras", "vae"):
            (base / "models" / kind).mkdir(parents=True)
        (base / "input").mkdir()
        # a name that is no Python identifier; with a space or a dot in it ComfyUI would not find the pack's help pages
        (base / "custom_nodes" / PACK).symlink_to(ROOT)

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def internals(self) -> Path:
        return self.recorded("tiny")

    def recorded(self, name: str) -> Path:
        """The internals of a recording."""
        return self.output / "flux_poke" / name / "internals.safetensors"

    def start(self, *options: str) -> ComfyServer:
        arguments = ["--cpu", "--base-directory", str(self.base), "--disable-auto-launch", *self.options, *options]
        return ComfyServer(self.comfyui, arguments, log=self.base / "comfyui.log", environment={"OMP_NUM_THREADS": "1"})


def require_comfyui() -> None:
    """Skips where there is no ComfyUI that would start."""
    if not (COMFYUI / "main.py").is_file():
        pytest.skip(f"no ComfyUI at {COMFYUI} (set COMFYUI_PATH)")
    if missing := uninstalled(COMFYUI / "requirements.txt"):
        names = ", ".join(missing)
        pytest.skip(f"ComfyUI requires what is not installed here ({names}): uv pip install -r {COMFYUI}/requirements.txt")


def uninstalled(requirements: Path) -> list[str]:
    """What a requirements file names for this machine and this environment lacks."""
    missing = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if (text := line.split("#")[0].strip()) and not text.startswith("-"):
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate():
                try:
                    version(wanted.name)
                except PackageNotFoundError:
                    missing.append(wanted.name)
    return missing


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    require_comfyui()
    made = Host(COMFYUI, tmp_path_factory.mktemp("comfyui") / "base")
    (made.base / "custom_nodes" / FAMILY.name).symlink_to(FAMILY)
    return made


@pytest.fixture(scope="session")
def server(host: Host) -> Iterator[ComfyServer]:
    with host.start() as running:
        yield running


@pytest.fixture
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    with ComfyClient(server.address) as connected:
        yield connected


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI as a library, on the CPU; its folder is on `sys.path` for the length of the test alone."""
    require_comfyui()
    # The repository's own folder `nodes` would hide ComfyUI's nodes.py.
    monkeypatch.setattr(sys, "path", [str(COMFYUI), *(entry for entry in sys.path if entry not in ("", os.getcwd()))])
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


@pytest.fixture(scope="session")
def workflow() -> Callable[[str], dict]:
    """Reads a graph from workflows/api, to change as a test needs."""
    return lambda name: json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
