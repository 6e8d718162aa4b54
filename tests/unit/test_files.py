"""files.py: the old file or the new one, whole, and one sentence where it cannot be written."""

import json
import os
import re
import stat
import subprocess
import sys
import time

import pytest
import torch
from flux_poke.counter import count_up
from flux_poke.errors import UserError
from flux_poke.files import (
    FIGURES,
    IMAGES,
    check_beginning,
    check_not_read,
    check_text,
    locked,
    replacing,
    stream_safetensors,
    write_picture,
    write_safetensors,
    write_text,
)
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_appears_whole_and_its_folder_with_it(tmp_path):
    path = tmp_path / "a" / "b" / "text.txt"
    with replacing(path) as new:
        new.write_text("half")
        (new.parent / "of a library").write_text("temporary")
        assert not path.exists()
        new.write_text("whole")
    assert (path.read_text(), names(path.parent)) == ("whole", ["text.txt"])


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "text.txt"
    path.write_text("old")

    def write():
        with replacing(path) as new:
            new.write_text("new")
            raise stop

    with pytest.raises(stop):
        write()
    assert (path.read_text(), names(tmp_path)) == ("old", ["text.txt"])


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_new_file_has_the_permissions_that_any_program_would_give_it(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_places_that_cannot_be_written_end_in_one_sentence(tmp_path):
    read_only, file, folder = tmp_path / "read_only.txt", tmp_path / "file", tmp_path / "folder"
    read_only.write_text("old")
    read_only.chmod(0o444)
    file.write_text("")
    folder.mkdir()
    for path, sentence in (
        (read_only, f"{read_only} is read-only: "),
        (folder, f"{folder} is a folder: "),
        (file / "below", f"{file / 'below'} cannot be written ("),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            write_text(path, "new")
    assert read_only.read_text() == "old"
    with pytest.raises(UserError, match="below cannot be locked"), locked(file / "below"):
        pass
    assert names(tmp_path) == ["file", "folder", "read_only.txt"]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_ends_in_one_sentence_and_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for the disk."""
    code = """
import resource, signal, sys, torch
from flux_poke.errors import UserError
from flux_poke.files import write_picture, write_safetensors, write_text
from PIL import Image
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writers = {
    "text.txt": (write_text, ["x" * 10_000]),
    "new.safetensors": (write_safetensors, [{"x": torch.zeros(10_000)}, {}]),
    "new.png": (write_picture, [Image.effect_noise((300, 300), 50)]),
}
for name, (write, content) in writers.items():
    try:
        write(f"{sys.argv[1]}/{name}", *content)
    except UserError as error:
        print(error)
"""
    path = tmp_path / "text.txt"
    path.write_text("old")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    said = run.stdout.splitlines()
    assert len(said) == 3, run.stderr
    for name, line in zip(("text.txt", "new.safetensors", "new.png"), said, strict=True):
        assert line.startswith(f"{tmp_path / name} cannot be written ("), line
        assert "File too large" in line
    assert (path.read_text(), names(tmp_path)) == ("old", ["text.txt"])


#: Each writes half of what it announced to the file it is given, says so, and waits.
HALF = {
    "replacing": """
with replacing(path) as new:
    new.write_bytes(b"half")
    wait()
""",
    "write_safetensors": """
import safetensors.torch
def half(tensors, path, metadata):
    path.write_bytes(b"half")
    wait()
safetensors.torch.save_file = half
write_safetensors(path, {"x": torch.zeros(3)}, {})
""",
    "stream_safetensors": """
def tensor(key):
    if key == "b":
        wait()
    return torch.zeros(100_000)
stream_safetensors(path, {"a": ("F32", (100_000,)), "b": ("F32", (100_000,))}, tensor, {})
""",
}


@pytest.fixture(params=HALF)
def half_written(request, tmp_path):
    """`model.safetensors` being written by another process, which waits half way."""
    code = f"""
import sys, time, torch
from flux_poke.files import replacing, stream_safetensors, write_safetensors
path = sys.argv[1]
def wait():
    print("half", flush=True)
    time.sleep(600)
{HALF[request.param]}"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "model.safetensors")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    yield writer
    writer.kill()
    writer.wait()


def test_what_a_killed_writer_left_goes_with_the_next_file_in_its_folder(tmp_path, half_written):
    (unfinished,) = names(tmp_path)
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == [unfinished, "other.txt"], "what is still being written stays"
    half_written.kill()
    half_written.wait()
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == ["other.txt"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_whose_replacing_was_killed_is_back_with_the_next_file_beside_it(tmp_path, renames):
    """Killed before the first or the second of the two renames that put the new one into its place."""
    (tmp_path / "model").mkdir()
    write_text(tmp_path / "model" / "old.txt", "old")
    code = f"""
import os, sys
from pathlib import Path
from flux_poke.files import replacing_folder

count = 0

def kill(event, _):
    global count
    count += event == "os.rename"
    if count == {renames}:
        os._exit(9)

sys.addaudithook(kill)
with replacing_folder(Path("model"), lambda _: None) as new:
    (new / "new.txt").touch()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == ["model", "other.txt"]
    assert (tmp_path / "model" / "old.txt").read_text() == "old"


def test_folders_of_others_that_end_as_ours_do_stay(tmp_path, half_written):
    (unfinished,) = names(tmp_path)
    half_written.kill()
    half_written.wait()
    (tmp_path / unfinished / "more").write_text("not ours")
    theirs = [".download.unfinished", ".flux-poke-mine.unfinished", ".flux-poke-01234567.unfinished"]
    for name in theirs[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / theirs[2]).symlink_to(tmp_path / theirs[0])
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == sorted([unfinished, "other.txt", *theirs])
    (tmp_path / unfinished / "more").unlink()
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == sorted(["other.txt", *theirs])


def test_what_is_half_written_has_no_models_ending(tmp_path, half_written):
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if path.suffix == ".safetensors"]


def test_files_of_another_kind_are_not_replaced(tmp_path):
    path, tensors = tmp_path / "model.safetensors", {"x": torch.ones(2)}
    plan, recording = {"format": "flux-poke plan 1"}, {"format": "flux-poke internals 1"}
    writers = {
        "whole": lambda metadata: write_safetensors(path, {"x": torch.zeros(2)}, metadata),
        "streamed": lambda metadata: stream_safetensors(path, {"x": ("F32", (2,))}, lambda key: torch.zeros(2), metadata),
    }
    for write in writers.values():
        for there in (recording, {"format": "pt"}, {}):
            path.unlink(missing_ok=True)
            write_safetensors(path, tensors, there)
            with pytest.raises(UserError, match=r"model\.safetensors is something else .* 'flux-poke plan 1', found '"):
                write(plan)
            assert torch.equal(load_file(path)["x"], tensors["x"])
        path.write_text("notes")
        with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
            write(plan)
        assert path.read_text() == "notes"
        path.unlink()
        write_safetensors(path, tensors, {"format": "flux-poke plan 10"})
        write(plan)
        assert torch.equal(load_file(path)["x"], torch.zeros(2)), "another version of the same kind"


def test_what_is_read_is_no_place_to_write_to(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("")
    (tmp_path / "link").symlink_to(path)
    for inputs in ([path], [tmp_path / "other", tmp_path / "link"], [tmp_path / "." / "model.safetensors"]):
        with pytest.raises(UserError, match="is also what is read"):
            check_not_read(path, inputs)
    check_not_read(tmp_path / "new", [path, tmp_path / "other"])


def test_tensors_of_any_layout_and_metadata_come_back(tmp_path):
    square = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "t.safetensors", {"turned": square.T, "part": square[:, 1:]}, {"made": "by a test"})
    found = load_file(tmp_path / "t.safetensors")
    assert torch.equal(found["turned"], square.T)
    assert torch.equal(found["part"], square[:, 1:])


def test_a_lock_keeps_another_process_waiting(tmp_path):
    path = tmp_path / "shared"
    code = (
        "import sys\nfrom flux_poke.files import locked\nprint('ready', flush=True)\n"
        "with locked(sys.argv[1]):\n    print('in', flush=True)\n"
    )
    with locked(path):
        other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        time.sleep(0.3)
        path.write_text("mine")
        os.set_blocking(other.stdout.fileno(), False)
        assert other.stdout.readline() == ""
        os.set_blocking(other.stdout.fileno(), True)
    assert other.stdout.readline() == "in\n"
    assert other.wait(timeout=10) == 0


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    target, link, chained = tmp_path / "store" / "real.txt", tmp_path / "link.txt", tmp_path / "chained.txt"
    link.symlink_to(target)
    chained.symlink_to("link.txt")
    for number, path in enumerate((link, chained, target)):
        write_text(path, f"{number}")
        assert (target.read_text(), link.is_symlink(), chained.is_symlink()) == (f"{number}", True, True)
    assert names(tmp_path) == ["chained.txt", "link.txt", "store"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="is a link that leads to itself"):
        write_text(tmp_path / "round", "")


def test_two_names_of_one_file_share_one_lock(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with locked(tmp_path / "file"), pytest.raises(UserError, match="has been locked"), locked(tmp_path / "link", patience=0.1):
        pass


def test_who_waits_for_a_lock_is_told_whose_it_is_and_may_cancel(tmp_path):
    path, told = tmp_path / "shared", []

    def cancel(what: str, done: float, total: float) -> None:
        told.append(what)
        if len(told) == 2:
            raise KeyboardInterrupt

    with locked(path):
        with pytest.raises(UserError, match=rf"shared has been locked for 0 s by process {os.getpid()} on .*: wait until"):
            locked(path, patience=0.4).__enter__()
        with pytest.raises(KeyboardInterrupt):
            locked(path, cancel).__enter__()
    assert told == ["waiting for shared"] * 2
    with locked(path, patience=0):
        pass
    assert all(name.startswith(".") for name in names(tmp_path))


@pytest.mark.parametrize("ending", [*FIGURES, *IMAGES, ".gif", ".mp4", ".jpeg"])
def test_a_picture_replaces_pictures_of_its_kind_alone(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    for foreign in (b"notes", b"{}", b"\x89PMG not a png, and long enough to be compared"):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="something else than its ending says"), replacing(path):
            pass
        assert path.read_bytes() == foreign
    path.write_bytes(b"")
    check_beginning(path)


@pytest.mark.parametrize("ending", [*FIGURES, ".webp"])
def test_a_figure_or_an_image_is_written_twice_into_one_file(tmp_path, ending):
    path, figure = tmp_path / f"picture{ending}", Figure()
    for _ in range(2):
        if ending in FIGURES:
            write_picture(path, figure)
        if ending in IMAGES:
            write_picture(path, Image.new("RGB", (8, 8)))
    assert names(tmp_path) == [path.name]
    assert path.stat().st_size > 30
    with pytest.raises(
        UserError, match=r"is not a picture that can be written: expected a name ending in one of \.png, \.jpg, "
    ):
        write_picture(tmp_path / "picture.txt", figure)


def test_a_text_replaces_what_is_known_as_its_own(tmp_path):
    path = tmp_path / "table.txt"
    check_text(path, "a table", lambda text: False)
    for content in (b"\xff\xfe", b"something", b"[1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"table\.txt is not a table, and is not replaced"):
            check_text(path, "a table", lambda text: json.loads(text)["rows"])
    path.write_text('{"rows": [1]}')
    check_text(path, "a table", lambda text: json.loads(text)["rows"])


def test_a_counter_replaces_numbers_alone(tmp_path):
    path = tmp_path / "count.txt"
    assert [count_up(path, limit=2) for _ in range(3)] == [0, 1, 0]
    assert count_up(path, restart=True) == 0
    for foreign in ("notes", "-5", "1e3", "9" * 5000, "3 4"):
        path.write_text(foreign)
        for restart in (False, True):
            with pytest.raises(UserError, match=r"count\.txt is not a counter's file, and is not replaced"):
                count_up(path, restart=restart)
        assert path.read_text() == foreign
