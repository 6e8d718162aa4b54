"""A Ray cluster of two machines on this one, for all tests that need one: it is started once in a session.

from cluster_nodes import cluster_address        # a fixture: "127.0.0.1:PORT"

killer = Killer("Ranker")                        # ends a worker of that class in the middle of its work
"""

from __future__ import annotations

import atexit
import os
import signal
from contextlib import suppress
from functools import cache

import psutil
import pytest

# Ray looks at these when it is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


@cache
def _address() -> str:
    from ray.cluster_utils import Cluster

    own = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=own)
    atexit.register(cluster.shutdown)
    cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1", object_store_memory=200_000_000)
    return cluster.address


@pytest.fixture(scope="session")
def cluster_address() -> str:
    """Of a cluster of two machines with two processors each."""
    pytest.importorskip("ray")
    return _address()


class Killer:
    """Ends one worker of a class while it does `method`: to be called again and again, as progress is."""

    def __init__(self, kind: str, method: str = "work"):
        self.name, self.killed = f"ray::{kind}.{method}", 0

    def __call__(self, *_: object) -> None:
        if self.killed:
            return
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(self.name):
                    process.send_signal(signal.SIGKILL)
                    self.killed += 1
                    return
