"""`flux-poke queue` without a server: exit statuses, the journal, and what comes out of a run's outputs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flux_poke.errors import UserError, WrongArguments
from flux_poke.headless.client import Result
from flux_poke.headless.journal import FORMAT, NAME, Journal
from flux_poke.headless.outputs import bring_outputs
from flux_poke.headless.server import free_port
from flux_poke.headless.workflow import WORKFLOWS

TINY = WORKFLOWS / "try_it_tiny.json"


def test_wrong_arguments_end_with_2(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    for wrong, sentence in (
        (("none.json",), "none.json is not there"),
        ((TINY, "--resume"), "give it with --out"),
        ((TINY, "--no-wait", "--out", tmp_path), "leave out one of the two"),
        ((TINY, "--prompts", tmp_path / "none.txt"), "none.txt is not there"),
        ((TINY, "--prompts", tmp_path / "prompts.txt", "--start", 2), "behind the last one"),
        ((TINY, "--set", "KSampler.stepps=3"), "has no such input"),
    ):
        with pytest.raises(WrongArguments, match=sentence) as raised:
            run("queue", *wrong)
        assert raised.value.status == 2


def test_the_exit_statuses_are_those_of_the_program(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    for arguments, status, sentence in (
        ([str(tmp_path / "none.json")], 2, "Error: "),
        ([str(TINY), "--server", address], 3, f"Error: No ComfyUI answers at {address}"),
        ([str(TINY), "--count", "0"], 2, "Invalid value"),
    ):
        command = [sys.executable, "-m", "flux_poke.cli", "queue", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert (ended.returncode, sentence in ended.stderr) == (status, True), ended.stderr
        assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_journal_knows_what_is_done_and_what_was_begun(tmp_path):
    journal = Journal.at(tmp_path / "out")
    journal.begin("a:1", "first", "attempt 1")
    journal.begin("b:1", "second", "attempt 2")
    journal.begin("a:1", "first", "attempt 3")
    journal.end("a:1", "first", ["0000_x.png"])
    journal.begin("b:1", "third", "attempt 4")
    found = Journal.at(tmp_path / "out", resume=True)
    assert found.id == journal.id
    assert found.done == {"first": ("a:1", ["0000_x.png"])}
    assert (found.given_up("a:1"), found.given_up("b:1")) == ((), ("attempt 2", "attempt 4"))


def test_a_journal_is_gone_on_with_only_when_asked_and_nothing_else_is_taken_for_one(tmp_path):
    Journal.at(tmp_path).begin("a:1", "first", "attempt")
    with pytest.raises(WrongArguments, match="add --resume to go on with it"):
        Journal.at(tmp_path)
    for wrong in ("", "{}", '{"format": "another"}', json.dumps({"format": FORMAT, "id": 1, "done": [], "attempts": {}})):
        (tmp_path / NAME).write_text(wrong)
        with pytest.raises(WrongArguments, match="is no journal of a queue"):
            Journal.at(tmp_path, resume=True)
        assert (tmp_path / NAME).read_text() == wrong


def outputs(**nodes: list) -> Result:
    return Result("id", {node: {"images": files} for node, files in nodes.items()})


def file(name: str, subfolder: str = "", kind: str = "output") -> dict[str, str]:
    return {"filename": name, "subfolder": subfolder, "type": kind}


def test_what_was_saved_is_brought_and_previews_where_nothing_was(tmp_path):
    both = outputs(a=[file("x.png")], b=[file("x.png", "sub"), file("y.png", kind="temp")], c=[file("x.png")])
    fetched: list = []

    def fetch(reference) -> bytes:
        fetched.append(dict(reference))
        return b"\x89PNG\r\n\x1a\n"

    assert bring_outputs(fetch, both, tmp_path, "0007") == ["0007_x.png", "0007_2_x.png"]
    assert fetched == [file("x.png"), file("x.png", "sub")]
    assert bring_outputs(fetch, outputs(b=[file("y.png", kind="temp")]), tmp_path, "0008") == ["0008_y.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0007_2_x.png", "0007_x.png", "0008_y.png"]
    assert bring_outputs(fetch, Result("id", {"t": {"text": ["no file"]}}), tmp_path, "0009") == []


def test_a_generation_is_brought_as_the_folder_it_is(tmp_path):
    written = {"generation_id": "0123abcd", "subfolder": "flux_poke/0123abcd", "files": ["img_0.jpg", "decoded/a.jpg"]}
    sheet = file("sheet.png", "flux_poke/0123abcd")
    result = Result("id", {"1": {"flux_poke": [written], "images": [sheet, file("preview.png", kind="temp")]}})
    names = bring_outputs(lambda reference: b"\xff\xd8\xff", result, tmp_path, "0001")
    assert names == ["0001_0123abcd/img_0.jpg", "0001_0123abcd/decoded/a.jpg"]
    assert (tmp_path / "0001_0123abcd" / "decoded" / "a.jpg").is_file()


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "..\\x.png"])
def test_no_file_leaves_the_folder(tmp_path, name):
    out = tmp_path / "out"
    bring_outputs(lambda reference: b"\x89PNG\r\n\x1a\n", outputs(a=[file(name)]), out, "0000")
    assert [path.relative_to(out) for path in out.iterdir()] == [Path("0000_x.png")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


PICTURE = file("a.png")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"generation_id": "../..", "subfolder": "x", "files": ["a.jpg"]}, "calls a generation '../..'"),
        ({"generation_id": "a/../.git/hooks", "subfolder": "x", "files": ["pre-commit"]}, "8 hexadecimal digits"),
        ({"generation_id": "0123abcd", "subfolder": "x", "files": ["../.git/hooks/pre-commit"]}, "outside of its generation"),
        ({"generation_id": "0123abcd", "subfolder": "x", "files": ["a/../../notes.txt"]}, "outside of its generation"),
        ({"generation_id": "0123abcd", "subfolder": "x", "files": ["C:\\a.jpg"]}, "outside of its generation"),
        ({"generation_id": "0123abcd", "subfolder": "x", "files": ["a\ud800"]}, "outside of its generation"),
        ({"generation_id": "0123abcd", "subfolder": "x", "files": [None, 3, {}], "more": 1}, ""),
        ({"generation_id": "0123abcd", "subfolder": "x", "files": 7}, "which files the generation 0123abcd has"),
        ({"generation_id": "0123abcd", "files": ["a.jpg"]}, "which files the generation 0123abcd has"),
        ({"generation_id": ["0123abcd"], "subfolder": [], "files": {}}, "8 hexadecimal digits"),
        ({"generation_id": None}, "8 hexadecimal digits"),
        (PICTURE | {"filename": ".."}, "calls a file '..', which is no name"),
        (PICTURE | {"filename": ""}, "which is no name"),
        (PICTURE | {"filename": "a\0.png"}, "which is no name"),
        (PICTURE | {"filename": None, "subfolder": {}}, ""),
    ],
)
def test_what_a_server_tells_of_its_files_cannot_lead_out_of_their_folder(tmp_path, entry, said):
    """Or is fetched under a name as plain as any, where it says something that is no name at all."""
    out = tmp_path / "out"
    (out / ".git" / "hooks").mkdir(parents=True)
    result = Result("id", {"1": {"flux_poke": [entry], "text": 3}, "2": None})  # type: ignore[dict-item]
    if said:
        with pytest.raises(UserError, match=re.escape(said)):
            bring_outputs(lambda reference: pytest.fail("nothing is fetched"), result, out, "0000")
    else:
        names = bring_outputs(lambda reference: b"", result, out, "0000")
        assert all((out / name).is_file() and name.startswith("0000_") for name in names)
    assert [*(out / ".git").rglob("*")] == [out / ".git" / "hooks"]
