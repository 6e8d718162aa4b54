"""`flux-poke queue` on real servers with the tiny FLUX: runs survive servers that end, and count once."""

from __future__ import annotations

import copy
import io
import json
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from flux_poke.cli import app
from flux_poke.headless.client import ComfyClient, Interrupted
from flux_poke.headless.server import ComfyServer
from flux_poke.recording.internals import Internals
from flux_poke.recording.queued import merge_files
from flux_poke.tiny.words import digit_prompts
from PIL import Image
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
TEXTS = [digit_prompts(number % 10)[number // 10] for number in range(20)]
SEED = 23


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "prompts.txt"


@pytest.fixture
def drawing(workflow, tmp_path) -> Callable[..., Path]:
    """The shipped graph in a file, quick, with a recording of its own; `tail` are nodes of some work behind the sampler, so
    that there is time after a run was counted and before it has ended."""

    def make(name: str, tail: int = 0) -> Path:
        graph = workflow("try_it_tiny")
        del graph["9"], graph["10"]
        graph["2"]["inputs"]["name"] = name
        graph["5"]["inputs"]["batch_size"] = 1
        graph["6"]["inputs"] |= {"steps": 3, "seed": SEED}
        graph["8"]["inputs"] |= {"images": ["7", 0], "filename_prefix": f"{name}/drawn"}
        if tail:
            scaled = {"image": ["7", 0], "upscale_method": "nearest-exact", "scale_by": 2.0}
            graph["100"] = {"class_type": "ImageScaleBy", "inputs": scaled}
            for number in range(101, 101 + tail):
                blur = {"image": [str(number - 1), 0], "blur_radius": 20, "sigma": 5.0}
                graph[str(number)] = {"class_type": "ImageBlur", "inputs": blur}
            graph["8"]["inputs"]["images"] = [str(100 + tail), 0]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(graph))
        return path

    return make


def queue(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["queue", *map(str, arguments)])


@pytest.fixture(scope="module")
def alone(server: ComfyServer, host, workflow) -> Internals:
    """What one server counts that draws all prompts one after the other, without a queue of ours."""
    graph = workflow("try_it_tiny")
    del graph["9"], graph["10"]
    graph["2"]["inputs"]["name"] = "queue-alone"
    graph["5"]["inputs"]["batch_size"] = 1
    graph["8"]["inputs"]["images"] = ["7", 0]
    with ComfyClient(server.address) as client:
        for number, text in enumerate(TEXTS):
            graph["3"]["inputs"]["text"] = text
            graph["6"]["inputs"] |= {"steps": 3, "seed": SEED + number}
            client.run(graph)
    return Internals.load(host.recorded("queue-alone"))


def assert_equal(found: Internals, expected: Internals) -> None:
    assert (found.runs, found.steps) == (expected.runs, expected.steps)
    assert found.sites.keys() == expected.sites.keys()
    for name, site in expected.sites.items():
        assert found.sites[name].tokens == site.tokens
        for part in ("fires", "sum", "sum_sq"):
            assert torch.equal(getattr(found.sites[name], part), getattr(site, part)), f"{part} of {name}"


def counted(path: Path) -> int:
    """How many runs a server has counted so far."""
    return Internals.load(path).runs if path.exists() else 0


def when(true: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """Does something as soon as something is true, beside the test."""

    def wait() -> None:
        end = time.monotonic() + 500
        while time.monotonic() < end:
            if true():
                then()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def kill(server: ComfyServer) -> None:
    assert server._process is not None
    server._process.kill()
    server._process.wait()


def pictures(out: Path) -> list[str]:
    return sorted(path.name.split("_")[0] for path in out.glob("*.png"))


EACH = [f"{number:04d}" for number in range(len(TEXTS))]


def test_a_server_that_is_restarted_in_the_middle_loses_no_prompt_and_counts_none_twice(
    server, host, alone, drawing, prompts, tmp_path
):
    workflow, file = drawing("queue-restarted", tail=6), host.recorded("queue-restarted")

    def restart() -> None:
        kill(server)
        seen.append(counted(file))
        server.__enter__()

    seen: list[int] = []
    restarting = when(lambda: counted(file) >= 8, restart)
    result = queue(workflow, "--server", server.address, "--prompts", prompts, "--out", tmp_path / "out")
    restarting.join()
    assert result.exit_code == 0, result.output
    assert 8 <= seen[0] < len(TEXTS)
    journal = json.loads((tmp_path / "out" / "queue.json").read_text())
    assert len(journal["done"]) == len(TEXTS)
    assert result.output.count("done on") == len(TEXTS)
    assert "Its run is given back" in result.output
    assert f"ComfyUI at {server.address} answers again" in result.output
    assert pictures(tmp_path / "out") == EACH
    assert_equal(Internals.load(file), alone)
    assert_equal(Internals.load(tmp_path / "out" / "queue-restarted" / "internals.safetensors"), alone)


@pytest.fixture
def second(host, tmp_path_factory) -> Iterator[tuple[ComfyServer, Path]]:
    """Another server with folders of its own, and where it keeps the recording "queue-shared"."""
    other = type(host)(host.comfyui, tmp_path_factory.mktemp("second") / "base")
    with other.start() as running:
        yield running, other.recorded("queue-shared")


def test_of_two_servers_one_is_killed_and_the_other_finishes(server, host, second, alone, drawing, prompts, tmp_path):
    workflow, here, (other, there) = drawing("queue-shared", tail=6), host.recorded("queue-shared"), second
    killing = when(lambda: counted(there) >= 4, lambda: kill(other))
    both = ("--server", server.address, "--server", other.address)
    result = queue(workflow, *both, "--prompts", prompts, "--out", tmp_path / "out")
    killing.join()
    assert result.exit_code == 0, result.output
    done = json.loads((tmp_path / "out" / "queue.json").read_text())["done"]
    by = [address for address, _ in done.values()]
    assert len(by) == len(TEXTS)
    assert 3 <= by.count(other.address) < len(TEXTS)
    assert pictures(tmp_path / "out") == EACH
    assert_equal(Internals.load(tmp_path / "out" / "queue-shared" / "internals.safetensors"), alone)

    # the run that was drawn when it was killed may have been counted there, and was counted here again
    left = Internals.load(there)
    assert left.last is not None
    twice = left.queued & Internals.load(here).queued
    assert twice <= {left.last.key}
    assert left.runs + counted(here) == len(TEXTS) + len(twice)
    assert_equal(merge_files(tmp_path / "by hand.safetensors", [here, there]), alone)


def test_two_servers_on_one_output_folder_count_into_one_file_what_one_counts(server, host, alone, drawing):
    graph = json.loads(drawing("queue-one-folder").read_text())
    failed: list[BaseException] = []

    def draw(address: str, prefix: str, numbers: range) -> None:
        try:
            with ComfyClient(address) as client:
                for number in numbers:
                    graph_ = copy.deepcopy(graph)
                    graph_["3"]["inputs"]["text"] = TEXTS[number]
                    graph_["6"]["inputs"]["seed"] = SEED + number
                    graph_["8"]["inputs"]["filename_prefix"] = f"queue-one-folder/{prefix}"
                    client.run(graph_)
        except BaseException as error:
            failed.append(error)

    with host.start() as other:
        shares = ((server.address, "a", range(0, 20, 2)), (other.address, "b", range(1, 20, 2)))
        threads = [threading.Thread(target=draw, args=share) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert_equal(Internals.load(host.recorded("queue-one-folder")), alone)


def test_ctrl_c_interrupts_what_runs_and_resume_goes_on_there(server, client, host, alone, drawing, prompts, tmp_path):
    workflow, out = drawing("queue-resumed"), tmp_path / "out"
    given = ["queue", str(workflow), "--server", server.address, "--prompts", str(prompts), "--out", str(out)]
    command = [sys.executable, "-m", "flux_poke.cli", *given, "--set", "KSampler.steps=3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        stopping = when(lambda: counted(host.recorded("queue-resumed")) >= 3, lambda: process.send_signal(signal.SIGINT))
        said, _ = process.communicate(timeout=120)
        stopping.join()
    assert process.returncode == 1, said
    assert "Error: Stopped, and what ran was interrupted:" in said
    assert "--resume goes on" in said
    assert requests.get(f"http://{client.address}/queue", timeout=30).json() == {"queue_running": [], "queue_pending": []}
    done = len(json.loads((out / "queue.json").read_text())["done"])
    assert f"{done} of {len(TEXTS)} runs done, {len(TEXTS) - done} left" in said
    assert 2 <= done < len(TEXTS)

    again = queue(*given[1:], "--set", "KSampler.steps=3")
    assert again.exit_code != 0
    assert "add --resume" in str(again.exception)
    result = queue(*given[1:], "--set", "6.steps=3", "--resume")
    assert result.exit_code == 0, result.output
    assert result.output.count("done on") == len(TEXTS) - done
    assert pictures(out) == EACH
    assert_equal(Internals.load(host.recorded("queue-resumed")), alone)


def test_every_prompt_gives_the_picture_that_its_own_seed_draws(server, client, drawing, prompts, tmp_path):
    result = queue(
        drawing("queue-seeds"), "--server", server.address, "--prompts", prompts, "--start", 5, "--count", 2, "-o", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert pictures(tmp_path) == ["0005", "0006"]
    graph = json.loads(drawing("queue-unqueued").read_text())
    graph["3"]["inputs"]["text"] = TEXTS[6]
    graph["6"]["inputs"]["seed"] = SEED + 6
    (file,) = client.run(graph).files("images")
    (found,) = tmp_path.glob("0006_*.png")
    assert np.array_equal(np.asarray(Image.open(found)), np.asarray(Image.open(io.BytesIO(client.fetch(file)))))


def test_a_run_that_fails_is_named_and_the_others_go_on(server, drawing, tmp_path):
    graph = json.loads(drawing("queue-failing").read_text())
    graph["20"] = {"class_type": "FluxPokePrompts", "inputs": {"file": "prompts.txt", "index": 0, "regex": ""}}
    graph["3"]["inputs"]["text"] = ["20", 0]
    (tmp_path / "failing.json").write_text(json.dumps(graph))
    (tmp_path / "prompts.txt").write_text("a\n(\nthe")
    given = ("--prompts", tmp_path / "prompts.txt", "--set", "FluxPokePrompts.regex={prompt}", "--out", tmp_path / "out")
    result = queue(tmp_path / "failing.json", "--server", server.address, *given)
    assert result.exit_code == 1
    assert "2 of 3 runs done, 1 failed" in str(result.exception)
    assert "Run 1 (() failed: FluxPokePrompts (node 20) failed" in result.output
    assert pictures(tmp_path / "out") == ["0000", "0002"]


def test_a_graph_that_is_refused_fails_with_the_servers_words(server, drawing, tmp_path):
    result = queue(drawing("queue-refused"), "--server", server.address, "--set", "6.steps=0", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "Run 0 failed: ComfyUI refused the graph: KSampler (node 6)" in result.output


def test_without_waiting_the_runs_are_in_the_servers_queue(server, client, drawing, prompts):
    result = queue(drawing("queue-sent"), "--server", server.address, "--prompts", prompts, "--count", 3, "--no-wait")
    assert result.exit_code == 0, result.output
    ids = [line.split()[0] for line in result.output.splitlines()]
    assert len(ids) == 3
    for prompt_id in ids:
        assert client.wait(prompt_id).files("images")


@pytest.fixture
def without_websockets(server) -> Iterator[str]:
    """The address of a gateway to the server that passes everything but websockets, as some proxies do."""
    host, port = server.address.split(":")
    gate = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            target.close()

    def serve() -> None:
        while True:
            try:
                asking, _ = gate.accept()
            except OSError:
                return
            if asking.recv(7, socket.MSG_PEEK) == b"GET /ws":
                asking.close()
                continue
            answering = socket.create_connection((host, int(port)))
            for ends in ((asking, answering), (answering, asking)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{gate.getsockname()[1]}"
    gate.close()


def test_without_a_websocket_runs_are_followed_by_asking(without_websockets, drawing):
    graph = json.loads(drawing("queue-asked").read_text())
    with ComfyClient(without_websockets) as client:
        assert client._socket is None
        assert len(client.run(graph).files("images")) == 1
        prompt_id = client.queue({**graph, "6": {**graph["6"], "inputs": graph["6"]["inputs"] | {"steps": 10_000}}})
        while not requests.get(f"{without_websockets}/queue", timeout=30).json()["queue_running"]:
            time.sleep(0.01)
        client.cancel(prompt_id)
        with pytest.raises(Interrupted):
            client.wait(prompt_id)


def test_the_examples_of_the_guide_run_as_they_are_written(server, tmp_path, monkeypatch, capsys):
    guide = (ROOT / "docs" / "queue.md").read_text()
    (tmp_path / "workflows").symlink_to(ROOT / "workflows")
    monkeypatch.chdir(tmp_path)
    named: dict = {}
    examples = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        example = example.replace("127.0.0.1:8188", server.address).replace(', "127.0.0.1:8189"', "")
        (tmp_path / "example.py").write_text(example)
        named = runpy.run_path(str(tmp_path / "example.py"), init_globals=named)
    assert len(list(tmp_path.glob("*.png"))) == 4 + 1  # the graph's batch, and the report
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2 * 4
    said = capsys.readouterr().out
    assert "2 {} []\n" in said
    assert re.search(r"^tiny \d+ tensor\(", said, re.MULTILINE)
