"""A Ray cluster of two machines, both on this one, and what happens to such: workers and machines are lost.

with two_nodes() as nodes:
    nodes.lose_worker("TinyWorker"), nodes.lose_machine(), nodes.lose_all()
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from flux_poke.cluster.connect import LOCAL, SETTINGS

os.environ |= SETTINGS | LOCAL  # before Ray is imported


@dataclass
class Nodes:
    cluster: Any
    second: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add_machine(self) -> None:
        options = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}
        self.second.append(self.cluster.add_node(**options))

    def lose_machine(self) -> None:
        self.cluster.remove_node(self.second.pop(), allow_graceful=False)

    def lose_all(self) -> None:
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)

    def workers(self, kind: str) -> list[psutil.Process]:
        """Processes of actors of a class, those of this cluster and of this test run."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if kind in "".join(process.cmdline()) and process.cmdline()[0].startswith("ray::"):
                    found.append(process)
        return found

    def lose_worker(self, kind: str, number: int = 0, how: signal.Signals = signal.SIGKILL) -> bool:
        """Whether there was one; with `kind` "CLASS.work", it had not come to the end of its work."""
        workers = self.workers(kind)
        if not workers:
            return False
        worker = workers[number % len(workers)]
        with suppress(psutil.Error):
            worker.suspend()  # what it does now does not end before the next line looks
            if kind in "".join(worker.cmdline()):
                worker.send_signal(how)
                return True
            worker.resume()
        return False


class Killer:
    """Ends one worker of a class in the middle of its work, within the `with`."""

    def __init__(self, nodes: Nodes, kind: str):
        self.nodes, self.kind, self.killed = nodes, f"{kind}.work", 0
        self._over, self._thread = threading.Event(), threading.Thread(target=self._hunt)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _hunt(self) -> None:
        while not self.killed and not self._over.wait(0.02):
            self.killed += self.nodes.lose_worker(self.kind)


@contextmanager
def two_nodes(cpus: int = 2) -> Iterator[Nodes]:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100_000_000}
    nodes = Nodes(Cluster(initialize_head=True, head_node_args=head))
    nodes.add_machine()
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
