"""`flux-poke queue`: runs of a workflow on one ComfyUI or several, with what they leave brought here.

    runs = make_runs(read_graph(Path("mine.json")), prompts=["a fox", "an owl"])
    outcome = Queue(["127.0.0.1:8188", "127.0.0.1:8189"], runs, Path("out")).draw()
    outcome.done, outcome.failed, outcome.left

Each server draws one run at a time. A run that its server did not finish is drawn again, by whichever is free, and counts once
in the recordings (`recording/queued.py`): these are fetched after every run, so that a server may go for good, and add up to
`out/NAME/internals.safetensors`.
"""

from __future__ import annotations

import copy
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

from ..errors import UserError
from ..files import replacing
from ..progress import Progress, silent
from ..recording.internals import Internals
from ..recording.queued import MARK, QueuedRun, merged
from ..recording.recording import INTERNALS
from .asking import Missing, Refused, Unreachable
from .client import ComfyClient, Lost
from .journal import Journal
from .outputs import bring_outputs
from .runs import Run
from .sharing import Stopped, share
from .workflow import Graph, follow

#: Nodes that count neurons, and where those of this pack write on a server.
COUNTING, OUTPUT = ("FluxPokeRecord", "FluxPokeRecordInternals"), "flux_poke"
#: Where the servers' own recordings stand in one that is put together from them.
SERVERS = "servers"


@dataclass
class Queued:
    """What became of the runs: `done` (also in earlier sittings), why others `failed`, and which are `left`."""

    done: list[Run] = field(default_factory=list)
    failed: dict[Run, str] = field(default_factory=dict)
    left: list[Run] = field(default_factory=list)
    stopped: bool = False
    why: UserError | None = None


class Queue:
    """Runs to draw on `servers`; files go to `out`, where a journal makes it possible to go on (`resume`).

    `bar(name)` gives the `Progress` of all runs (for "") and of each server; `say` is told of each run that ended, and of
    servers that go and come back.
    """

    def __init__(
        self,
        servers: Sequence[str],
        runs: Sequence[Run],
        out: Path | None = None,
        resume: bool = False,
        say: Callable[[str], None] = lambda _: None,
        bar: Callable[[str], Progress] = lambda _: silent,
    ):
        self.servers, self.runs, self.out, self.say = [*dict.fromkeys(servers)], runs, out, say
        self.journal = Journal.at(out, resume)
        self._overall, self._bars = bar(""), {server: bar(server) for server in self.servers}
        self._parts = dict.fromkeys(self.servers, 0.0)
        self._done = sum(run.key in self.journal.done for run in runs)
        self._stopped, self._lock = Event(), Lock()

    def draw(self) -> Queued:
        """Draws what is not done. Ctrl-C interrupts what runs and leaves the rest.

        Raises `Unreachable` where no server answers at the beginning.
        """
        waiting = [run for run in self.runs if run.key not in self.journal.done]
        self._tell("", 0.0)
        outcome = share(self.servers, waiting, self._draw, self.say, self._stopped)
        done = [run for run in self.runs if run.key in self.journal.done]
        left = sorted(outcome.left, key=lambda run: run.number)
        failed = {run: outcome.failed[run] for run in self.runs if run in outcome.failed}
        return Queued(done, failed, left, self._stopped.is_set(), outcome.why)

    def recordings(self) -> dict[str, Internals]:
        """What all servers counted, by the recordings' names, put together in `out/NAME/internals.safetensors`."""
        if self.out is None:
            return {}
        found = {name: self._merged(self.out / name) for name in recording_names(self.runs)}
        return {name: total for name, total in found.items() if total is not None}

    def _draw(self, client: ComfyClient, run: Run) -> None:
        began, server = time.monotonic(), client.address
        given_up = self.journal.given_up(server)
        for attempt in given_up:  # it may still wait or run there
            client.cancel(attempt)
        attempt = str(uuid.uuid4())
        marked_graph = marked(run.graph, QueuedRun(f"{self.journal.id}-{run.key}", attempt, given_up))
        self.journal.begin(server, run.key, attempt)

        def report(doing: str, part: float, of: float) -> None:
            if self._stopped.is_set():
                raise Stopped
            self._bars[server](f"{server} · {run.name} · {doing}", part, of)
            self._tell(server, part / of)

        try:
            result = follow(client, marked_graph, report, f"Run {run.name}", prompt_id=attempt)
        except Refused:
            self.journal.forget(attempt)
            raise
        except (Unreachable, Lost):
            raise
        except UserError as error:
            self.say(f"Run {run.name}: {error}")
            raise
        finally:
            self._tell(server, 0.0)
        files = []
        if self.out is not None:
            files = bring_outputs(client.fetch, result, self.out, f"{run.number:04d}")
            for name in recording_names([run]):
                self._fetch_internals(client, name)
        self.journal.end(server, run.key, files)
        self._tell(server, 0.0, 1)
        where = f": {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}" if files else ""
        self.say(f"Run {run.name} done on {server} in {time.monotonic() - began:.1f} s{where}")

    def _tell(self, server: str, part: float, ended: int = 0) -> None:
        with self._lock:
            self._done += ended
            if server:
                self._parts[server] = part
            self._overall(f"{self._done} of {len(self.runs)} done", self._done + sum(self._parts.values()), len(self.runs))

    def _fetch_internals(self, client: ComfyClient, name: str) -> None:
        assert self.out is not None
        place = self.out / name / SERVERS / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', client.address)}.safetensors"
        if self.out.resolve() not in place.resolve().parents:
            raise UserError(f"The recording {name} would stand outside of {self.out}: give it another name.")
        with suppress(Missing):  # where nothing could be counted, the node says so
            content = client.fetch({"filename": INTERNALS, "subfolder": f"{OUTPUT}/{name}", "type": "output"})
            with replacing(place) as new:
                new.write_bytes(content)

    def _merged(self, folder: Path) -> Internals | None:
        files = sorted((folder / SERVERS).glob("*.safetensors"))
        found = {file: Internals.load(file) for file in files}
        newest = [
            file
            for place, file in enumerate(files)
            if not any(_holds(found[other], found[file], after > place) for after, other in enumerate(files) if other != file)
        ]
        if not newest:
            return None
        total = merged([found[file] for file in newest], list(map(str, newest)))
        total.save(folder / INTERNALS)
        return total


def send(servers: Sequence[str], runs: Sequence[Run]) -> list[tuple[Run, str, str]]:
    """Puts all runs into the servers' queues, in turns, without waiting: run, server and prompt id of each.

    Raises `UserError` where a server does not answer, or refuses the graph.
    """
    sent = []
    clients = [ComfyClient(address) for address in dict.fromkeys(servers)]
    for number, run in enumerate(runs):
        client = clients[number % len(clients)]
        sent.append((run, client.address, client.queue(run.graph)))
    for client in clients:
        client.__exit__()
    return sent


def marked(graph: Graph, run: QueuedRun) -> Graph:
    """The graph with nodes that count told which run it is.

    They have no such input: ComfyUI passes it over, but takes the node for another one than in any earlier attempt, so that
    it draws again instead of using a result whose counts may have been given up.
    """
    found = copy.deepcopy(graph)
    for node in found.values():
        if node["class_type"] in COUNTING:
            node["inputs"][MARK] = run.to_json()
    return found


def recording_names(runs: Sequence[Run]) -> list[str]:
    """Names of the recordings in which the runs count, as far as their graphs tell."""
    names: dict[str, None] = {}
    for graph in (run.graph for run in runs):
        for node in graph.values():
            if node["class_type"] in COUNTING:
                source = node["inputs"].get("recording")
                inputs = graph.get(source[0], {}).get("inputs", {}) if isinstance(source, list) else node["inputs"]
                if isinstance(inputs.get("name"), str):
                    names[inputs["name"].strip()] = None
    return [*names]


def _holds(one: Internals, other: Internals, equal: bool) -> bool:
    """Whether `one` is `other` at a later time (or, if `equal` counts, the same): servers may share their output folder."""
    same = bool(other.queued) and one.created == other.created
    return same and (one.queued > other.queued or (equal and one.queued == other.queued))
