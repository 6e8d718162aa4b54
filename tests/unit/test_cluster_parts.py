"""Parts of a recording: whatever is attempted twice, killed in the middle or merged in any order, each piece counts once."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flux_poke.cluster.parts import Part, chosen, find_parts, finish, merge, publish
from flux_poke.cluster.pieces import Piece, drawn_pieces
from flux_poke.cluster.prompts import prompts_from
from flux_poke.cluster.shared import Shared
from flux_poke.cluster.workers import TinyWorker
from flux_poke.errors import UserError
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.store import Rows
from flux_poke.tiny.model import FOLDER

TINY = FOLDER / "flux.safetensors"
PIECES = drawn_pieces(["zero", "one", "two", "three", "four", "five", "six"], seed=3, batch=2, settings="")


def worker(url: str | Path) -> TinyWorker:
    made = TinyWorker(str(url), TINY, Wanted(internals=True, rows=RowChoice(8)), steps=2, threads=torch.get_num_threads())
    made.ready()
    return made


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, list[Part]]:
    """A shared folder with the parts of all pieces."""
    folder = tmp_path_factory.mktemp("drawn")
    return folder, [worker(folder).work(piece) for piece in PIECES]


@pytest.fixture
def parts(drawn, tmp_path) -> tuple[Shared, list[Part]]:
    """A copy of it."""
    folder, found = drawn
    return Shared(str(shutil.copytree(folder, tmp_path / "shared"))), found


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory) -> Recording:
    folder, found = drawn
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("whole") / "shared")
    finish(Shared(str(copy)), found)
    return Recording.open(copy)


def require_equal(folder: str | Path, whole: Recording) -> None:
    found = Recording.open(folder)
    assert {site.tokens for site in found.internals().sites.values()} == {
        site.tokens for site in whole.internals().sites.values()
    }
    for name, site in whole.internals().sites.items():
        assert torch.equal(found.internals().sites[name].fires, site.fires)
        assert torch.equal(found.internals().sites[name].sum, site.sum)
        for one, other in zip(whole.states().rows(name), found.states().rows(name), strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.image, other.image)
    assert found.internals().runs == len(PIECES)
    assert found.internals().queued == {piece.key for piece in PIECES}
    assert found.states().manifest.images == 7
    assert found.states().amplification == whole.states().amplification


def test_parts_merged_in_any_order_make_the_same_recording(parts, whole):
    shared, found = parts
    first = merge(shared, found[2:])
    finish(shared, [merge(shared, [first, found[1]]), found[0]])
    require_equal(shared.url, whole)
    assert not [*Path(shared.url).glob(".parts/*")]


def test_a_piece_that_was_drawn_twice_counts_once(parts, whole):
    shared, found = parts
    again = worker(shared.url).work(PIECES[1])
    both = merge(shared, found[:2])
    known, left = find_parts(shared)
    assert not known
    assert again not in left
    assert {part.id for part in left} == {both.id, *(part.id for part in found[2:])}
    finish(shared, left)
    require_equal(shared.url, whole)


def test_adding_up_refuses_a_piece_that_is_there(parts):
    shared, found = parts
    again = worker(shared.url).work(PIECES[0])
    with pytest.raises(UserError, match="holds 1 run of a queue that this recording holds too"):
        merge(shared, [found[0], again])


def test_a_merge_and_a_finish_that_were_killed_at_any_step_are_done_again(parts, whole, tmp_path):
    """Every state in which a kill can leave the folder: files written and removed one after the other."""
    shared, found = parts
    root = Path(shared.url)

    class Killed(Exception):
        pass

    class Dying(Shared):
        """A shared folder that is the last thing its process touched, after so many changes."""

        left = 0

        def _step(self) -> None:
            if not self.left:
                raise Killed
            self.left -= 1

        def put(self, file: Path, name: str) -> None:
            self._step()
            super().put(file, name)

        def write(self, name: str, text: str) -> None:
            self._step()
            super().write(name, text)

        def remove(self, name: str) -> None:
            self._step()
            super().remove(name)

    for steps in itertools.count():
        copy = shutil.copytree(root, tmp_path / f"killed after {steps}")
        dying = Dying(str(copy))
        dying.left = steps
        try:
            finish(dying, [merge(dying, found[:2]), *found[2:]])
            break
        except Killed:
            again = Shared(str(copy))
            known, left = find_parts(again)
            assert known | {key for part in left for key in part.pieces} == {piece.key for piece in PIECES}
            finish(again, left)
            require_equal(copy, whole)
    assert steps > 12


def test_rows_of_several_runs_of_a_piece_become_one_file_and_take_their_numbers(tmp_path):
    recording = Recording.at(tmp_path / "here")
    for seed in (0, 50):
        record(TINY, ["zero", "one"], recording, Wanted(internals=True, rows=RowChoice(8)), seed, steps=2)
    expected = {site: [*recording.states().rows(site)] for site in ("double-img-0", "single-3")}
    shared = Shared(str(tmp_path / "shared"))
    finish(shared, [publish(shared, recording, "a", 2, 30)])
    found = Recording.open(shared.url).states()
    assert [shard.file for shard in found.manifest.shards] == ["rows-02000.safetensors"]
    assert [(drawing.first, drawing.images) for drawing in found.manifest.drawings] == [(30, 2), (32, 2)]
    for site, pieces in expected.items():
        assert found.count(site) == sum(map(len, pieces))
        rows, alone = Rows.joined([*found.rows(site)]), Rows.joined(pieces)
        assert torch.equal(rows.x, alone.x)
        assert torch.equal(rows.image, alone.image + 30)
        assert torch.equal(rows.step, alone.step)


def test_of_parts_that_overlap_the_larger_is_taken():
    parts = [
        Part("a", ("1", "2"), False),
        Part("b", ("2", "3", "4"), False),
        Part("c", ("1",), False),
        Part("d", ("9",), False),
    ]
    assert [part.id for part in chosen(parts, known=["9"])] == ["b", "c"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "flux-poke part 1", "id": 3}', '{"format": "another"}'])
def test_a_damaged_part_is_a_sentence(parts, text):
    shared, found = parts
    shared.write(f"{found[0].folder}.json", text)
    with pytest.raises(UserError, match=r"is damaged .*: remove it, and its piece is recorded again"):
        find_parts(shared)


def test_a_place_that_nothing_reaches_is_a_sentence():
    with pytest.raises(UserError, match="nowhere://bucket cannot be reached"):
        Shared("nowhere://bucket")


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """A folder in an object store that answers over HTTP as S3 does."""
    server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    serving = make_server("127.0.0.1", 0, server.DomainDispatcherApplication(server.create_backend_app), threaded=True)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}  # nosec
    for name, value in {**secrets, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{serving.server_port}"}.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("recordings")
    yield "s3://recordings/seven"
    serving.shutdown()


def test_a_recording_in_an_object_store_is_the_same(bucket, whole, tmp_path):
    shared = Shared(bucket)
    assert shared.local is None
    found = [worker(bucket).work(piece) for piece in PIECES]
    known, left = find_parts(shared)
    assert (known, len(left)) == (frozenset(), len(PIECES))
    finish(shared, [merge(shared, found[1:]), found[0]])
    known, left = find_parts(shared)
    assert (len(known), left) == (len(PIECES), [])
    shared.fs.get(f"{shared.root}/", f"{tmp_path}/", recursive=True)
    require_equal(tmp_path, whole)


def test_a_piece_says_which_images_it_is_of():
    assert [piece.name for piece in PIECES[2:]] == ["images 4 to 5", "image 6"]
    assert PIECES[0] == Piece(PIECES[0].key, 0, 0, ("zero", "one"), 3)


def test_prompts_come_from_files_and_from_datasets(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"caption": "a  fox\\nat dawn"}\n{"caption": ""}\n{"caption": "an owl"}\n')
    assert prompts_from(f"hf:{folder}#caption") == ["a fox at dawn", "an owl"]
    assert prompts_from(f"hf:{folder}#caption", 1) == ["a fox at dawn"]
    with pytest.raises(UserError, match="has no column text: it has caption"):
        prompts_from(f"hf:{folder}#text")
    with pytest.raises(UserError, match="cannot be read"):
        prompts_from(f"hf:{folder}#caption:test")
    with pytest.raises(UserError, match="expected hf:DATASET#COLUMN"):
        prompts_from("hf:one")
