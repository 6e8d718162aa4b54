"""Kills commands: at every operation on a file (by an audit hook) and at random moments; then looks at what is left, and runs
them again.

    uv run python tests/unit/kills.py --kills 4                # of each command, a few, always the same: what the tests do
    uv run python tests/unit/kills.py --minutes 120            # as many as there is time for, always others
    uv run python tests/unit/kills.py --every prune            # at every operation of one command

After a kill, every file that was there is as it was or as the command leaves it, and can be read; what a command adds to holds
no less than before. Run again, it ends with what a run that nobody disturbed ends with. Prints one JSON object: by command, how
many kills there were at how many places, and what was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import flux_poke
import torch
import yaml
from flux_poke.cli import app
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.headless.journal import Journal
from flux_poke.recording.atlas import Atlas
from flux_poke.recording.calibration import Effort, asked_images, missing_images
from flux_poke.recording.drawing import calibrate
from flux_poke.recording.internals import Internals
from flux_poke.recording.manifest import Kind
from flux_poke.recording.recording import Recording
from flux_poke.retrain import loop
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts
from safetensors import safe_open

TINY = FOLDER / "flux.safetensors"
#: What changes a folder, as Python's audit events call it; `os.replace` is an `os.rename`.
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
#: What tells of two equal runs when they were, and how long they took.
PASSING = {"created", "updated", "id", "seconds", "wall_s", "time", "date"}
KINDS = "internals,rows,lens,blocks,trajectories"
START = "start"


def cli(*arguments: object) -> None:
    app([*map(str, arguments)], standalone_mode=False)


def recorded(folder: Path, what: str, images: int, *more: object) -> None:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(digit_prompts(number % 10)[number // 10] for number in range(images)))
    few = ("--steps", 4, "--keep-steps", 4, "--rows-per-step", 24, "--batch", (images + 1) // 2)
    cli("record", TINY, folder / "recording", "--prompts", prompts, "--what", what, *few, *more)


def again(folder: Path, what: str = KINDS, *more: object) -> None:
    """Records other images to what is recorded."""
    recorded(folder, what, 2, "--seed", 90, *more)


def start(folder: Path) -> None:
    """A recording of all kinds, which is made once."""
    shutil.copytree(folder.parents[1] / START, folder, dirs_exist_ok=True)


def planned(folder: Path, cut: int, name: str = "plan") -> None:
    cuts = ("--img-cut", cut, "--txt-cut", cut, "--single-cut", cut, "--score", "fluctuation")
    cli("plan", folder / "recording", "--checkpoint", TINY, *cuts, "-o", folder / f"{name}.safetensors")


def pruned(folder: Path, repair: str) -> None:
    cli("prune", folder / "plan.safetensors", "-o", folder / "pruned.safetensors", "--repair", repair)


def retrained(folder: Path, method: str, layers: str, *more: object) -> None:
    loop.SAVE_EVERY = 0.0
    trained = ("--method", method, "--layers", layers, "--steps", 3, "--batch", 4, "--eval-every", 1)
    cli("retrain", folder / "plan.safetensors", *trained, "--out", folder / "layers", *more)


def replaced(folder: Path, *more: object) -> None:
    cli("replace", folder / "layers", "-o", folder / "replaced.safetensors", *more)


def charted(folder: Path, seed: int) -> None:
    """Adds four images to the atlas, two at a time."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a 3\nseven\na 1\nnine\n")
    few = ("--what", "atlas", "--steps", 2, "--batch", 2, "--seed", seed)
    cli("record", TINY, folder / "recording", "--prompts", prompts, *few)


def lens(folder: Path) -> None:
    cli("lens", "fit", folder / "recording", "-o", folder / "lens.safetensors", "--picture", folder / "lens.png")


def calibrated(folder: Path, images: int = 6) -> None:
    """What `fit` records: known images are not drawn again."""
    tiny, recording = TinyFlux.load(TINY), Recording.at(folder / "recording")
    asked = asked_images([digit_prompts(number)[0] for number in range(6)], images, 0, "64x64, 3 steps")
    missing = missing_images(recording, asked)
    effort = Effort(len(missing), 3, 8, {}, 0, tiny.flux.layout.sites[0])
    if missing:
        calibrate(tiny, Fingerprint.of_tensors(tiny.flux.state_dict()), recording, missing, effort, batch=2)


def journal(folder: Path, runs: range = range(3, 6)) -> None:
    found = Journal.at(folder, resume=True)
    for run in runs:
        if f"{run}" not in found.done:
            found.begin("127.0.0.1:8188", f"{run}", f"attempt-{run}-{time.time_ns()}")
            found.end("127.0.0.1:8188", f"{run}", [f"{run}.png"])


def converted(folder: Path, what: str) -> None:
    cli("convert", what, "-o", folder / "diffusers")


def both(folder: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder / "recording", folder / name)


def merge(folder: Path) -> None:
    cli("internals", "merge", folder / "one", folder / "two", "-o", folder / "sum.safetensors")


def grown(before: Path, after: Path) -> None:
    """What is added to holds what it held, and is whole."""
    for path in before.rglob("internals.safetensors"):
        old, new = Internals.load(path), Internals.load(after / path.relative_to(before))
        assert new.runs >= old.runs
        assert all((new.sites[name].fires >= site.fires).all() for name, site in old.sites.items())
    for path in before.rglob("hidden_states"):
        known, found = (Recording.at(folder).states() for folder in (path.parent, after / path.relative_to(before).parent))
        for kind in get_args(Kind):
            assert found.image_count(kind) >= known.image_count(kind)
            if kind != "rows" and known.bytes(kind):
                assert len(found.files(kind)) >= len(known.files(kind))
        for site in TinyFlux.load(TINY).flux.layout.sites:
            for rows in found.rows(site.name):
                assert rows.x.isfinite().all()
    for path in before.rglob("atlas.safetensors"):
        assert {*Atlas.load(path).images} <= {*Atlas.load(after / path.relative_to(before)).images}
    if (before / "queue.json").exists():
        assert Journal.at(before, True).done.items() <= Journal.at(after, True).done.items()


@dataclass(frozen=True)
class Command:
    """`before` makes what is there, `work` is what is killed. What it adds to (`adds`) has a content of its own at each moment,
    and where a second run adds more (`more`), it does not end with what one leaves."""

    before: Callable[[Path], Any]
    work: Callable[[Path], Any]
    adds: tuple[str, ...] = ()
    more: bool = False


def after(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for step in steps:
            step(folder)

    return run


RECORDING = ("internals.safetensors", "manifest.json")
COMMANDS: dict[str, Command] = {
    "record": Command(start, again, RECORDING, more=True),
    "thin": Command(start, lambda folder: again(folder, "rows", "--max-gb", 0.0036), (*RECORDING, "rows-"), more=True),
    "calibrate": Command(lambda folder: calibrated(folder, 2), calibrated, RECORDING),
    "atlas": Command(lambda folder: charted(folder, 90), lambda folder: charted(folder, 50), ("atlas.safetensors",)),
    "merge": Command(after(start, both), merge),
    "plan": Command(after(start, lambda folder: planned(folder, 64)), lambda folder: planned(folder, 128)),
    "prune": Command(
        after(start, lambda folder: planned(folder, 64), lambda folder: pruned(folder, "none")),
        lambda folder: pruned(folder, "affine"),
    ),
    "retrain": Command(
        after(start, lambda folder: planned(folder, 64), lambda folder: retrained(folder, "gradient", "0")),
        lambda folder: retrained(folder, "gradient", "1,2"),
        ("layer_stats.yaml",),
    ),
    "distill": Command(after(start, lambda folder: planned(folder, 64)), lambda folder: retrained(folder, "distill", "all")),
    "replace": Command(
        after(
            start,
            lambda folder: planned(folder, 64),
            lambda folder: retrained(folder, "closed form", "0,1"),
            lambda folder: replaced(folder, "--last", 0),
        ),
        replaced,
    ),
    "lens": Command(after(start, lens, lambda folder: again(folder, "lens")), lens),
    "convert": Command(
        lambda folder: converted(folder, f"{TINY}"),
        lambda folder: converted(folder, f"{FOLDER / 'flux2' / 'flux.safetensors'}"),
    ),
    "queue": Command(lambda folder: journal(folder, range(3)), journal, ("queue.json",)),
}


def contents(folder: Path) -> dict[str, Any]:
    """What every file says, by name, without what passes; reading it shows that it is whole."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name.endswith((".lock", ".owner")) or ".unfinished/" in name:
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: digest(file.get_tensor(key)) for key in sorted(file.keys())}
                header = {key: lasting(parsed(value)) for key, value in (file.metadata() or {}).items() if key not in PASSING}
                found[name] = (tensors, header)
        elif path.suffix in (".json", ".yaml"):
            found[name] = lasting(yaml.safe_load(path.read_text()))
        else:
            found[name] = path.suffix if path.suffix in (".png", ".pdf") else path.read_bytes()
    return found


def digest(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if key not in PASSING}
    if isinstance(value, list):
        return [lasting(inner) for inner in value]
    return round(value, 12) if isinstance(value, float) and math.isfinite(value) else value


def forked(work: Callable[[Path], Any], folder: Path, at: int = 0, seconds: float = math.inf) -> tuple[int | str, int]:
    """Runs `work` in a process of its own, killed before its operation `at` on a file or after some seconds.

    How it ended (0, "killed", or what it said), and how many operations there were.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _child(work, folder, at, writing)
    os.close(writing)
    try:
        if seconds < math.inf:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        with open(reading, "rb") as pipe:
            said = pipe.read().decode()
        status = os.waitpid(process, 0)[1]
    except KeyboardInterrupt:  # or it would go on in a folder that is removed
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    if os.WIFSIGNALED(status):
        return "killed", 0
    words, _, count = said.rpartition(" ")
    return (0 if os.WEXITSTATUS(status) == 0 else words), int(count or 0)


def _child(work: Callable[[Path], Any], folder: Path, at: int, writing: int) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    place, count = os.fspath(folder), 0

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES and any(
            isinstance(part, str | os.PathLike) and os.fspath(part).startswith(place) for part in given
        ):
            if event == "open" and not (set(given[1] or "") & set("wax+") or (given[1] is None and given[2] & 3)):
                return
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    ended, words = 0, ""
    try:
        work(folder)
    except UserError as error:
        ended, words = 3, f"{error}"
    except BaseException as error:
        ended, words = 4, f"{type(error).__name__}: {error}"
    os.write(writing, f"{words} {count}".encode())
    os._exit(ended)


@dataclass
class Trial:
    """One command, what is there before it, and what a run that nobody disturbs leaves."""

    name: str
    place: Path
    kills: int = 0
    places: set[int] = field(default_factory=set)
    losses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.command = COMMANDS[self.name]
        self.before, self.done, self.folder = (self.place / self.name / part for part in ("before", "done", "it"))
        self.folder.mkdir(parents=True)
        # paths are written into plans: all of it happens in one place, and is copied away and back
        ended, _ = forked(self.command.before, self.folder)
        assert ended == 0, f"{self.name}: {ended}"
        shutil.copytree(self.folder, self.before)
        began = time.monotonic()
        ended, self.operations = forked(self.command.work, self.folder)
        self.seconds = time.monotonic() - began
        assert ended == 0, f"{self.name}: {ended}"
        print(f"{self.name}: {self.operations} operations in {self.seconds:.2f} s", file=sys.stderr, flush=True)
        shutil.copytree(self.folder, self.done)
        self.old, self.new = contents(self.before), contents(self.done)

    def kill(self, at: int = 0, seconds: float = math.inf) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.before, self.folder)
        ended, _ = forked(self.command.work, self.folder, at, seconds)
        if ended != "killed":
            return
        self.kills += 1
        self.places |= {at} - {0}
        where = (
            f"{self.name} killed at operation {at} of {self.operations}" if at else f"{self.name} killed after {seconds:.3f} s"
        )
        try:
            self._look(where)
            if not self.command.more and contents(self.folder) == self.new:
                return  # killed when all was done
            ended, _ = forked(self.command.work, self.folder)
            if ended:
                self._lost(f"{where}: run again, it said: {ended}")
            elif self.command.more:
                grown(self.before, self.folder)
            else:
                self._compare(where)
        except Exception as error:
            self._lost(f"{where}: {type(error).__name__}: {error}")

    def _look(self, where: str) -> None:
        if self.name == "convert" and not (self.folder / "diffusers").exists():
            return  # two renames: the next that is written beside it puts it back
        left = contents(self.folder)
        for name, old in self.old.items():
            if name not in left:
                self._lost(f"{where}: {name} is gone")
            elif Path(name).name.startswith(self.command.adds or ("-",)):
                continue
            elif left[name] not in (old, self.new.get(name)):
                self._lost(f"{where}: {name} is neither the old one nor the new one")
        grown(self.before, self.folder)

    def _compare(self, where: str) -> None:
        found = contents(self.folder)
        if missing := self.new.keys() ^ found.keys():
            self._lost(f"{where}: run again, there is too much or too little: {sorted(missing)[:5]}")
        for name in self.new.keys() & found.keys():
            if found[name] != self.new[name]:
                self._lost(f"{where}: run again, {name} is another than without the kill")
        if left := [path.name for path in self.folder.rglob(".flux-poke-*.unfinished")]:
            self._lost(f"{where}: run again, {left} is left")

    def _lost(self, what: str) -> None:
        self.losses.append(what)
        print(what, file=sys.stderr, flush=True)


def moments(trial: Trial, kills: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Three in four at operations, spread over all of them; the rest at random."""
    at = math.ceil(0.75 * kills)
    for number in range(at):
        low, high = (1 + trial.operations * end // at for end in (number, number + 1))
        yield {"at": chance.randrange(low, max(high, low + 1))}
    for _ in range(kills - at):
        yield {"seconds": chance.uniform(0.0, trial.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], default=[])
    parser.add_argument("--kills", type=int, default=4, help="Of each command.")
    parser.add_argument("--minutes", type=float, help="Go on with others until then.")
    parser.add_argument("--every", action="store_true", help="At every operation on a file.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    for module in pkgutil.walk_packages(flux_poke.__path__, "flux_poke."):  # once, not in every process that is killed
        if module.name.split(".")[1] in ("analysis", "commands", "convert", "pruning", "recording", "retrain"):
            importlib.import_module(module.name)
    began, seed = time.monotonic(), 0 if given.minutes is None else time.time_ns()
    with tempfile.TemporaryDirectory() as place:
        begun = Path(place) / START
        begun.mkdir()
        ended, _ = forked(lambda folder: recorded(folder, KINDS, 18), begun)
        assert ended == 0, ended
        trials = [Trial(name, Path(place)) for name in given.commands or COMMANDS]
        with suppress(KeyboardInterrupt):  # what was found by then is told
            for round_ in range(1_000_000):
                for number, trial in enumerate(trials):
                    every = [{"at": at} for at in range(1, trial.operations + 1)]
                    chosen = every if given.every else moments(trial, given.kills, random.Random(seed + 1000 * round_ + number))
                    for moment in chosen:
                        trial.kill(**moment)
                    print(f"{trial.name}: {trial.kills} kills, {len(trial.losses)} losses", file=sys.stderr, flush=True)
                if given.minutes is None or time.monotonic() - began > 60 * given.minutes:
                    break
    told = {
        trial.name: {
            "kills": trial.kills, "places": len(trial.places), "operations": trial.operations, "losses": trial.losses,
            "seconds": round(trial.seconds, 2),
        }
        for trial in trials
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    sys.exit(any(trial.losses for trial in trials))


if __name__ == "__main__":
    main()
