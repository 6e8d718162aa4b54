"""Which versions of Python, torch and ComfyUI the pack runs on: `python benchmarks/compatibility.py --comfyui FOLDER ...`.

    python benchmarks/compatibility.py --comfyui ~/comfy/ComfyUI-0.8 ~/comfy/ComfyUI               # all there are
    python benchmarks/compatibility.py --comfyui ~/comfy/ComfyUI 3.11:2.6.0:0.29.0                 # one of them

Each gets an environment of its own, made by uv in a temporary folder and deleted afterwards (some 6 GB, of which uv keeps the
downloads), with what the pack and that ComfyUI require, and in it some of the unit tests, and on a real server of that ComfyUI
a recording that is compared with an independent computation, and the workflow that plans, cuts, loads and compares.
What came of it is added to `docs/compatibility.json`, and `docs/compatibility.md` is its table; what did not run is there with
the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from flux_poke.files import write_text

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "compatibility.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: torch with the torchvision and torchaudio that go with it; the first is the oldest that pyproject.toml allows.
TORCHES = {"2.4.0": ("0.19.0", "2.4.0"), "2.6.0": ("0.21.0", "2.6.0"), "2.11.0": ("0.26.0", "2.11.0")}
#: Tests of what computes: half a minute of processor time. Those that kill programs at random take longer than all others.
UNIT = [f"tests/unit/test_{name}.py" for name in ("hooks", "internals", "model", "plan", "prompts", "sampling", "surgery")]
UNIT += ["-k", "not kill"]
HOST = [
    "tests/host/test_record.py::test_two_runs_count_what_an_independent_computation_counts",
    "tests/host/test_prune.py::test_the_shipped_workflow_prunes_in_one_go",
]
#: Of a ComfyUI that does not read FLUX's width from the file, which the tiny one needs: nodes, and blocks at full width.
OLDER = [
    "tests/host/test_older_host.py::test_an_older_host_has_every_node_and_says_what_it_cannot_load",
    "tests/host/test_older_host.py::test_an_older_host_records_flux_at_full_width",
    "tests/host/test_older_host.py::test_an_older_host_runs_a_pruned_file_in_fp8_through_its_quantised_layers",
]
READS_WIDTH = "0.29.0"
#: What ComfyUI ends with where its own kernels meet a triton of torch 2.4 to 2.6 on a machine without a GPU.
WITHOUT_GPU = "0 active drivers"
#: Seconds for an installation, or for tests.
PATIENCE = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", help="PYTHON:TORCH:COMFYUI, such as 3.11:2.6.0:0.29.0 (default: all)")
    parser.add_argument("--comfyui", type=Path, nargs="+", required=True, help="folders of ComfyUI, of any versions")
    options = parser.parse_args()
    hosts = {version(folder): folder.expanduser() for folder in options.comfyui}
    cases = [tuple(case.split(":")) for case in options.cases] or [*product(PYTHONS, TORCHES, hosts)]
    for python, torch, host in cases:
        found = {"python": python, "torch": torch, "comfyui": host, "date": f"{date.today()}"}
        found |= tried(python, torch, hosts[host])
        print(json.dumps(found), flush=True)
        others = [one for one in known() if any(one[key] != found[key] for key in ("python", "torch", "comfyui"))]
        results = sorted([*others, found], key=lambda one: [*map(numbers, (one["comfyui"], one["torch"], one["python"]))])
        write_text(DOCUMENT, json.dumps(results, indent=1) + "\n")
        write_text(DOCUMENT.with_suffix(".md"), document(results))


def tried(python: str, torch: str, comfyui: Path) -> dict[str, str]:
    """What came of the unit tests and of those on the server: "12 passed", or why not."""
    import tomllib  # of Python 3.11 and newer

    vision, audio = TORCHES[torch]
    with tempfile.TemporaryDirectory(prefix="flux_poke_compatibility_") as temporary:
        folder = Path(temporary)
        (folder / "flux_poke").symlink_to(ROOT)
        path, temp = folder / "environment", folder / "temp"
        temp.mkdir()
        environment = {**os.environ, "PYTHONPATH": temporary, "OMP_NUM_THREADS": "1", "TMPDIR": str(temp)}
        environment |= {"COMFYUI_PATH": str(comfyui), "COMFYUI_PATH_OLD": str(comfyui), "VIRTUAL_ENV": str(path)}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        given = [f"torch=={torch}", f"torchvision=={vision}", f"torchaudio=={audio}", "pytest", "scipy", "psutil"]
        required = [*project["dependencies"], *project["optional-dependencies"]["terminal"], *given, *own(comfyui)]
        (folder / "required.txt").write_text("\n".join(required))
        steps = [
            ["uv", "venv", "-q", "--python", python, str(path)],
            ["uv", "pip", "install", "-q", "-r", "required.txt", "-r", str(comfyui / "requirements.txt")],
        ]
        for step in steps:
            status, said = ran(step, environment, folder)  # away from what pyproject.toml tells uv
            if status:
                return dict.fromkeys(("unit", "host"), f"not installed: {reason(said)}")
        run = [str(path / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        host = HOST if numbers(version(comfyui)) >= numbers(READS_WIDTH) else OLDER
        found = {"unit": summary(*ran([*run, *UNIT], environment)), "host": summary(*ran([*run, *host], environment))}
        if WITHOUT_GPU in found["host"]:
            ran(["uv", "pip", "uninstall", "-q", "triton"], environment, folder)
            found["host"] = f"{summary(*ran([*run, *host], environment))}, without triton"
        return found


def own(comfyui: Path) -> list[str]:
    """Packages of ComfyUI's own, as old as it allows: those of its time, where newer ones take a newer torch."""
    text = (comfyui / "requirements.txt").read_text(encoding="utf-8")
    return [f"{name}=={least}" for name, least in re.findall(r"^(comfy[\w-]*)>=([\d.]+)", text, re.MULTILINE)]


def ran(command: list[str], environment: dict[str, str], folder: Path = ROOT) -> tuple[int, str]:
    """The exit status of a command, and what it said."""
    begun = time.monotonic()
    try:
        done = subprocess.run(  # nosec B603 # uv, and the tests of this folder
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return 1, f"it did not end within {PATIENCE} s"
    print(f"{done.returncode} after {time.monotonic() - begun:.0f} s: {' '.join(command)[:150]}", file=sys.stderr, flush=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr, flush=True)
    return done.returncode, done.stdout


def summary(status: int, said: str) -> str:
    """Of pytest, in a few words: how many passed, or what failed first."""
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", said.strip().splitlines()[-1] if said.strip() else "")
    errors = re.findall(r"^E   +(\S.*)$", said, re.MULTILINE)
    silent = [last for error in errors for last in re.findall("did not come up .* The last line of its log: (.*)", error)]
    why = [f"ComfyUI did not start: {last}" for last in silent] or errors
    return ", ".join(counts) + (f" ({why[0][:120]})" if status and why else "") if counts else reason(said)


def reason(said: str) -> str:
    """The line that says why not; addresses are left out."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    causes = [line for line in lines if re.search(r"[Bb]ecause|Error|error:", line)]
    last = (causes or lines or ["it ended without a word"])[-1].removeprefix("cause: ")
    return re.sub(r"\(?https?://\S+", "...", last)[:200]


def version(comfyui: Path) -> str:
    """Of a ComfyUI, as its own file says."""
    text = (comfyui.expanduser() / "comfyui_version.py").read_text(encoding="utf-8")
    return re.findall(r'__version__ = "([\d.]+)"', text)[0]


def numbers(version: str) -> list[int]:
    return [*map(int, version.split("."))]


def known() -> list[dict[str, Any]]:
    return json.loads(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else []


def document(results: list[dict[str, Any]]) -> str:
    """The table, with a line for each that could be tried, and those that were not at its end."""
    lines = [
        "# What it runs on",
        "",
        "Tried on Linux, without a GPU, by `benchmarks/compatibility.py`, each in an environment of its own: unit tests of",
        "what computes, and on a server of that ComfyUI a recording that is compared with an independent computation, and the",
        "workflow that plans, cuts, loads and compares; with ComfyUI 0.8, which cannot load the tiny FLUX, that it has the",
        "nodes, and recording and running a pruned file at full width. Packages of ComfyUI's own are as old as it allows:",
        "newer ones take a newer torch. *Without triton*: ComfyUI's own kernels do not start beside the triton of torch 2.4 to",
        "2.6 on a machine without a GPU. `compatibility.json` is the same as data.",
        "",
        "| ComfyUI | torch | Python | unit tests | on the server | tried |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        unit, host = (one[kind].replace("|", "/") for kind in ("unit", "host"))
        lines.append(f"| {one['comfyui']} | {one['torch']} | {one['python']} | {unit} | {host} | {one['date']} |")
    seen = {(one["comfyui"], one["torch"], one["python"]) for one in results}
    missing = [one for one in product(sorted({one["comfyui"] for one in results}), TORCHES, PYTHONS) if one not in seen]
    if missing:
        said = ", ".join(f"{comfyui} with torch {torch} on Python {python}" for comfyui, torch, python in missing)
        lines += ["", f"Not tried yet: {said}."]
    lines += [
        "",
        "Windows and macOS run the unit tests at every change (`.github/workflows/test.yml`), on Python 3.11 and 3.13; ComfyUI",
        "was not tried there.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
