"""What is published: the wheel, the source archive, and the registry's archive hold what works and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from flux_poke import __version__
from pathspec import PathSpec
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

#: Folders of the pack that are not code: examples, blueprints, help pages and scripts of the page, names and tooltips.
SHOWN = ("workflows", "example_workflows", "subgraphs", "web", "locales")
#: Nobody who installs the pack needs these.
UNWANTED = ("tests", "benchmarks", ".ci", ".github")
#: Endings of the files that are meant; LICENSE has none.
KINDS = {"", ".cff", ".html", ".jpg", ".js", ".json", ".md", ".py", ".safetensors", ".toml", ".txt", ".yaml"}


def listed(*options: str) -> list[str]:
    """Files of the checkout, as git tells them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this folder is no git checkout")
    found = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, check=True, encoding="utf-8")
    return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]


def place_of(package: str) -> str:
    """The folder of a package, from the root of the repository."""
    return "/".join(package.split(".")[1:]) or "."


def sources() -> set[str]:
    """Everything of the pack that must be wherever it is installed."""
    packages = {place_of(name) for name in PROJECT["tool"]["setuptools"]["packages"]}
    code = {name for name in listed() if name.endswith(".py") and str(Path(name).parent) in packages}
    data = {name for name in listed() if name.startswith(("tiny/", "training/")) or name.split("/")[0] in SHOWN}
    return code | {name for name in data if not (ROOT / name).is_symlink()} | {"prompts.txt"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive of this checkout, and the wheel that was built from that archive."""
    folder = tmp_path_factory.mktemp("built")
    for name in listed("--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "checkout" / name)
    _build("sdist", folder / "checkout", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    _build("wheel", folder / archive.name.removesuffix(".tar.gz"), folder)
    return folder


def _build(kind: str, source: Path, into: Path) -> None:
    command = [sys.executable, "-c", f"from setuptools.build_meta import build_{kind} as build; build({str(into)!r})"]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_every_folder_of_code_is_a_package_that_is_installed():
    code = {str(Path(name).parent) for name in listed() if name.endswith("__init__.py") and not name.startswith(UNWANTED)}
    assert {place_of(name) for name in PROJECT["tool"]["setuptools"]["packages"]} == code


def test_the_wheel_holds_the_pack_and_nothing_of_its_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("flux_poke/") for name in archive.namelist() if ".dist-info/" not in name}
    assert not sources() - held
    assert not [name for name in held if name.startswith((*UNWANTED, "docs"))]
    assert wheel.stat().st_size < 25e6


def test_what_the_wheel_unpacks_draws_a_digit_and_knows_its_commands(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import flux_poke; print(flux_poke.__file__);"
        "from flux_poke.cli import app; from flux_poke.tiny.model import FOLDER;"
        "from typer.testing import CliRunner; run = lambda *given: CliRunner().invoke(app, given, catch_exceptions=False);"
        "assert run('queue', '--help').exit_code == 0 == run('demo', '--help').exit_code;"
        "run('draw', str(FOLDER / 'flux.safetensors'), '--prompt', 'three', '--steps', '2', '-o', 'drawn')"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))
    with Image.open(tmp_path / "drawn" / "three_0.png") as drawn:
        assert drawn.size == (64, 64)


@pytest.fixture(scope="module")
def registry() -> list[str]:
    """What comfy-cli packs for the registry: what git tracks, without what .comfyignore names."""
    ignored = PathSpec.from_lines("gitignore", (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines())
    return [name for name in listed() if not ignored.match_file(name)]


def test_the_registrys_archive_holds_the_pack_and_its_guides_alone(registry, tmp_path):
    assert not sources() - set(registry)
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "docs/queue.md"} <= set(registry)
    assert not [name for name in registry if name.startswith((*UNWANTED, "."))]
    assert not [name for name in registry if name.startswith("docs/") and not name.endswith(".md")]
    assert {Path(name).suffix for name in registry} == KINDS


def test_the_registrys_archive_stays_under_25_megabytes(registry, tmp_path):
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in registry:
            archive.write(ROOT / name, name)
    assert 5e6 < (tmp_path / "node.zip").stat().st_size < 25e6


def test_each_help_page_shows_a_picture_of_its_node_that_the_archive_holds(registry):
    pages = sorted((ROOT / "web" / "docs").glob("*.md"))
    shown = [f"web/docs/pictures/{page.stem}.jpg" for page in pages]
    for page, picture in zip(pages, shown, strict=True):
        linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert linked == [f"pictures/{page.stem}.jpg"], page.name
        with Image.open(ROOT / picture) as opened:
            opened.load()
            assert 200 <= opened.width <= 600, picture
    assert {*shown} == {name for name in registry if name.startswith("web/docs/pictures/")}
    assert sum((ROOT / picture).stat().st_size for picture in shown) < 1.5e6


def test_what_comfyui_installs_is_what_the_project_needs():
    assert (ROOT / "requirements.txt").read_text().split() == PROJECT["project"]["dependencies"]
    assert not {"torch", "numpy"} & {re.split(r"[<>=\[]", name)[0] for name in PROJECT["project"]["dependencies"]}


def test_the_version_is_said_once_in_each_place_and_is_the_same():
    assert PROJECT["project"]["version"] == __version__
    assert f'version: "{__version__}"' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "size"), [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_icon_and_banner_are_pictures_of_this_repository(kind, size):
    place = PROJECT["tool"]["comfy"][kind].split("/main/", 1)[1]
    with Image.open(ROOT / place) as picture:
        assert picture.size == size


def workflows_of_the_tiny_flux() -> set[str]:
    """Those that need no download."""
    graphs = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "workflows").glob("*.json")}
    return {name for name, graph in graphs.items() if '"FluxPokeLoadTinyFlux"' in graph}


def test_comfy_test_runs_every_workflow_that_needs_no_download_after_those_it_loads_from():
    given = tomllib.loads((ROOT / "comfy-test.toml").read_text(encoding="utf-8"))["test"]["workflows"]["run"]
    assert sorted(given) == sorted(workflows_of_the_tiny_flux())
    first, then = (
        next(at for at, name in enumerate(given) if title in name) for title in ("Retrain layers", "Run with replaced layers")
    )
    assert first < then


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_runs_for_the_repository_is_read_and_names_no_package_registry(path):
    text = path.read_text(encoding="utf-8")
    held = yaml.safe_load(text)
    assert not re.search(r"pypi|npmjs|conda|download\.pytorch", text)
    for job in held.get("jobs", {}).values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert all(re.search(r"@(v\d|[0-9a-f]{40})", step["uses"]) for step in job["steps"] if "uses" in step)
