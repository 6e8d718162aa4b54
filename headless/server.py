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

import torch

from ..errors import UserError
from .client import wait_until_up

#: Where a ComfyUI listens by itself.
DEFAULT_SERVER = "127.0.0.1:8188"
#: Seconds that it may take to come up, and to end.
PATIENCE, ENDING = 180.0, 10.0

#: Ends the process with the given id where whoever holds the other end of its input is gone without a word: a ComfyUI that was
#: left behind would keep its GPU.
_WATCH = f"""
import os, signal, sys, time

signal.signal(signal.SIGINT, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    for kind in ("SIGTERM", "SIGKILL"):
        try:
            os.kill(int(sys.argv[1]), getattr(signal, kind, signal.SIGTERM))
        except OSError:
            break
        time.sleep({ENDING})
"""


class ComfyServer:
    """A ComfyUI process on a free local port, with its output in `log`; it ends with the `with`.

    Raises `UserError` where `folder` holds no ComfyUI or it does not come up.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.folder = folder.expanduser()
        if not (self.folder / "main.py").is_file():
            raise UserError(f"{self.folder} holds no ComfyUI: expected its main.py there.")
        self.address = f"127.0.0.1:{free_port()}"
        self.log = log
        self._command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", self.address.split(":")[1], *options]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self._output = open(self.log, "ab") if self.log else None
        self._process = process = subprocess.Popen(  # nosec B603 # the ComfyUI that --comfyui names, without a shell
            self._command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        self._watch = subprocess.Popen(  # nosec B603 # Python itself, with a text of ours
            [sys.executable, "-I", "-c", _WATCH, str(process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until_up(self.address, PATIENCE, lambda: process.poll() is None)
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
                self._process.wait(ENDING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._watch is not None:
            self._watch.communicate(b"ended")
            self._watch = None
        if self._output is not None:
            self._output.close()

    def _last_words(self) -> str:
        """The end of the log, as a sentence; empty where there is none."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" The last line of its log: {last}" if last else ""


def start_options() -> list[str]:
    """Options for one that only we talk to; on a CPU alone, ComfyUI has to be told that there is nothing else to run on."""
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return ["--disable-auto-launch", *([] if accelerated else ["--cpu"])]


def free_port() -> int:
    """A TCP port on this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
