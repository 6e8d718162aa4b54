"""The client and the server starter on a real ComfyUI, with its own nodes alone."""

from __future__ import annotations

import io
import socket
import threading
import time

import numpy as np
import pytest
import requests
from flux_poke.errors import UserError
from flux_poke.headless.capture import CaptureRequest, capture
from flux_poke.headless.client import ComfyClient, Interrupted
from flux_poke.headless.server import ComfyServer, free_port
from PIL import Image


def picture_graph(color: int, batch: int = 2) -> dict:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": batch, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "client"}},
    }


def slow_graph(seed: int) -> dict:
    """Many nodes of some work each: there is time to interrupt between them."""
    graph: dict = {"0": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 1, "color": seed}}}
    for index in range(1, 200):
        blur = {"image": [str(index - 1), 0], "blur_radius": 20, "sigma": 5.0}
        graph[str(index)] = {"class_type": "ImageBlur", "inputs": blur}
    graph["end"] = {"class_type": "PreviewImage", "inputs": {"images": ["199", 0]}}
    return graph


def test_a_run_gives_its_pictures_and_tells_which_node_is_at_work(client):
    seen: list[str] = []
    result = client.run(picture_graph(0x102030), lambda node, step, steps: seen.append(node))
    assert [np.asarray(Image.open(io.BytesIO(client.fetch(file))))[0, 0].tolist() for file in result.files("images")] == [
        [0x10, 0x20, 0x30]
    ] * 2
    assert list(dict.fromkeys(seen)) == ["1", "2"]
    assert result.executed == ("1", "2")
    assert client.history(result.prompt_id)["outputs"].keys() == {"2"}


def test_a_graph_that_is_refused_is_named_by_node_and_input(client):
    graph = picture_graph(0)
    graph["1"]["inputs"] |= {"width": -5}
    del graph["2"]["inputs"]["images"]
    with pytest.raises(UserError, match=r"SaveImage \(node 2\): Required input is missing images"):
        client.run(graph)
    with pytest.raises(UserError, match="NoSuchNode"):
        client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_graph_that_would_run_in_part_is_refused_whole(client):
    graph = picture_graph(0)
    graph["3"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}
    with pytest.raises(UserError, match=r"SaveImage \(node 3\): Required input is missing filename_prefix"):
        client.run(graph)


def test_a_failing_node_is_named_with_its_message(client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    name = client.upload(tmp_path / "broken.png")
    graph = {
        "a": {"class_type": "LoadImage", "inputs": {"image": name}},
        "b": {"class_type": "PreviewImage", "inputs": {"images": ["a", 0]}},
    }
    with pytest.raises(UserError, match=r"LoadImage \(node a\)"):
        client.run(graph)


def test_an_uploaded_picture_is_there_under_its_name(client, tmp_path):
    Image.new("RGB", (20, 10), (9, 8, 7)).save(tmp_path / "up.png")
    name = client.upload(tmp_path / "up.png", "from client")
    assert name == "from client/up.png"
    graph = {
        "a": {"class_type": "LoadImage", "inputs": {"image": name}},
        "b": {"class_type": "PreviewImage", "inputs": {"images": ["a", 0]}},
    }
    (file,) = client.run(graph).files("images", "b")
    assert Image.open(io.BytesIO(client.fetch(file))).getpixel((3, 3)) == (9, 8, 7)


def test_models_are_listed(client, host):
    before = client.models("diffusion_models")
    (host.base / "models" / "diffusion_models" / "a.safetensors").touch()
    assert client.models("diffusion_models") == sorted([*before, "a.safetensors"])


def test_an_interrupted_run_ends_as_one(client):
    prompt_id = client.queue(slow_graph(1))

    def stop(node: str, step: int, steps: int) -> None:
        if node == "5":
            client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, stop)


def test_a_run_that_waits_is_taken_out_of_the_queue_and_one_that_is_running_is_stopped(client):
    running, waiting = client.queue(slow_graph(4)), client.queue(slow_graph(5))

    def stop(node: str, step: int, steps: int) -> None:
        if node == "5":
            client.cancel(waiting)
            client.cancel(running)

    with pytest.raises(Interrupted):
        client.wait(running, stop)
    time.sleep(1)
    assert client.history(waiting) == {}
    assert requests.get(f"http://{client.address}/queue", timeout=30).json() == {"queue_running": [], "queue_pending": []}


#: A pack that lengthens the moment between taking a run from the queue and beginning it.
LATE_BEGINNINGS = """
import time, nodes
interrupt = nodes.interrupt_processing
def late(value=True):
    if not value:
        time.sleep(0.5)
    interrupt(value)
nodes.interrupt_processing = late
NODE_CLASS_MAPPINGS = {}
"""


def test_a_run_is_stopped_also_in_the_moment_in_which_it_begins(host):
    pack = host.base / "custom_nodes" / "late_beginnings.py"
    pack.write_text(LATE_BEGINNINGS)
    try:
        with host.start() as server, ComfyClient(server.address) as client:
            running = client.queue(slow_graph(7))
            while not requests.get(f"http://{client.address}/queue", timeout=30).json()["queue_running"]:
                time.sleep(0.01)
            client.cancel(running)
            with pytest.raises(Interrupted):
                client.wait(running)
    finally:
        pack.unlink()


def test_a_drawing_that_waits_for_its_turn_can_be_given_up(client, tmp_path, monkeypatch):
    monkeypatch.setattr("flux_poke.headless.client.SILENCE", 0.2)
    running = client.queue(slow_graph(6))
    said: list[str] = []

    def give_up(doing: str, part: float, of: float) -> None:
        said.append(doing)
        raise KeyboardInterrupt

    with ComfyClient(client.address) as other, pytest.raises(KeyboardInterrupt):
        capture(other, CaptureRequest("a 7", "tiny"), tmp_path, give_up)
    queue = requests.get(f"http://{client.address}/queue", timeout=30).json()
    assert [entry[1] for entry in queue["queue_running"]] == [running], "the other run goes on"
    assert queue["queue_pending"] == []
    assert said == ["waiting for its turn"]
    client.cancel(running)
    with pytest.raises(Interrupted):
        client.wait(running)


def test_a_run_survives_a_lost_connection(client):
    def lose(node: str, step: int, steps: int) -> None:
        if node == "1":
            client._socket.sock.shutdown(socket.SHUT_RDWR)

    assert len(client.run(picture_graph(0x445566), lose).files("images")) == 2


def test_a_run_whose_history_was_cleared_is_reported(client):
    prompt_id = client.queue(picture_graph(0x778899))
    with ComfyClient(client.address) as other:
        other.run(picture_graph(0x99AABB))  # after the first
    requests.post(f"http://{client.address}/history", json={"clear": True}, timeout=30).raise_for_status()
    with pytest.raises(UserError, match=r"no longer knows the run .* history was cleared"):
        client.wait(prompt_id)


def test_a_server_that_dies_during_a_run_is_reported(host):
    with host.start() as server, ComfyClient(server.address) as client:
        prompt_id = client.queue(slow_graph(2))
        threading.Timer(1.0, server._process.kill).start()
        with pytest.raises(UserError, match="No ComfyUI answers"):
            client.wait(prompt_id)
        with pytest.raises(UserError, match="No ComfyUI answers"):
            client.queue(slow_graph(3))


def test_where_no_server_is_that_is_said():
    with pytest.raises(UserError, match="No ComfyUI answers at"):
        ComfyClient(f"127.0.0.1:{free_port()}")


def test_a_folder_without_comfyui_and_one_that_does_not_start_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no ComfyUI"):
        ComfyServer(tmp_path)
    (tmp_path / "main.py").write_text("raise SystemExit('no such option')")
    failing = ComfyServer(tmp_path, log=tmp_path / "log")
    with pytest.raises(UserError, match=r"did not come up at .*: it ended\. The last line of its log: no such option"), failing:
        pass
