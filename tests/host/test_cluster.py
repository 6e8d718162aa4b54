"""Recording on a cluster whose workers start ComfyUIs of their own: one that hangs is found out, and none is left behind."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from flux_poke.cluster.connect import Needs, connected
from flux_poke.cluster.record import ComfyJob, record
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient
from flux_poke.headless.runs import make_runs
from flux_poke.recording.recording import Recording
from flux_poke.tiny.words import digit_prompts
from two_nodes import two_nodes

PROMPTS = [digit_prompts(number)[3] for number in range(10)]


@pytest.fixture
def graph(workflow) -> dict:
    """The shipped graph that records a picture, quick; internals and rows under one name."""
    graph = workflow("try_it_tiny")
    del graph["9"], graph["10"]
    record = {"name": "of a cluster", "rows": 8, "steps": 1, "max_gb": 1.0, "probe_steps": 1}
    graph["2"] = {"class_type": "FluxPokeRecord", "inputs": {"model": graph["2"]["inputs"]["model"], **record}}
    graph["5"]["inputs"]["batch_size"] = 1
    graph["6"]["inputs"] |= {"steps": 8, "seed": 5}
    graph["8"]["inputs"] |= {"images": ["7", 0]}
    return graph


def comfyuis() -> list[psutil.Process]:
    """Those that workers of clusters started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "main.py" in words[1:2] and any("flux_poke_worker_" in word for word in words):
                found.append(process)
    return found


def require_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left


def test_a_comfyui_that_hangs_is_replaced_and_every_run_counts_once(host, client: ComfyClient, graph, tmp_path):
    for run in make_runs(graph, [], PROMPTS):
        client.run(run.graph)
    alone = Recording.open(host.recorded("of a cluster"))

    seen: list[psutil.Process] = []
    outputs: list[Path] = []

    def progress(what: str, done: float, total: float) -> None:
        if "2 running" in what and not seen:
            seen.extend(comfyuis())
            outputs.extend(Path(words[words.index("--output-directory") + 1]) for words in (one.cmdline() for one in seen))
            seen[0].send_signal(signal.SIGSTOP)

    options = ["--base-directory", str(host.base), *host.options]
    job = ComfyJob(copy.deepcopy(graph), host.comfyui, batch=2, options=options, patience=10)
    said: list[str] = []
    with two_nodes(1) as nodes, connected(nodes.address):
        recorded = record(job, PROMPTS, str(tmp_path / "all"), Needs(), 2, 300, progress, said.append)
    assert len(seen) == 2
    assert recorded.lost == 1
    assert not recorded.failed
    assert "its ComfyUI was at" in said[0] or "No ComfyUI answers" in said[0]
    found = Recording.open(tmp_path / "all")
    assert found.internals().runs == alone.internals().runs == len(PROMPTS)
    for name, site in alone.internals().sites.items():
        assert torch.equal(found.internals().sites[name].fires, site.fires)
        assert torch.equal(found.internals().sites[name].sum, site.sum)
    assert found.states().images("single-0").tolist() == [*range(len(PROMPTS))]
    rows = next(found.states().rows("single-0"))
    assert len(rows) == len(next(alone.states().rows("single-0"))) == 8 * len(PROMPTS)
    assert len(rows.step.unique()) > 1  # others in every piece
    assert found.states().amplification == alone.states().amplification
    require_gone([*seen, *comfyuis()])
    assert outputs
    assert not [file for output in outputs for file in output.rglob("*.*")]


def test_a_workflow_that_records_under_two_names_is_refused(graph, tmp_path):
    twice = copy.deepcopy(graph)
    twice["2b"] = copy.deepcopy(twice["2"])
    twice["2b"]["inputs"]["name"] = "another"
    with pytest.raises(UserError, match="records under 2 names"):
        ComfyJob(twice, tmp_path).pieces(PROMPTS)


def test_a_comfyui_ends_with_who_started_it_even_by_a_kill(host):
    code = """
import sys, time
from pathlib import Path
from flux_poke.headless.server import ComfyServer, start_options
with ComfyServer(Path(sys.argv[1]), [*start_options(), "--base-directory", sys.argv[2]]) as server:
    print(server.address, flush=True)
    time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code, host.comfyui, host.base], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline().startswith("127.0.0.1:")
    started = psutil.Process(starter.pid).children(recursive=True)
    assert started
    starter.kill()
    starter.wait()
    require_gone(started)


def test_a_folder_without_comfyui_is_a_sentence(graph, tmp_path):
    with connected("local"), pytest.raises(UserError, match=r"holds no ComfyUI: expected its main\.py there"):
        record(ComfyJob(graph, Path(tmp_path / "nothing")), PROMPTS, str(tmp_path / "all"), Needs(), workers=1)
