"""What answers at ComfyUI's address may be anything: every call ends in what was asked for, or in a sentence."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
    """Answers everything with `status` and `content`; a byte every `pause` seconds, where there is one."""

    status, content, pause = 200, b"{}", 0.0
    headers: Mapping[str, object] = {}

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                server: Any = self.server
                self.send_response(server.status)
                for name, value in (server.headers or {"Content-Length": len(server.content)}).items():
                    self.send_header(name, f"{value}")
                self.end_headers()
                if not server.pause:
                    self.wfile.write(server.content)
                with suppress(ConnectionError):
                    for byte in server.content if server.pause else b"":
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(server.pause)

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
    anything.status, anything.content, anything.pause, anything.headers = 200, b"{}", 0.0, {}
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


def test_an_answer_that_drips_is_given_up(client, anything, monkeypatch):
    monkeypatch.setattr("flux_poke.headless.asking.PATIENCE", 0.5)
    anything.content, anything.pause = b" " * 200, 0.1
    began = time.monotonic()
    with pytest.raises(UserError, match=r"its answer has not ended after 0 s"):
        client._server.ask("GET", "queue")
    assert time.monotonic() - began < 10, "the whole of it takes 20 s"


@pytest.mark.parametrize("how", ["Content-Length", "Content-Encoding", "Transfer-Encoding"])
def test_an_answer_comes_whole_however_it_is_sent_and_has_its_limit_unpacked(client, anything, how):
    whole = b"12345678" * 40_000
    packed = gzip.compress(whole)
    pieces = [whole[at : at + 7_000] for at in range(0, len(whole), 7_000)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    anything.content, anything.headers = {
        "Content-Length": (whole, {"Content-Length": len(whole)}),
        "Content-Encoding": (packed, {"Content-Length": len(packed), "Content-Encoding": "gzip"}),
        "Transfer-Encoding": (chunks, {"Transfer-Encoding": "chunked"}),
    }[how]
    assert client._server.ask("GET", "queue") == whole
    with pytest.raises(UserError, match=r"its answer is larger than 0 MB"):
        client._server.ask("GET", "queue", most=len(whole) - 1)
    anything.content = anything.content[: len(anything.content) // 2]
    with pytest.raises(UserError):
        client._server.ask("GET", "queue")
