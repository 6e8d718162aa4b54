"""Who records: an actor with a FLUX of the tiny kind in memory, or one with a ComfyUI of its own.

    worker = TinyWorker(url, checkpoint, wanted, steps=20, threads=1)
    worker.work(piece)                               # records, and brings it to the shared folder: a `Part`

Each is a plain class, which `record.py` makes an actor of.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from pathlib import Path

import torch

from ..errors import UserError
from ..flux.checkpoint import Checkpoint
from ..flux.fingerprint import Fingerprint
from ..headless.asking import Unreachable
from ..headless.client import ComfyClient
from ..headless.client import Lost as Restarted
from ..headless.queue import OUTPUT, marked, recording_names
from ..headless.runs import Run
from ..headless.server import ComfyServer, start_options
from ..headless.workflow import follow
from ..progress import Progress
from ..recording.drawing import Together, Wanted, record_some
from ..recording.queued import QueuedRun
from ..recording.recording import Recording
from ..tiny.model import TinyFlux
from .crew import Lost
from .parts import Part, publish
from .pieces import Piece
from .shared import Shared


class TinyWorker:
    """Draws with the reference runtime, on `threads` threads."""

    def __init__(self, url: str, checkpoint: Path, wanted: Wanted, steps: int, threads: int):
        torch.set_num_threads(threads)
        self.url, self.checkpoint, self.wanted, self.steps = url, checkpoint, wanted, steps

    def ready(self) -> None:
        """Returns once the model is in memory; raises `UserError` where it cannot be read."""
        self.shared, self.tiny = Shared(self.url), TinyFlux.load(self.checkpoint)
        self.fingerprint = Fingerprint.of_checkpoint(Checkpoint(self.checkpoint))

    def work(self, piece: Piece) -> Part:
        with tempfile.TemporaryDirectory(prefix="flux_poke_piece_") as folder:
            recording, images = Recording.at(folder), Together(piece.prompts, piece.seed)
            record_some(self.tiny, self.fingerprint, images, piece.first, recording, self.wanted, self.steps)
            return publish(self.shared, recording, piece.key, piece.number, piece.first)


class ComfyWorker:
    """Draws on a ComfyUI from the folder `comfyui`, which it starts, and starts again where it does not go on.

    A run that tells no progress for `patience` seconds hangs.
    """

    def __init__(self, url: str, comfyui: Path, options: list[str], patience: float):
        self.url, self.comfyui, self.options, self.patience = url, comfyui, options, patience
        self.folder = Path(tempfile.mkdtemp(prefix="flux_poke_worker_"))
        self.output = self.folder / "output"
        self.server: ComfyServer | None = None
        self.client: ComfyClient | None = None

    def ready(self) -> None:
        """Returns once ComfyUI answers; raises `UserError` where it cannot be started."""
        self.shared = Shared(self.url)
        self._client()

    def work(self, piece: Piece) -> Part:
        (name,) = recording_names([Run(0, "", graph) for graph in piece.graphs])
        recording = Recording.at(self.output / OUTPUT / name)
        self.output.mkdir(exist_ok=True)
        try:
            self._draw(piece)
            if "internals" not in recording.kinds:
                raise UserError("nothing was counted: the workflow draws nothing that Record watches.")
            return publish(self.shared, recording, piece.key, piece.number, piece.first)
        finally:
            shutil.rmtree(self.output, ignore_errors=True)  # pictures and gigabytes, where nobody would look for them

    def _draw(self, piece: Piece) -> None:
        try:
            for number, graph in enumerate(piece.graphs):
                attempt = str(uuid.uuid4())
                marks = QueuedRun(f"{piece.key}-{number}", attempt)
                follow(self._client(), marked(graph, marks), self._watch(), piece.name, prompt_id=attempt)
        except (Unreachable, Restarted, Lost) as error:
            self.close()
            raise Lost(f"{error}") from error

    def _watch(self) -> Progress:
        """Progress of a run that ends in `Lost` where nothing changes for too long."""
        state, since = "", time.monotonic()

        def watch(doing: str, part: float, of: float) -> None:
            nonlocal state, since
            if (now := f"{doing} {part}") != state:
                state, since = now, time.monotonic()
            if time.monotonic() - since > self.patience:
                raise Lost(f"its ComfyUI was at {doing!r} for more than {self.patience:.0f} s")

        return watch

    def _client(self) -> ComfyClient:
        """A connection to the ComfyUI, which is started where there is none."""
        if self.client is None:
            own = ["--output-directory", str(self.output), "--temp-directory", str(self.folder / "temp")]
            own += ["--database-url", f"sqlite:///{self.folder / 'comfyui.db'}"]  # two that make one at once end each other
            options = [*start_options(), *own, *self.options]
            self.server = ComfyServer(self.comfyui, options, log=self.folder / "comfyui.log")
            self.server.__enter__()
            self.client = ComfyClient(self.server.address)
        return self.client

    def close(self) -> None:
        """Ends ComfyUI, whatever state it is in."""
        if self.client is not None:
            self.client.__exit__()
        if self.server is not None:
            self.server.__exit__()
        self.client = self.server = None
