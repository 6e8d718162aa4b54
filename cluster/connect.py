"""A Ray cluster for the length of a `with`.

    with connected("local"):                         # a Ray of this machine's own; "auto", "ray://host:10001", "host:6379"
        require_room(Needs(gpus=1))
        watched(work)                                # raises `Vanished` where the cluster does not answer any more

The packages of this project are installed on every machine of a cluster, in one version.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import UserError
from ..progress import Progress, silent

Result = TypeVar("Result")

#: Seconds in which a cluster may be silent before it is given up: Ray ends a program that stays with it after 60.
SILENCE = 15.0
#: Seconds that saying goodbye to it may take, and between two looks at it.
GOODBYE, LOOK = 20.0, 0.5
#: Seconds in which a small result that is there must come: Ray waits for ever for one that was lost with its machine.
FETCH = 30.0
#: What Ray looks at when it is imported: it tells nobody of itself, connects to no other cluster where this one is lost, and
#: under `uv run` sends workers no copy of all that stands in this folder.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
#: And for one of this machine's own: nobody else is to reach it.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Vanished(UserError):
    """The cluster does not answer any more."""

    status = 3


@dataclass(frozen=True)
class Needs:
    """What Ray sets aside for one worker or task: processor cores and GPUs (shares of one count), and bytes of main memory."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """As Ray takes them."""
        given = {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory}
        return {name: value for name, value in given.items() if value or name == "num_cpus"}

    @property
    def threads(self) -> int:
        """How many threads torch may use."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU", *([f"{self.gpus:g} GPU"] if self.gpus else [])]
        return " and ".join([*parts, *([f"{self.memory / 1e9:.3g} GB"] if self.memory else [])])


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to the cluster at `address` ("auto": the one that this machine is part of), or starts one ("local").

    Raises `UserError` where Ray is not installed, or nothing answers there.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("Work on a cluster runs on Ray, which is not installed: pip install 'flux-poke[cluster]'.")
    for name, value in (SETTINGS | LOCAL if address == "local" else SETTINGS).items():
        os.environ.setdefault(name, value)
    import ray

    nobody = "start one (ray start --head), give its address, or use local."
    if ":" in address and not _answers(address.removeprefix("ray://")):  # Ray would try for minutes
        raise Vanished(f"No Ray cluster answers at {address}: {nobody}")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise Vanished(f"No Ray cluster answers at {address} ({first:.200}): {nobody}") from error
    try:
        yield
    finally:
        if not _in_time(ray.shutdown, GOODBYE):
            atexit.unregister(ray.shutdown)


def require_room(needs: Needs) -> int:
    """How many workers with these `needs` the machines of the cluster have room for; raises `UserError` where none has any."""
    import ray

    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": float(needs.memory)}
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    room = sum(
        min(int(machine.get(name, 0.0) / amount) for name, amount in wanted.items() if amount) if needs.options else 0
        for machine in machines
    )
    if not room:
        there = "; ".join(
            f"{machine.get('CPU', 0):g} CPU, {machine.get('GPU', 0):g} GPU, {machine.get('memory', 0) / 1e9:.3g} GB"
            for machine in machines
        )
        raise UserError(f"No machine of the cluster has {needs} for a worker (they have {there or 'nothing'}): ask for less.")
    return room


def watched(work: Callable[[Progress], Result], progress: Progress = silent) -> Result:
    """What `work` returns, which is done in a thread of its own: Ray waits for a head that is gone until it ends the program.

    Raises `Vanished` where the head did not answer for `SILENCE` seconds. An exception from `progress`, which is told every
    second at least, and Ctrl-C, stop the work as soon as it tells its progress.
    """
    import ray

    place = None if ray.util.client.ray.is_connected() else ray.get_runtime_context().gcs_address  # a client hears of it itself
    state: list[tuple[str, float, float]] = [("beginning", 0.0, 1.0)]
    stop, found, failed = threading.Event(), list[Result](), list[BaseException]()

    def told(what: str, done: float, total: float) -> None:
        state[0] = (what, done, total)
        if stop.is_set():
            raise KeyboardInterrupt

    def run() -> None:
        try:
            found.append(work(told))
        except BaseException as error:
            failed.append(error)

    thread, heard = threading.Thread(target=run, daemon=True), time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK)
            progress(*state[0])
            if place is None or _answers(place):
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                raise Vanished(f"The Ray cluster at {place} no longer answers.")
    except Vanished:
        raise
    except BaseException:
        stop.set()
        thread.join(GOODBYE)
        raise
    if failed:
        raise failed[0]
    return found[0]


def _answers(place: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        return False
    return True


def results(references: Sequence[Any]) -> list[Any]:
    """What tasks returned; the `UserError` of one that ended so, and `Vanished` where they were lost with the cluster."""
    import ray

    try:
        for reference in references:
            ray.wait([reference])
        return ray.get([*references], timeout=FETCH)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from error
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise Vanished(f"The Ray cluster lost what it did ({type(error).__name__}).") from error


def _in_time(goodbye: Callable[[], object], seconds: float) -> bool:
    """Calls `goodbye`, and leaves it where it takes longer: what it speaks to may be gone. Whether it came to its end."""
    thread = threading.Thread(target=goodbye, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
