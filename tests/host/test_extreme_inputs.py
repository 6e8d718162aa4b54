"""Every input of every node, given over the API what no page would give it: refused, a sentence, or a result; soon, in bounded
memory, and the next run goes through.

`HYPOTHESIS_PROFILE=hours` tries all values with every input; else each takes its turn, and the worst are tried with all.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from extremes import BEFORE, GRAPHS, LORA, NAME, Graph, filled, inputs_of, odd_values
from flux_poke.headless.server import ComfyServer
from PIL import Image
from safetensors.torch import save_file

#: Seconds after which what is merely much work is cancelled, and in which it then has to end.
LONG, SOON = 0.7, 60.0
#: Bytes that the server may take beyond what it takes for the graphs as they are.
ROOM = 600_000_000
#: How a run may end, and letters of what is said of it.
ENDS, MOST_SAID = ("refused", "sentence", "result", "cancelled"), 200_000
ALL = os.environ.get("HYPOTHESIS_PROFILE") == "hours"
#: Tried with every input.
WORST = ("nan", "\ud800")


class Host:
    """A server that graphs are sent to as they are: what clients refuse to write (NaN), the API takes."""

    def __init__(self, server: ComfyServer):
        assert server._process is not None
        self.url, self.process = f"http://{server.address}", server._process.pid
        self.session = requests.Session()
        self.info = self.ask("object_info")

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body) if body else None
        headers = {"Content-Type": "application/json"}
        answer = self.session.request("POST" if body else "GET", f"{self.url}/{path}", timeout=30, data=data, headers=headers)
        return json.loads(answer.text) if answer.text else None

    def run(self, graph: Graph, patience: float = LONG) -> tuple[str, str]:
        """What became of it ("refused", "sentence", "result", "cancelled", or something else), and what was said."""
        queued = self.ask("prompt", prompt=graph)
        if queued.get("error") or queued.get("node_errors"):
            if "prompt_id" in queued:
                self.ask("interrupt", prompt_id=queued["prompt_id"])
            return "refused", json.dumps(queued.get("node_errors"))
        name, began, cancelled = queued["prompt_id"], time.monotonic(), False
        while name not in (past := self.ask(f"history/{name}")):
            if time.monotonic() - began > patience and not cancelled:
                self.ask("interrupt", prompt_id=name)
                cancelled = True
            if time.monotonic() - began > patience + SOON:
                return "no end", ""
            time.sleep(0.01)
        said = dict(past[name]["status"]["messages"])
        if "execution_interrupted" in said:
            return "cancelled", ""
        if (error := said.get("execution_error")) is None:
            return "result", ""
        kind = error["exception_type"]
        return "sentence" if kind == "flux_poke.errors.UserError" else kind, error["exception_message"]

    def peak(self) -> int:
        """Most bytes since `forget`."""
        status = Path(f"/proc/{self.process}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    def forget(self) -> None:
        Path(f"/proc/{self.process}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def asked(server, host) -> Iterator[Host]:
    """The server, with what the graphs build on."""
    low = {"lora_A": torch.zeros(2, 128), "lora_B": torch.zeros(512, 2)}
    layer = "diffusion_model.double_blocks.0.img_mlp.0"
    save_file({f"{layer}.{name}.weight": part for name, part in low.items()}, host.base / "models" / "loras" / LORA)
    found = Host(server)
    for graph in BEFORE:
        assert found.run(filled(graph, found.info), patience=300) == ("result", "")
        found.info = found.ask("object_info")  # what was written stands in lists
    previews = host.output / "flux_poke" / NAME / "decoded" / "step_0"
    previews.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (16, 16)).save(previews / f"double_block_{number}.jpg")
    found.info = found.ask("object_info")
    yield found
    found.session.close()


def test_every_node_has_a_graph(asked):
    assert {kind.removeprefix("FluxPoke") for kind in asked.info if kind.startswith("FluxPoke")} == GRAPHS.keys()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("kind", GRAPHS)
def test_whatever_an_input_is_given_ends_refused_in_a_sentence_or_in_a_result(kind, asked):
    sound = filled(GRAPHS[kind], asked.info)
    assert asked.run(sound, patience=300) == ("result", "")
    asked.forget()
    before, counts, foreign = asked.peak(), Counter[str](), []
    for place, (name, (type_, options)) in enumerate(inputs_of(asked.info, f"FluxPoke{kind}").items()):
        for turn, value in enumerate(odd_values(type_, options)):
            if not (ALL or str(value) in WORST or turn % 7 == place % 7):
                continue
            graph = copy.deepcopy(sound)
            graph["x"]["inputs"][name] = value
            became, said = asked.run(graph)
            counts[became] += 1
            taken = became == "result" and isinstance(value, float) and not math.isfinite(value) and type_ == "FLOAT"
            if taken or became not in ENDS or (became == "sentence" and len(said) > MOST_SAID):
                foreign.append(f"{name} = {ascii(value)[:60]}: {became} {said[:300]}")
    print(f"{kind}: {dict(counts)}")  # with -s
    assert not foreign
    assert asked.peak() - before < ROOM
    assert asked.run(sound, patience=300) == ("result", "")
