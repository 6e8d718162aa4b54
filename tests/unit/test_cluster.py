"""A recording made by a cluster is the one that a single process makes, whatever is lost on the way."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flux_poke.cluster import crew
from flux_poke.cluster.connect import Needs, Vanished, connected
from flux_poke.cluster.crew import share
from flux_poke.cluster.pieces import Piece, drawn_pieces
from flux_poke.cluster.record import TinyJob, record
from flux_poke.errors import UserError
from flux_poke.recording.drawing import Wanted
from flux_poke.recording.drawing import record as record_here
from flux_poke.recording.manifest import Limit
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from two_nodes import Nodes, two_nodes

TINY = FOLDER / "flux.safetensors"
PROMPTS = [digit_prompts(number % 10)[number // 10] for number in range(48)]
WANTED = Wanted(internals=True, rows=RowChoice(16), limit=Limit(1.0))
JOB = TinyJob(TINY, WANTED, steps=4, batch=4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Recording:
    """What a single process records."""
    recording, threads = Recording.at(tmp_path_factory.mktemp("alone")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record_here(TINY, PROMPTS, recording, WANTED, steps=4, batch=4)
    finally:
        torch.set_num_threads(threads)
    return recording


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as found:
        yield found


def require_equal(one: Recording, other: Recording) -> None:
    """To the last bit."""
    assert one.internals().runs == other.internals().runs
    for name, site in one.internals().sites.items():
        found = other.internals().sites[name]
        assert site.tokens == found.tokens
        assert torch.equal(site.fires, found.fires)
        assert torch.equal(site.sum, found.sum)
        assert torch.equal(site.sum_sq, found.sum_sq)
    if "rows" in one.kinds:
        assert one.states().manifest.images == other.states().manifest.images
        assert one.states().manifest.amplification == other.states().manifest.amplification
        for name in one.internals().sites:
            for rows, same in zip(one.states().rows(name), other.states().rows(name), strict=True):
                assert torch.equal(rows.x, same.x)
                assert torch.equal(rows.image, same.image)
                assert torch.equal(rows.step, same.step)


class AsItGoes:
    """Progress that does something to the cluster, one thing after the other, when so many pieces are done."""

    def __init__(self, *actions: tuple[int, Callable[[], object]]):
        self.actions = [*actions]
        self.results: list[object] = []

    def __call__(self, what: str, done: float, total: float) -> None:
        if self.actions and done >= self.actions[0][0] and (result := self.actions[0][1]()) is not False:
            self.results.append(result)
            self.actions.pop(0)


def test_a_recording_equals_that_of_one_process_though_workers_and_a_machine_are_lost(nodes, alone, tmp_path):
    progress = AsItGoes(
        (1, lambda: nodes.lose_worker("TinyWorker.work")),
        (3, lambda: nodes.lose_worker("TinyWorker.work", 1)),
        (5, nodes.lose_machine),
        (6, nodes.add_machine),
    )
    with connected(nodes.address):
        recorded = record(JOB, PROMPTS, str(tmp_path / "all"), Needs(), workers=4, progress=progress)
    assert len(progress.results) == 4
    assert recorded.lost >= 2
    assert not recorded.failed
    require_equal(alone, Recording.open(tmp_path / "all"))
    assert not (tmp_path / "all" / ".parts").exists()


def test_a_worker_that_hangs_is_replaced(nodes, alone, tmp_path):
    progress = AsItGoes((1, lambda: nodes.lose_worker("TinyWorker.work", how=signal.SIGSTOP)))
    said: list[str] = []
    with connected(nodes.address):
        recorded = record(JOB, PROMPTS, str(tmp_path / "all"), Needs(), 2, patience=15, progress=progress, say=said.append)
    assert recorded.lost == 1
    assert "takes more than 15 s: its worker is ended" in said[0]
    require_equal(alone, Recording.open(tmp_path / "all"))


def test_what_is_recorded_is_not_recorded_again_and_other_arguments_are_refused(nodes, tmp_path):
    with connected(nodes.address):
        few = record(JOB, PROMPTS[:8], str(tmp_path / "all"), Needs(), workers=2)
        again = record(JOB, PROMPTS[:8], str(tmp_path / "all"), Needs(), workers=2)
        assert (few.total, few.before, again.before) == (2, 0, 2)
        with pytest.raises(UserError, match=r"holds another recording of a cluster \(other pieces\)"):
            record(JOB, PROMPTS[:12], str(tmp_path / "all"), Needs())
        with pytest.raises(UserError, match="other pieces, steps"):
            record(TinyJob(TINY, WANTED, steps=5, batch=4), PROMPTS[:8], str(tmp_path / "all"), Needs())
        with pytest.raises(UserError, match="No machine of the cluster has 1 CPU and 4 GPU for a worker"):
            record(JOB, PROMPTS[:8], str(tmp_path / "other"), Needs(gpus=4))
    assert Recording.open(tmp_path / "all").internals().runs == 2


def test_a_recording_that_no_cluster_made_is_not_added_to(nodes, alone):
    with connected(nodes.address), pytest.raises(UserError, match="holds a recording that no cluster made"):
        record(JOB, PROMPTS, str(alone.folder), Needs())


def test_a_file_that_no_worker_can_read_ends_in_its_sentence(nodes, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(TINY.read_bytes()[:100_000])
    with connected(nodes.address), pytest.raises(UserError, match=r"broken\.safetensors"):
        record(TinyJob(broken, WANTED), PROMPTS, str(tmp_path / "all"), Needs())


def test_a_worker_that_cannot_begin_ends_in_its_sentence_and_a_piece_that_breaks_is_one_failure(nodes):
    class Broken:
        def __init__(self, begins: int):
            self.begins = begins

        def ready(self) -> None:
            self.begins -= 1
            if self.begins:
                raise UserError("There is no model here.")

        def work(self, piece: Piece) -> int:
            if piece.number == 1:
                raise ZeroDivisionError("of this one")
            return piece.number

    import ray

    pieces, done, said = drawn_pieces(["a", "b", "c"], 0, 1, ""), list[int](), list[str]()
    with connected(nodes.address):
        actor = ray.remote(max_restarts=-1)(Broken)
        with pytest.raises(UserError, match="There is no model here"):
            share(pieces, lambda: actor.remote(crew.BEGINNINGS + 1), 2, lambda _, number: done.append(number), 60)
        assert not done
        outcome = share(
            pieces, lambda: actor.remote(crew.BEGINNINGS), 1, lambda _, number: done.append(number), 60, say=said.append
        )
    assert sorted(done) == [0, 2]
    assert outcome.failed == {pieces[1]: "ZeroDivisionError: of this one"}
    again = "A worker could not begin, and tries again: There is no model here."
    assert said == [*[again] * (crew.BEGINNINGS - 1), f"{pieces[1].name} failed: ZeroDivisionError: of this one"]


def test_workers_that_are_never_born_are_given_up(nodes, monkeypatch):
    class Unborn:
        def __init__(self) -> None:
            raise RuntimeError("no GPU here")

        def ready(self) -> None: ...

    import ray

    monkeypatch.setattr(crew, "PATIENCE", 6.0)
    hired = []

    def hire() -> Any:
        hired.append(ray.remote(max_restarts=-1)(Unborn).remote())
        return hired[-1]

    with connected(nodes.address), pytest.raises(UserError, match=r"No worker could begin for .*its process ended"):
        share(drawn_pieces(["a"], 0, 1, ""), hire, 2, lambda *_: None, 60)
    assert 1 < len(hired) < 10


def test_a_cluster_that_vanishes_ends_in_a_sentence_and_another_goes_on(alone, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "all"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--what", "internals,rows", "--rows-per-step", 16, "--max-gb", 1, "--steps", 4, "--batch", 4, "--workers", 2]
    command = [sys.executable, "-m", "flux_poke.cli", "cluster", "record", TINY, "--prompts", prompts, "--out", out, *options]
    with two_nodes() as first:
        begun = subprocess.Popen([*map(str, [*command, "--address", first.address])], stderr=subprocess.PIPE, text=True)
        while len([*out.glob(".parts/*.json")]) < 3:
            assert begun.poll() is None
            time.sleep(0.05)
        first.lose_all()
        assert "The same command goes on." in begun.communicate(timeout=120)[1].replace("\n", " ")
        assert begun.returncode == 3
    with two_nodes() as second:
        again = subprocess.run([*map(str, [*command, "--address", second.address])], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    (before,) = re.findall(r"12 of 12 pieces \((\d+) of them were there\)", again.stdout)
    assert int(before) >= 3  # those that other machines ended meanwhile are there too
    require_equal(alone, Recording.open(out))


def test_nobody_at_an_address_is_a_sentence():
    with pytest.raises(Vanished, match=r"No Ray cluster answers at 127\.0\.0\.1:1: start one"), connected("127.0.0.1:1"):
        pass


def test_time_left_is_told_in_its_two_largest_units():
    assert [crew._time(seconds) for seconds in (5, 100, 5_000, 20_000)] == ["5 s", "2 min", "83 min", "5 h 33 min"]
