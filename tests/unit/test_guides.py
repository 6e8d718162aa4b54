"""The guides in docs/ that need no ComfyUI, followed to the letter: every command and every snippet, in their order."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from flux_poke.tiny.model import TinyFlux
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def follow(run, tmp_path, monkeypatch, capsys) -> Callable[[str], list[str]]:
    """Follows a guide in a folder that has the repository's `tiny/` in it; gives what each block printed."""
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    monkeypatch.chdir(tmp_path)

    def followed(name: str) -> list[str]:
        said = []
        for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "docs" / name).read_text("utf-8"), re.S | re.M):
            if kind == "python":
                Path("block.py").write_text(block, encoding="utf-8")
                runpy.run_path("block.py")
                said.append(capsys.readouterr().out)
                continue
            for line in block.splitlines():
                if "/<id>" in line:
                    (folder,) = next(Path(word.split("/")[0]) for word in line.split() if "/<id>" in word).iterdir()
                    line = line.replace("<id>", folder.name)
                program, *arguments = shlex.split(line.removeprefix("uv run "))
                assert program == "flux-poke"
                said.append(run(*arguments))
        return said

    return followed


def test_fit_makes_files_of_the_sizes_it_names_and_draws_nothing_twice(follow):
    _, first, second, inspected, _ = follow("fit.md")
    assert Path("fitted.safetensors").stat().st_size == pytest.approx(3e6, rel=0.01)
    assert Path("smaller.safetensors").stat().st_size == pytest.approx(2.5e6, rel=0.01)
    assert "600 model calls" in first
    assert "600 model calls" not in second
    ((predicted, measured),) = re.findall(r"velocity\s+(\S+)\s+predicted,\s+(\S+)\s+measured", first)
    (said,) = re.findall(r"at 3 MB: (\S+) predicted, (\S+) measured", (ROOT / "docs" / "fit.md").read_text("utf-8"))
    assert [float(predicted), float(measured)] == pytest.approx([float(number) for number in said], abs=1e-4)
    assert "2 double and 4 single blocks" in inspected
    assert len(list(Path("drawings").glob("*.png"))) == 3


def test_what_does_this_block_do_prints_the_table_that_it_shows(follow):
    said = follow("what_does_this_block_do.md")
    guide = (ROOT / "docs" / "what_does_this_block_do.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```\n(double-img-0.*?)^```", guide, re.DOTALL | re.MULTILINE)
    for printed, expected in zip(said[-1].splitlines(), shown.splitlines(), strict=True):
        (site, error), (name, figure) = printed.split(), expected.split()
        assert site == name
        assert float(error) == pytest.approx(float(figure), abs=0.003)
    assert {"sheet.png", "differences.png", "contributions.png"} <= {path.name for path in Path("see").glob("*/*.png")}
    assert Path("internals.png").exists()
    assert Path("blocks.gif").exists()


def test_every_snippet_about_files_reads_what_the_commands_before_it_leave(follow):
    said = "".join(follow("files.md"))
    layout = TinyFlux.load().flux.layout
    tensors = load_file("digits/internals.safetensors")
    for site in layout.sites:
        assert f"{site.name} {tensors[f'{site.name}.tokens'].item()} tokens, " in said
        assert f"'{site.name}': '384 of 512'" in said
    assert "of images" in said
    assert "seven | Step 0" in said
    assert "torch.Size([128, 512]) in place of [128, 640]" in said
    with Path("rates.csv").open(newline="") as file:
        rows = {(row["site"], int(row["neuron"])): row for row in csv.DictReader(file)}
    assert len(rows) == sum(site.width for site in layout.sites)
    rate = tensors["single-3"][7].item() / tensors["single-3.tokens"].item()
    assert float(rows["single-3", 7]["rate"]) == pytest.approx(rate)


def test_tests_that_a_document_names_are_there():
    """`test_files::test_a`, and `::test_b` of the same file."""
    named, last, text = 0, "", (ROOT / "docs" / "trust.md").read_text("utf-8")
    for file, test in re.findall(r"`(?:[\w/]*?(test_\w+)(?:\.py)?)?(?:::(test_\w+))?(?:\[\w+\])?`", text):
        last = file or last
        told = [path.read_text("utf-8") for path in (ROOT / "tests").glob(f"*/{last}.py")]
        assert any(not test or f"def {test}(" in one for one in told), (last, test)
        named += 1
    assert named > 60
