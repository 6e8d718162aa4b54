"""A small client for ComfyUI's HTTP and websocket API.

with ComfyClient("127.0.0.1:8188") as client:
    result = client.run(graph, on_progress=print)    # graph in API form: {node id: {class_type, inputs}}
    pictures = [client.fetch(file) for file in result.files("images")]

`docs/queue.md` has a longer example. A dropped websocket is opened again, and does no harm: what a run came to is asked for.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import requests
import websocket

from ..errors import UserError
from ..parsing import read_image
from .asking import MOST_FILE, TIMEOUT, Refused, Server

if TYPE_CHECKING:
    from PIL.Image import Image

Graph = Mapping[str, Mapping[str, Any]]

#: Told which node is at work, its step and its number of steps (0, 0 when it starts); of no node ("") where all is silent.
OnNode = Callable[[str, float, float], None]

#: Seconds without a message after which the history is asked instead.
SILENCE = 5.0
#: Seconds between two signs of life while the server is silent.
TICK = 1.0
#: Seconds for which a run is asked to stop.
PATIENCE = 1.0


class Lost(UserError):
    """The server does not know the run any more: it was restarted."""


class Interrupted(Exception):
    """The run was stopped by /interrupt or by Cancel."""


@dataclass(frozen=True)
class Result:
    """What a finished run left: `outputs` by node id as ComfyUI reports them, `texts` shown on nodes, nodes that really ran."""

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str] = field(default_factory=dict)
    executed: tuple[str, ...] = ()

    def files(self, kind: str | None = None, node: str | None = None) -> list[dict[str, Any]]:
        """References to the files of one kind ("images", ...) or all, of one node or all, for `ComfyClient.fetch`."""
        nodes = self.outputs.values() if node is None else [self.outputs.get(node, {})]
        outputs = [output for output in nodes if isinstance(output, dict)]
        lists = [files for output in outputs for files in (output.values() if kind is None else [output.get(kind)])]
        return [file for files in lists if isinstance(files, list) for file in files if isinstance(file, dict)]


class ComfyClient:
    """One connection to the server at `address` ("host:port", or a URL). Raises `Unreachable` where none answers.

    One thread at a time may use it.
    """

    def __init__(self, address: str):
        self.address = address
        self.id = uuid.uuid4().hex
        self._server = Server(address)
        self._socket = self._connected()
        if self._socket is None:
            self._server.ask("GET", "queue")

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        self._server.close()

    def run(self, graph: Graph, on_progress: OnNode | None = None, extra: Mapping[str, Any] | None = None) -> Result:
        """Queues a graph and waits for its end; see `queue` and `wait`."""
        return self.wait(self.queue(graph, extra), on_progress)

    def queue(self, graph: Graph, extra: Mapping[str, Any] | None = None, prompt_id: str | None = None) -> str:
        """Queues a graph; its prompt id, a new one or the UUID given. Raises `Refused` naming every node and input the server
        refuses, also where it would run the rest of the graph."""
        given = {} if prompt_id is None else {"prompt_id": prompt_id}
        body = {"prompt": graph, "client_id": self.id, "extra_data": dict(extra or {}), **given}

        def read(answer: Any) -> tuple[str, str | None]:
            return str(answer["prompt_id"]), _refusal(answer, graph) if answer.get("node_errors") else None

        queued, refused = self._server.told(read, "POST", "prompt", json=body, refused=lambda answer: _refusal(answer, graph))
        if refused is not None:
            self.cancel(queued)
            raise Refused(refused)
        return queued

    def wait(
        self, prompt_id: str, on_progress: OnNode | None = None, on_text: Callable[[str, str], None] | None = None
    ) -> Result:
        """Waits until a queued run has ended; `on_text` is told of each text that is shown on a node, as (node, text).

        `on_progress` is called every second at least. Raises `UserError` with the failing node's message, `Interrupted`, `Lost`
        or `Unreachable`.
        """
        texts: dict[str, str] = {}
        executed: list[str] = []
        for kind, data in self._messages(prompt_id):
            if kind == "silence":
                if on_progress:
                    on_progress("", 0, 0)
                continue
            if kind == "text":
                texts[data["node"]] = data["text"]
                if on_text:
                    on_text(data["node"], data["text"])
                continue
            if data.get("prompt_id") != prompt_id:
                continue
            node = str(data.get("node") or "")
            if kind == "executing" and node:
                executed.append(node)
                if on_progress:
                    on_progress(node, 0, 0)
            elif kind == "progress" and on_progress:
                on_progress(node, *(_number(data.get(name)) for name in ("value", "max")))
            elif kind == "execution_error":
                said = str(data.get("exception_message", "no reason given")).strip()
                raise UserError(f"{data.get('node_type', 'A node')} (node {data.get('node_id', '?')}) failed: {said}")
            elif kind == "execution_interrupted":
                raise Interrupted(prompt_id)
            elif kind == "execution_success":
                break
        while not (found := self.history(prompt_id)):  # written a moment after the last message
            self._past_messages(prompt_id)
            time.sleep(0.05)
        outputs = found.get("outputs")
        return Result(prompt_id, outputs if isinstance(outputs, dict) else {}, texts, tuple(executed))

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The server's record of a finished run; empty while it has none."""
        return self._server.told(lambda answer: dict(answer.get(prompt_id) or {}), "GET", f"history/{prompt_id}")

    def cancel(self, prompt_id: str) -> None:
        """Takes the run with this id out of the queue, or stops it if it is running.

        ComfyUI forgets an interrupt that comes in the moment in which a run begins, so it is asked until the run is gone; but
        for `PATIENCE` seconds at most, for a node may take long until it looks whether it is to stop.
        """
        end = time.monotonic() + PATIENCE
        while True:
            self._server.ask("POST", "queue", json={"delete": [prompt_id]})
            self.interrupt(prompt_id)
            if not self._waits(prompt_id) or time.monotonic() > end:
                return
            time.sleep(0.05)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops the run with this id if it is running, or whichever is: once, where `cancel` makes sure."""
        body = {"prompt_id": prompt_id} if prompt_id else {}
        self._server.ask("POST", "interrupt", json=body)

    def upload(self, path: str | os.PathLike[str], subfolder: str = "") -> str:
        """Puts an image into the server's input folder; its name there, as Load Image takes it. An equal file is used again."""
        with open(path, "rb") as file:

            def read(answer: Any) -> str:
                return "/".join(filter(None, (str(answer["subfolder"]), str(answer["name"]))))

            return self._server.told(read, "POST", "upload/image", files={"image": file}, data={"subfolder": subfolder})

    def fetch(self, file: Mapping[str, str]) -> bytes:
        """The content of a file that a run reported (`filename`, `subfolder`, `type`); raises `Missing` where it is gone."""
        return self._server.ask("GET", "view", most=MOST_FILE, params=dict(file))

    def picture(self, file: Mapping[str, str]) -> Image:
        """A picture that a run reported, in RGB; raises `UserError` where it is none."""
        try:
            return read_image(self.fetch(file))
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"ComfyUI at {self.address} sent {dict(file)}, which is no picture ({error}).") from error

    def models(self, kind: str) -> list[str]:
        """Names of the model files the server has in one of its folders ("diffusion_models", "loras", ...)."""
        return self._server.told(lambda answer: [str(name) for name in answer], "GET", f"models/{kind}")

    def metadata(self, kind: str, file: str) -> dict[str, str]:
        """What the header of a .safetensors in one of those folders says of it; empty where it says nothing."""
        try:
            return self._server.told(dict, "GET", f"view_metadata/{kind}", params={"filename": file})
        except UserError:
            return {}

    def require_node(self, kind: str) -> None:
        """Raises `UserError` where the server does not have nodes of this class, one of this pack's."""
        if not self._server.told(lambda answer: kind in answer, "GET", f"object_info/{kind}"):
            raise UserError(
                f"ComfyUI at {self.address} has no node {kind}: put this pack into its custom_nodes, in this version, install "
                "what its requirements.txt names, and restart it."
            )

    def _messages(self, prompt_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Messages as (type, data); on silence (which is told) and without a connection, what the history knows of it."""
        heard = time.monotonic()
        while True:
            try:
                message = self._receive()
            except (OSError, websocket.WebSocketException):
                self._socket = self._connected()
                yield from self._past_messages(prompt_id)
                continue
            if message is None:
                yield "silence", {}
                if self._socket is None or time.monotonic() - heard > SILENCE:
                    heard = time.monotonic()
                    yield from self._past_messages(prompt_id)
                continue
            heard = time.monotonic()
            if said := _message(message):
                yield said

    def _receive(self) -> str | bytes | None:
        """The next message; None after some silence. Raises where the connection is lost."""
        if self._socket is None:
            time.sleep(TICK)
            self._socket = self._connected()
            return None
        try:
            self._socket.settimeout(min(TICK, SILENCE))
            return self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return None

    def _past_messages(self, prompt_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What the server said of a run that has ended; nothing while it waits or runs. `Lost` where it is not known."""
        if self._waits(prompt_id):
            return []
        record = self.history(prompt_id)
        if not record:
            raise Lost(
                f"ComfyUI at {self.address} no longer knows the run {prompt_id}: it was restarted, or its history was cleared. "
                "Queue it again."
            )
        status = record.get("status")
        messages = status.get("messages") if isinstance(status, dict) else None
        pairs = (message for message in messages or () if isinstance(message, list) and len(message) == 2)
        return [(str(kind), data) for kind, data in pairs if isinstance(data, dict)]

    def _waits(self, prompt_id: str) -> bool:
        """Whether the run waits for its turn, or is running."""

        def waits(queue: Any) -> bool:
            return any(prompt_id == entry[1] for entries in queue.values() for entry in entries)

        return self._server.told(waits, "GET", "queue")

    def _connected(self) -> websocket.WebSocket | None:
        """A new websocket; None where there can be none."""
        try:
            return websocket.create_connection(
                f"ws{self._server.url.removeprefix('http')}/ws?clientId={self.id}", timeout=TIMEOUT
            )
        except (OSError, ValueError, websocket.WebSocketException):
            return None


def wait_until_up(address: str, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
    """Returns when a ComfyUI answers at `address`; `UserError` after `seconds`, or when `alive()` says that it has died."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and alive():
        try:
            requests.get(f"http://{address}/system_stats", timeout=2).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.2)
    reason = f"nothing answered within {seconds:.0f} s" if alive() else "it ended"
    raise UserError(f"ComfyUI did not come up at {address}: {reason}.")


def _message(message: str | bytes) -> tuple[str, dict[str, Any]] | None:
    """What a message of the websocket says, as (type, data); None where that is nothing that we know of."""
    try:
        if isinstance(message, bytes):
            kind, length = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
            node, text = message[8 : 8 + length], message[8 + length :]
            return ("text", {"node": node.decode(), "text": text.decode()}) if kind == 3 else None
        found = json.loads(message)
        return str(found["type"]), dict(found.get("data") or {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _number(value: Any) -> float:
    """A step, or a part of one; 0 where it is none."""
    return value if isinstance(value, int | float) and abs(value) < 2**53 else 0


def _refusal(answer: Mapping[str, Any], graph: Graph) -> str:
    """What the server's answer to a graph that it does not accept says, in one line."""
    kinds = {node: found.get("class_type", "node") for node, found in graph.items()}
    faults = [
        f"{kinds.get(node, 'node')} (node {node}): {error.get('message')} {error.get('details', '')}".strip()
        for node, found in (answer.get("node_errors") or {}).items()
        for error in found.get("errors", [])
    ]
    message = (answer.get("error") or {}).get("message", "no reason given")
    return f"ComfyUI refused the graph: {'; '.join(faults) or message}."
