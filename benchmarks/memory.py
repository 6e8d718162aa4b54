"""The most memory that `flux-poke prune` holds, beside what Python holds with torch imported. On Linux.

    uv run python benchmarks/memory.py [--single-blocks 8]

FLUX.1-dev's width, one double block, random weights in bfloat16, half of every MLP cut, repair none.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from figures import figure
from flux_poke.flux.checkpoint import Checkpoint
from flux_poke.pruning.plan import PruningPlan
from load import write_dense

#: Runs the command in its arguments, or imports torch, and prints the kB of main memory it has held at most.
CHILD = r"""
import atexit, re, sys
atexit.register(lambda: print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]))
import torch
if sys.argv[1:]:
    from flux_poke.cli import main
    main()
"""


def peak(*arguments: object) -> float:
    """GB that a Python of its own has held at most."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # nosec B603 # ourselves
    return int(done.stdout.split()[-1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--single-blocks", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, plan, out = (Path(folder) / f"{name}.safetensors" for name in ("dense", "plan", "pruned"))
        dense = write_dense(file, given.single_blocks)
        kept = {site.name: torch.arange(0, site.width, 2) for site in dense.layout.sites}
        replace(PruningPlan.keeping_all(dense), kept=kept).save(plan)
        largest = max(map(math.prod, Checkpoint(file).shapes.values())) * torch.bfloat16.itemsize
        print(f"a dense file of {file.stat().st_size / 1e9:.2f} GB, its largest tensor {largest / 1e9:.2f} GB")
        found, python = peak("prune", plan, "-o", out, "--repair", "none"), peak()
        line = f"peak resident: {found:.2f} GB, Python with torch {python:.2f} GB"
        figure(line, peak_gb=found, python_with_torch_gb=python, largest_tensor_gb=largest / 1e9)


if __name__ == "__main__":
    main()
