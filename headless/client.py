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
from typing import Any

import requests
import websocket

from ..errors import UserError, WrongArguments

Graph = Mapping[str, Mapping[str, Any]]

#: Told which node is at work, its step and its number of steps (0, 0 when it starts); of no node ("") where all is silent.
OnNode = Callable[[str, int, int], None]

#: Seconds without a message after which the history is asked instead, and without an answer after which there is none.
SILENCE, TIMEOUT = 5.0, 30.0
#: Seconds between two signs of life while the server is silent.
TICK = 1.0


class Unreachable(UserError):
    """No server answers."""

    status = 3


class Lost(UserError):
    """The server does not know the run any more: it was restarted."""


class Missing(UserError):
    """The server has no such file."""


class Refused(UserError):
    """The server does not take the graph; it took nothing of it."""


class Interrupted(Exception):
    """The run was stopped by /interrupt or by Cancel."""


@dataclass(frozen=True)
class Result:
    """What a finished run left: `outputs` by node id as ComfyUI reports them, `texts` shown on nodes, nodes that really ran."""

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str] = field(default_factory=dict)
    executed: tuple[str, ...] = ()

    def files(self, kind: str, node: str | None = None) -> list[dict[str, str]]:
        """References to the files of one kind ("images", ...), of one node or all, for `ComfyClient.fetch`."""
        nodes = self.outputs.values() if node is None else [self.outputs.get(node, {})]
        return [file for output in nodes for file in output.get(kind, [])]


class ComfyClient:
    """One connection to the server at `address` ("host:port", or a URL). Raises `Unreachable` where none answers.

    One thread at a time may use it.
    """

    def __init__(self, address: str):
        self.address = address
        self.id = uuid.uuid4().hex
        scheme, _, place = address.rstrip("/").rpartition("://")
        self._url = f"{scheme or 'http'}://{place}"
        self._http = requests.Session()
        self._socket = self._connected()
        if self._socket is None:
            self._ask("GET", "queue")

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        self._http.close()

    def run(self, graph: Graph, on_progress: OnNode | None = None, extra: Mapping[str, Any] | None = None) -> Result:
        """Queues a graph and waits for its end; see `queue` and `wait`."""
        return self.wait(self.queue(graph, extra), on_progress)

    def queue(self, graph: Graph, extra: Mapping[str, Any] | None = None, prompt_id: str | None = None) -> str:
        """Queues a graph; its prompt id, a new one or the UUID given. Raises `Refused` naming every node and input the server
        refuses, also where it would run the rest of the graph."""
        given = {} if prompt_id is None else {"prompt_id": prompt_id}
        body = {"prompt": graph, "client_id": self.id, "extra_data": dict(extra or {}), **given}
        answer = self._ask("POST", "prompt", json=body, refused=lambda answer: _refusal(answer, graph)).json()
        if answer.get("node_errors"):
            self.cancel(answer["prompt_id"])
            raise Refused(_refusal(answer, graph))
        return answer["prompt_id"]

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
            if kind == "executing" and data.get("node"):
                executed.append(data["node"])
                if on_progress:
                    on_progress(data["node"], 0, 0)
            elif kind == "progress" and on_progress:
                on_progress(data.get("node") or "", data["value"], data["max"])
            elif kind == "execution_error":
                raise UserError(
                    f"{data['node_type']} (node {data['node_id']}) failed: {str(data['exception_message']).strip()}"
                )
            elif kind == "execution_interrupted":
                raise Interrupted(prompt_id)
            elif kind == "execution_success":
                break
        while not (found := self.history(prompt_id)):  # written a moment after the last message
            self._past_messages(prompt_id)
            time.sleep(0.05)
        return Result(prompt_id, found["outputs"], texts, tuple(executed))

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The server's record of a finished run; empty while it has none."""
        return self._ask("GET", f"history/{prompt_id}").json().get(prompt_id, {})

    def cancel(self, prompt_id: str) -> None:
        """Takes the run with this id out of the queue, or stops it if it is running."""
        self._ask("POST", "queue", json={"delete": [prompt_id]})
        self.interrupt(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops the run with this id, or whichever is running."""
        body = {"prompt_id": prompt_id} if prompt_id else {}
        self._ask("POST", "interrupt", json=body)

    def upload(self, path: str | os.PathLike[str], subfolder: str = "") -> str:
        """Puts an image into the server's input folder; its name there, as Load Image takes it. An equal file is used again."""
        with open(path, "rb") as file:
            answer = self._ask("POST", "upload/image", files={"image": file}, data={"subfolder": subfolder}).json()
        return "/".join(filter(None, (answer["subfolder"], answer["name"])))

    def fetch(self, file: Mapping[str, str]) -> bytes:
        """The content of a file that a run reported (`filename`, `subfolder`, `type`); raises `Missing` where it is gone."""
        return self._ask("GET", "view", params=dict(file)).content

    def models(self, kind: str) -> list[str]:
        """Names of the model files the server has in one of its folders ("diffusion_models", "loras", ...)."""
        return self._ask("GET", f"models/{kind}").json()

    def metadata(self, kind: str, file: str) -> dict[str, str]:
        """What the header of a .safetensors in one of those folders says of it; empty where it says nothing."""
        try:
            answer = self._http.get(f"http://{self.address}/view_metadata/{kind}", params={"filename": file}, timeout=TIMEOUT)
            return answer.json() if answer.ok else {}
        except (requests.RequestException, ValueError):
            return {}

    def require_node(self, kind: str) -> None:
        """Raises `UserError` where the server does not have nodes of this class, one of this pack's."""
        if kind not in self._ask("GET", f"object_info/{kind}").json():
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
            if isinstance(message, bytes):
                if int.from_bytes(message[:4], "big") == 3:
                    length = int.from_bytes(message[4:8], "big")
                    yield "text", {"node": message[8 : 8 + length].decode(), "text": message[8 + length :].decode()}
            elif message:
                found = json.loads(message)
                yield found["type"], found.get("data") or {}

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
        queue = self._ask("GET", "queue").json()
        if any(prompt_id == entry[1] for entries in queue.values() for entry in entries):
            return []
        record = self.history(prompt_id)
        if not record:
            raise Lost(
                f"ComfyUI at {self.address} no longer knows the run {prompt_id}: it was restarted, or its history was cleared. "
                "Queue it again."
            )
        return [(kind, data) for kind, data in record["status"]["messages"]]

    def _connected(self) -> websocket.WebSocket | None:
        """A new websocket; None where there can be none."""
        try:
            return websocket.create_connection(f"ws{self._url.removeprefix('http')}/ws?clientId={self.id}", timeout=TIMEOUT)
        except (OSError, ValueError, websocket.WebSocketException):
            return None

    def _ask(
        self, method: str, path: str, refused: Callable[[Mapping[str, Any]], str] | None = None, **options: Any
    ) -> requests.Response:
        """The server's answer; `Unreachable` where there is none, `UserError` where it is an error (`Refused`, with what
        `refused` makes of it, for status 400)."""
        try:
            answer = self._http.request(method, f"{self._url}/{path}", timeout=TIMEOUT, **options)
            if answer.status_code == 400 and refused is not None:
                raise Refused(refused(answer.json()))
            if answer.status_code in (502, 503, 504):  # of a proxy, which has no server behind it
                raise Unreachable(f"No ComfyUI answers at {self.address} (status {answer.status_code}): start it again.")
            if answer.status_code == 404:
                raise Missing(f"ComfyUI at {self.address} has no {path} of this name ({dict(options.get('params', {}))}).")
            answer.raise_for_status()
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Unreachable(f"No ComfyUI answers at {self.address} ({error}): start it, or give its host:port.") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise WrongArguments(f"{self.address} is not a server's address ({error}): expected host:port or a URL.") from error
        except requests.RequestException as error:
            raise UserError(f"ComfyUI at {self.address} did not do what was asked ({error}): look at its log.") from error
        return answer


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
