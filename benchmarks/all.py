"""Every benchmark on the present device, in a given time; what they find becomes `benchmarks/results/<device>.json`.

    OMP_NUM_THREADS=1 uv run python benchmarks/all.py [--device cuda] [--minutes 20] [--only record.py prune.py]

Each runs in a Python of its own, in at most its share of the time that is left; what a benchmark does not use, the next ones
have. The file holds the date, the device and the versions, and of each benchmark its figures as data (`figures.py`; where it
has none, the lines it printed), the seconds it took, and where it did not come to its end, why; figures found until then stand.
It is written after every benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from figures import VARIABLE
from flux_poke.files import write_text

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A script, its options on a CPU and on a GPU (None = nothing there that the CPU does not tell), and its share of time."""

    script: str
    share: float
    cpu: str = ""
    cuda: str | None = None

    def command(self, device: str) -> list[str] | None:
        options = self.cpu if device == "cpu" else self.cuda
        return None if options is None else [sys.executable, str(FOLDER / self.script), *options.split()]


BENCHMARKS = (
    Benchmark("record.py", 1, "--device cpu --repeats 5", "--device cuda --repeats 25"),
    Benchmark("prune.py", 1, "--device cpu --only blocks --repeats 3", "--device cuda --only blocks --repeats 25"),
    Benchmark("prune.py", 0.5, "--only load --repeats 3", "--only load"),
    Benchmark("prune.py", 4, "--device cpu --only site --rows 2048", "--device cuda --only site --rows 61440"),
    Benchmark("previews.py", 0.5, "--repeats 5", "--device cuda --full"),
    Benchmark("load.py", 0.5, "--repeats 3", "--repeats 5"),
    Benchmark("memory.py", 0.5, "--single-blocks 4"),
    Benchmark("cluster_memory.py", 0.5, "--hidden 384 768"),
    Benchmark("cluster.py", 1.5),
    Benchmark("predictions.py", 1.5),
    Benchmark("rounding.py", 1),
    Benchmark("importance.py", 1, "--splits 1"),
    Benchmark("poking.py", 1.5),
    Benchmark("images.py", 1),
    Benchmark("levels.py", 1),
    Benchmark("retrain.py", 1.5, "--images 20 --only layers"),
    Benchmark("rehearsal.py", 8, "--device cpu --double 1 --single 1", "--device cuda --double 19 --single 38"),
)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", known.read_text()) if known.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """What a benchmark found, in how many seconds, and why no more."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "figures"
        begun = time.perf_counter()
        process = subprocess.Popen(  # nosec B603 # a benchmark of this folder
            command,
            env={**os.environ, VARIABLE: str(kept), "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=seconds)
            reason = None if process.returncode == 0 else (said.strip().splitlines() or ["it ended without a word"])[-1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started; its files go with the folder
            said, _ = process.communicate()
            reason = f"not done after {seconds:.0f} s"
        found: dict[str, Any] = {"seconds": round(time.perf_counter() - begun, 1)}
        if kept.exists():
            found["figures"] = [json.loads(line) for line in kept.read_text().splitlines()]
        else:
            found["lines"] = said.splitlines()
        return found if reason is None else {**found, "reason": reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--only", nargs="+", help="scripts, such as record.py")
    given = parser.parse_args()
    chosen = [benchmark for benchmark in BENCHMARKS if not given.only or benchmark.script in given.only]
    end, name = time.perf_counter() + 60 * given.minutes, device_name(given.device)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flux-poke": version("flux-poke")},
        "benchmarks": {},
    }
    path = FOLDER / "results" / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    path.parent.mkdir(exist_ok=True)
    for place, benchmark in enumerate(chosen):
        command = benchmark.command(given.device)
        if command is None:
            continue
        what = " ".join((benchmark.script, *command[2:]))
        share = benchmark.share / sum(other.share for other in chosen[place:])
        found = run(command, share * max(1.0, end - time.perf_counter()))
        report["benchmarks"][what] = found
        print(f"{what}: {found['seconds']:.0f} s{', ' + found['reason'] if 'reason' in found else ''}", flush=True)
        write_text(path, json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
