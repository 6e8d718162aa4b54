"""Starting a ComfyUI for as long as it is needed.

with ComfyServer(Path("~/comfy/ComfyUI"), options=["--cpu"]) as server:
    ComfyClient(server.address)
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ..errors import UserError
from .client import wait_until_up


class ComfyServer:
    """A ComfyUI process on a free local port, with its output in `log`; it ends with the `with`.

    Raises `UserError` where `folder` holds no ComfyUI or it does not come up.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        log: Path | None = None,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        patience: float = 180.0,
    ):
        self.folder = folder.expanduser()
        if not (self.folder / "main.py").is_file():
            raise UserError(f"{self.folder} holds no ComfyUI: expected its main.py there.")
        self.address = f"127.0.0.1:{free_port()}"
        self.log = log
        self._command = [python, "main.py", "--listen", "127.0.0.1", "--port", self.address.split(":")[1], *options]
        self._environment = {**os.environ, **(environment or {})}
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self._output = open(self.log, "ab") if self.log else None
        self._process = process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_up(self.address, self._patience, lambda: process.poll() is None)
        except UserError as error:
            self.__exit__()
            raise UserError(f"{error}{self._last_words()}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._output is not None:
            self._output.close()

    def _last_words(self) -> str:
        """The end of the log, as a sentence; empty where there is none."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" The last line of its log: {last}" if last else ""


def free_port() -> int:
    """A TCP port on this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
