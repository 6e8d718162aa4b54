"""Imports go down only: the table of rooms in CONTRIBUTING.md, held."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: From the ground up; a room imports from those before it, and its own files from each other.
FLOORS = (
    {"errors", "progress"},
    {"answers", "files", "parsing", "prompts", "counter", "sizes", "download_prompts"},
    {"flux"},
    {"tiny"},
    {"training"},
    {"recording"},
    {"analysis"},
    {"pruning"},
    {"retrain", "convert", "poking"},
    {"nodes", "headless", "cluster", "commands", "demo", "draw", "fit"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HOST = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "nodes", "execution")


def modules() -> list[Path]:
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and path.name in FLOOR]
    files = [path for room in rooms for path in room.rglob("*.py")]
    return sorted([*files, *(path for path in ROOT.glob("*.py") if path.stem in FLOOR)])


def imported(path: Path) -> set[tuple[str, ...]]:
    """What a module imports: absolute names of others, and our own as ("flux_poke", room, ...)."""
    package = ("flux_poke", *path.relative_to(ROOT).parent.parts)
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*base, *(node.module.split(".") if node.module else ()))
            found |= {(*whole, alias.name) for alias in node.names} if len(whole) == 1 else {whole}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path):
    own = room_of(path)
    for name in imported(path):
        if name[0] == "flux_poke" and len(name) > 1 and name[1] != own:
            assert name[1] in FLOOR, f"{path} imports {'.'.join(name)}, which is in no room"
            assert FLOOR[name[1]] <= FLOOR[own], f"{path} imports {'.'.join(name)}, which stands above it"


def test_rooms_on_one_floor_do_not_import_each_other_in_a_circle():
    pairs = {
        (room_of(path), name[1])
        for path in modules()
        for name in imported(path)
        if name[0] == "flux_poke" and len(name) > 1 and name[1] in FLOOR and name[1] != room_of(path)
    }
    assert not [(a, b) for a, b in pairs if (b, a) in pairs]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_nodes_know_the_host(path: Path):
    if room_of(path) != "nodes":
        assert not {name[0] for name in imported(path)} & set(HOST)
        assert "nodes" not in {name[1] for name in imported(path) if name[0] == "flux_poke" and len(name) > 1}


def test_only_the_cluster_knows_ray():
    knowing = {room_of(path) for path in modules() if "ray" in {name[0] for name in imported(path)}}
    assert knowing == {"cluster"}


def test_code_can_be_read_and_printed_on_any_windows_console():
    files = [*modules(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert len(files) > 150
    for path in files:
        path.read_text(encoding="utf-8").encode("cp1252")
