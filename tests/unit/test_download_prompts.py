"""download_prompts.py against a local server that speaks the rows API, and sometimes fails, stalls or breaks off."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import flux_poke.download_prompts as module
import pytest
from flux_poke.download_prompts import DATASETS, LONGEST_WAIT, RETRIES, RowsServer, download_prompts
from flux_poke.errors import UserError
from flux_poke.files import locked
from flux_poke.prompts import SHIPPED
from urllib3 import Retry

LONG, SHORT = DATASETS
ROWS: dict[str, list[str | None]] = {
    LONG: [f'a sign "{n}"' if n % 7 == 0 else f"a fox,\nnumber {n % 800}" for n in range(1050)],
    SHORT: [None if n == 3 else f"  a house {n}\r\nin snow " for n in range(230)],
}


class Rows(ThreadingHTTPServer):
    """The rows API over `ROWS`; `fault(number)` says what goes wrong with request `number` ("" = nothing)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault: Callable[[int], str] = lambda number: ""
        self.times: list[float] = []
        self.served = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that were killed or gave up are no news."""


class Handler(BaseHTTPRequestHandler):
    server: Rows

    def do_GET(self):
        self.server.times.append(time.monotonic())
        fault = self.server.fault(len(self.server.times) - 1)
        query = {key: value[0] for key, value in parse_qs(urlparse(self.path).query).items()}
        rows, start, length = ROWS[query["dataset"]], int(query["offset"]), int(query["length"])
        assert (query["config"], query["split"]) == ("default", "train")
        assert length <= 100
        page = [
            {"row_idx": n, "row": {DATASETS[query["dataset"]]: rows[n]}, "truncated_cells": []}
            for n in range(start, min(start + length, len(rows)))
        ]
        answer = {"features": [], "rows": page, "num_rows_total": len(rows), "num_rows_per_page": 100, "partial": False}
        body, status, headers = json.dumps(answer).encode(), 200, {}
        if fault == "drop":
            self.connection.close()
            return
        if fault == "stall":
            time.sleep(1)
        if fault == "busy":
            status, body, headers = 429, b"{}", {"Retry-After": "1"}
        if fault == "busy for years":
            status, body, headers = 429, b"{}", {"Retry-After": "100000000"}
        if fault == "broken":
            status, body = 502, b"<html>Bad gateway</html>"
        if fault == "gone":
            status, body = 404, b'{"error": "The dataset does not exist."}'
        if fault == "half a character":
            body = body.replace(b"a fox", b"a \\ud83d fox")
        if fault == "no text":
            body = b'{"rows": [{"row": {"Prompt": 17}}], "num_rows_total": 1050}'
        if fault == "nonsense":
            body = b'{"rows": [{"row": {"caption": "a fox"}}], "num_rows_total": 1}'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if fault == "cut off":
            self.close_connection = True
            return
        if fault == "stall inside":
            self.wfile.flush()
            time.sleep(1)
        self.wfile.write(body[half:])
        self.server.served += status == 200

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Rows() as rows:
        threading.Thread(target=rows.serve_forever, args=(0.01,), daemon=True).start()
        yield rows
        rows.shutdown()


def patient(server: Rows) -> RowsServer:
    """As in earnest, without the waits."""
    return RowsServer(server.url, RETRIES.new(backoff_factor=0), timeout=(5, 0.4))


def expected(datasets=tuple(DATASETS), contains="") -> list[str]:
    """All prompts in the order of the turns: a page of each dataset as long as it has one."""
    found = []
    for start in range(0, 1100, 100):
        for name in datasets:
            for row in ROWS[name][start : start + 100]:
                prompt = (row or "").replace("\r\n", " ").replace("\n", " ").strip()
                if prompt and contains in prompt and prompt not in found:
                    found.append(prompt)
    return found


def test_all_prompts_of_both_datasets_arrive_once_and_on_one_line_each(server, tmp_path):
    out = tmp_path / "prompts.txt"
    count = download_prompts(out, limit=0, server=patient(server))
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines == expected()
    assert count == len(lines) == len(set(lines))
    assert {path.name for path in tmp_path.iterdir()} <= {"prompts.txt", ".prompts.txt.lock"}


def test_contains_limit_and_dataset_choose(server, tmp_path):
    out = tmp_path / "prompts.txt"
    assert download_prompts(out, [LONG], contains='"', limit=40, server=patient(server)) == 40
    assert out.read_text().splitlines() == expected([LONG], '"')[:40]
    assert server.served == 3, "40 of every 7th row are within the first 3 pages"


def test_failures_of_every_kind_are_waited_out(server, tmp_path):
    faults = ["", "drop", "broken", "stall", "cut off", "stall inside", "", "cut off", "cut off"]
    server.fault = lambda number: faults[number] if number < len(faults) else ""
    out = tmp_path / "prompts.txt"
    download_prompts(out, limit=0, server=patient(server))
    assert out.read_text().splitlines() == expected()
    assert len(server.times) == 11 + 3 + 7, "every page and every fault once"


def test_retry_after_is_respected(server, tmp_path):
    server.fault = lambda number: "busy" if number == 0 else ""
    download_prompts(tmp_path / "prompts.txt", [SHORT], server=patient(server))
    assert server.times[1] - server.times[0] >= 1


def test_a_server_that_is_busy_for_years_is_asked_again_before(server, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.fault = lambda number: "busy for years" if number == 0 else ""
    download_prompts(tmp_path / "prompts.txt", [SHORT], server=patient(server))
    assert max(waits) == LONGEST_WAIT


def test_half_a_character_costs_itself_alone(server, tmp_path):
    server.fault = lambda number: "half a character" if number == 0 else ""
    download_prompts(tmp_path / "prompts.txt", limit=0, server=patient(server))
    found = (tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert {"a ? fox, number 1", "a fox, number 101"} <= {*found}


def test_an_answer_without_an_end_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr("flux_poke.download_prompts.MOST_BYTES", 1000)
    with pytest.raises(UserError, match="answer is larger than"):
        download_prompts(tmp_path / "prompts.txt", server=patient(server))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("cut off", "run the same command again"),
        ("drop", "run the same command again"),
        ("broken", "status 502"),
        ("gone", r"refused .* \(404\): The dataset does not exist"),
        ("nonsense", "column 'Prompt'"),
        ("no text", "column 'Prompt'"),
    ],
)
def test_a_server_that_stays_broken_ends_in_one_sentence_and_nothing_is_lost(server, tmp_path, fault, sentence):
    out = tmp_path / "prompts.txt"
    out.write_text("what was there\n")
    server.fault = lambda number: fault if number >= 4 else ""
    with pytest.raises(UserError, match=sentence):
        download_prompts(out, limit=0, server=RowsServer(server.url, Retry(2, status_forcelist=[502], raise_on_status=False)))
    assert out.read_text() == "what was there\n"
    failed = len(server.times)
    server.fault = lambda number: ""
    download_prompts(out, limit=0, server=patient(server))
    assert out.read_text().splitlines() == expected()
    assert len(server.times) - failed == 11 + 3 - 4, "pages that had come are not fetched again"


def test_a_download_killed_in_the_middle_ends_like_one_that_was_not(server, tmp_path):
    """Killed four times at any moment after so many pages; each time it is the file, run as one, that goes on."""
    out = tmp_path / "prompts.txt"
    command = [sys.executable, module.__file__, "--server", server.url, "--out", str(out), "--limit", "0"]

    def slow(number: int) -> str:
        time.sleep(0.02)
        return "cut off" if number % 5 == 4 else ""

    server.fault = slow
    for pages, end in ((2, signal.SIGKILL), (5, signal.SIGINT), (7, signal.SIGKILL), (9, signal.SIGKILL)):
        running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while server.served < pages and running.poll() is None:
            time.sleep(0.002)
        running.send_signal(end)
        _, said = running.communicate(timeout=20)
        if end == signal.SIGINT:
            assert (running.returncode, "the same command goes on" in said) == (130, True), said
        else:
            assert running.returncode == -end, said
        assert not out.exists()
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert out.read_text(encoding="utf-8").splitlines() == expected()


def test_lines_written_after_the_last_saved_state_are_not_counted_twice(server, tmp_path):
    out = tmp_path / "prompts.txt"
    stop = RowsServer(server.url, Retry(0), timeout=(5, 5))
    server.fault = lambda number: "drop" if number >= 3 else ""
    with pytest.raises(UserError):
        download_prompts(out, limit=0, server=stop)
    with open(tmp_path / "prompts.txt.partial", "a") as partial:
        partial.write("a line of a page that was not fini")
    server.fault = lambda number: ""
    download_prompts(out, limit=0, server=patient(server))
    assert out.read_text().splitlines() == expected()


def test_other_options_do_not_mix_into_a_download_that_has_not_ended(server, tmp_path):
    out = tmp_path / "prompts.txt"
    server.fault = lambda number: "gone" if number >= 3 else ""
    with pytest.raises(UserError):
        download_prompts(out, limit=0, server=patient(server))
    with pytest.raises(UserError, match="has not ended"):
        download_prompts(out, contains='"', limit=0, server=patient(server))
    with pytest.raises(UserError, match="has not ended"):
        download_prompts(out, [LONG], limit=0, server=patient(server))
    (tmp_path / "prompts.txt.partial").unlink()
    with pytest.raises(UserError, match="delete both to start over"):
        download_prompts(out, limit=0, server=patient(server))


def test_progress_is_told_after_every_page(server, tmp_path):
    told = []
    download_prompts(tmp_path / "p.txt", [SHORT], limit=0, progress=lambda *now: told.append(now), server=patient(server))
    assert told == [
        ("99 prompts in 100 of 230 rows", 100, 230),
        ("199 prompts in 200 of 230 rows", 200, 230),
        ("229 prompts in 230 of 230 rows", 230, 230),
    ]


def test_what_is_no_list_of_prompts_is_not_replaced(server, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\xff\0")
    (tmp_path / "link.txt").symlink_to(SHIPPED)
    shipped = SHIPPED.read_bytes()
    for name, said in (
        ("notes.md", "is not a text file of prompts"),
        ("picture.txt", "is not a text file of prompts"),
        ("link.txt", "is the list that comes with Flux Poke"),
        (SHIPPED, "is the list that comes with Flux Poke"),
    ):
        with pytest.raises(UserError, match=said):
            download_prompts(tmp_path / name, [SHORT], limit=9, server=patient(server))
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert SHIPPED.read_bytes() == shipped
    assert not server.times


def test_a_second_download_into_one_file_is_told_who_has_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with locked(tmp_path / "p.txt"), pytest.raises(UserError, match=f"locked .* by process {os.getpid()} on "):
        download_prompts(tmp_path / "p.txt", [SHORT], server=patient(server))


def test_bad_options_are_named(tmp_path):
    with pytest.raises(UserError, match="found -1"):
        download_prompts(tmp_path / "p.txt", limit=-1)
    with pytest.raises(UserError, match="'someone/else'"):
        download_prompts(tmp_path / "p.txt", ["someone/else"])


def test_the_command_runs_from_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "custom_nodes" / "flux-poke.1"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "download_prompts.py", "errors.py", "files.py", "progress.py", "prompts.py"):
        shutil.copy(Path(module.__file__).with_name(name), folder)
    command = [sys.executable, "-I", folder / "download_prompts.py", "--limit", "-1"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, "found -1" in run.stderr) == (1, True), run.stderr
