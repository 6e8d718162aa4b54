"""files.py: the old file or the new one, whole, and one sentence where it cannot be written."""

import os
import re
import stat
import subprocess
import sys
import time

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.files import locked, replacing, write_safetensors, write_text
from safetensors.torch import load_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_appears_whole_and_its_folder_with_it(tmp_path):
    path = tmp_path / "a" / "b" / "text.txt"
    with replacing(path) as new:
        new.write_text("half")
        assert new.name == path.name, "libraries go by the ending"
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
from flux_poke.files import write_safetensors, write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for write, content in ((write_text, ["x" * 10_000]), (write_safetensors, [{"x": torch.zeros(10_000)}, {}])):
    try:
        write(sys.argv[1], *content)
    except UserError as error:
        print(error)
"""
    path = tmp_path / "text.txt"
    path.write_text("old")
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    said = run.stdout.splitlines()
    assert len(said) == 2, run.stderr
    assert all(line.startswith(f"{path} cannot be written (") and "File too large" in line for line in said), said
    assert (path.read_text(), names(tmp_path)) == ("old", ["text.txt"])


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
