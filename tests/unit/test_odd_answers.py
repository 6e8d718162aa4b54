"""What answers at ComfyUI's address may be anything: every call ends in what was asked for, or in a sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from damage import changed, nested, register_profiles
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient, Result, _message
from hypothesis import given
from hypothesis import strategies as st

register_profiles()

GRAPH = {"1": {"class_type": "Note", "inputs": {}}}
FILE = {"filename": "a.png", "subfolder": "", "type": "output"}
ID = "7a9c"
#: By call, an answer as ComfyUI gives it.
CALLS: dict[str, tuple[Callable[[ComfyClient, Any], object], Any]] = {
    "models": (lambda client, _: client.models("vae"), ["ae.safetensors"]),
    "metadata": (lambda client, _: client.metadata("vae", "a.safetensors"), {"format": "pt"}),
    "history": (lambda client, _: client.history(ID), {ID: {"outputs": {}, "status": {"messages": []}}}),
    "past": (lambda client, _: client._past_messages(ID), {ID: {"outputs": {}, "status": {"messages": [["a", {}]]}}}),
    "node": (lambda client, _: client.require_node("Note"), {"Note": {"input": {}}}),
    "queue": (lambda client, _: client.queue(GRAPH), {"prompt_id": ID, "node_errors": {}}),
    "upload": (lambda client, path: client.upload(path), {"name": "a.png", "subfolder": "", "type": "input"}),
    "picture": (lambda client, _: client.picture(FILE), {}),
    "fetch": (lambda client, _: client.fetch(FILE), {}),
}


class Anything(ThreadingHTTPServer):
    """Answers everything with `status` and `content`."""

    status, content = 200, b"{}"

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                server: Any = self.server
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(server.content)))
                self.end_headers()
                self.wfile.write(server.content)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def anything() -> Iterator[Anything]:
    with Anything() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def client(anything) -> Iterator[ComfyClient]:
    anything.status, anything.content = 200, b"{}"
    with ComfyClient(f"127.0.0.1:{anything.server_address[1]}") as connected:
        yield connected


@pytest.mark.parametrize("call", CALLS)
def test_whatever_a_server_answers_ends_in_a_result_or_a_sentence(call, client, anything, tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    ask, usual = CALLS[call]

    @given(data=st.data())
    def odd(data: st.DataObject) -> None:
        anything.status = data.draw(st.sampled_from([200, 200, 200, 400, 404, 500, 503]))
        deep = st.sampled_from([10, 100_000]).map(lambda levels: nested(levels).encode())
        anything.content = (
            data.draw(st.one_of(st.just(b""), st.just(b""), st.binary(max_size=20), deep))
            or json.dumps(changed(data.draw, usual)).encode()
        )
        try:
            ask(client, tmp_path / "a.png")
        except UserError as error:
            message = str(error)
            assert "127.0.0.1" in message or "refused" in message

    odd()


@given(
    message=st.one_of(st.binary(max_size=30), st.text(max_size=30), st.builds(json.dumps, st.recursive(st.none(), st.lists)))
)
def test_a_message_of_no_known_kind_is_passed_over(message):
    found = _message(message)
    assert found is None or isinstance(found[1], dict)


def test_files_are_found_among_outputs_of_any_shape():
    outputs: Any = {"1": {"images": [FILE, None, "a.png"]}, "2": None, "3": {"images": None}, "4": []}
    assert Result(ID, outputs).files("images") == [FILE]


def test_an_answer_without_an_end_is_given_up(client, anything):
    anything.content = b" " * 3_000_000
    with pytest.raises(UserError, match=r"its answer is larger than 2 MB"):
        client._server.ask("GET", "queue", most=2_000_000)
