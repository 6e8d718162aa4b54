"""recording/queued.py: a run counts once, in whichever order its attempts and their ends come."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.recording.internals import Internals, add_to_file
from flux_poke.recording.queued import QueuedRun, add_run, merge_files
from flux_poke.recording.statistics import SiteInternals
from safetensors import safe_open

MODEL = Fingerprint("shapes", (0.5,), (2.0**-9,))


def drawn(number: int, part: float = 1.0) -> Internals:
    """What run `number` counts; or a part of it."""
    generator = torch.Generator().manual_seed(number)
    tokens = int(64 * part)
    site = SiteInternals(
        torch.randint(0, tokens, (30,), generator=generator), tokens,
        torch.randn(30, generator=generator, dtype=torch.float64), torch.rand(30, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    return Internals.new("flux1", MODEL, {"single-0": site, "double-img-0": site + site}, steps=3)


def run(number: int, attempt: str = "first", given_up: tuple[str, ...] = ()) -> QueuedRun:
    return QueuedRun(f"q-{number}", f"{number} {attempt}", given_up)


@pytest.fixture
def expected(tmp_path) -> Internals:
    """Four runs, each counted once."""
    for number in range(4):
        total = add_to_file(tmp_path / "expected", drawn(number))
    return total


def assert_counts(found: Internals, expected: Internals) -> None:
    assert (found.runs, found.steps) == (expected.runs, expected.steps)
    for name, site in expected.sites.items():
        assert found.sites[name].tokens == site.tokens
        for part in ("fires", "sum", "sum_sq"):
            assert torch.equal(getattr(found.sites[name], part), getattr(site, part))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "internals.safetensors"


def test_runs_of_a_queue_add_up_as_others_do(path, expected):
    for number in range(4):
        total = add_run(path, drawn(number), run(number))
    assert_counts(total, expected)
    assert_counts(Internals.load(path), expected)
    assert Internals.load(path).queued == {f"q-{number}" for number in range(4)}


def test_another_attempt_replaces_the_newest_one(path, expected):
    for number in (0, 1, 2):
        add_run(path, drawn(number), run(number))
    add_run(path, drawn(3, part=0.5), run(3, "broken off"))
    assert_counts(add_run(path, drawn(3), run(3, "again")), expected)


def test_another_attempt_of_one_that_was_counted_before_others_adds_nothing(path, expected):
    for number in range(4):
        add_run(path, drawn(number), run(number))
    assert_counts(add_run(path, drawn(1), run(1, "again")), expected)


def test_an_attempt_that_was_given_up_is_taken_out_by_the_next_run(path, expected):
    for number in (0, 1, 7):
        add_run(path, drawn(number), run(number))
    add_run(path, drawn(2), run(2, given_up=("7 first",)))
    assert_counts(add_run(path, drawn(3), run(3, given_up=("7 first",))), expected)
    assert "q-7" not in Internals.load(path).queued


def test_two_samplers_of_one_graph_are_one_run_and_are_taken_out_together(path, expected):
    for number in (0, 1):
        add_run(path, drawn(number), run(number))
    add_run(path, drawn(8), run(8))
    add_run(path, drawn(9), run(8))
    add_run(path, drawn(2), run(2, given_up=("8 first",)))
    assert_counts(add_run(path, drawn(3), run(3)), expected)


def test_what_is_drawn_outside_of_the_queue_in_between_stays(path, expected):
    add_run(path, drawn(0), run(0))
    add_run(path, drawn(7), run(7))
    add_to_file(path, drawn(1))
    add_run(path, drawn(2), run(2, given_up=("7 first",)))
    assert_counts(add_run(path, drawn(3), run(3)), expected)


def test_without_a_queue_a_file_is_as_it_was(path, expected):
    for number in range(4):
        add_run(path, drawn(number), None)
    assert_counts(Internals.load(path), expected)
    with safe_open(path, "pt") as file:
        assert not {"queued", "last"} & file.metadata().keys()
        assert not [key for key in file.keys() if "last" in key]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_a_run_that_two_servers_counted_counts_once_when_they_are_merged(tmp_path, expected, order):
    add_run(tmp_path / "a", drawn(0), run(0))
    add_run(tmp_path / "a", drawn(1), run(1, "on the server that died"))
    add_run(tmp_path / "b", drawn(1), run(1, "again"))
    add_run(tmp_path / "b", drawn(2), run(2))
    add_run(tmp_path / "c", drawn(3), run(3))
    assert_counts(merge_files(tmp_path / "sum", [tmp_path / name for name in order]), expected)


@pytest.mark.parametrize("order", list(itertools.permutations("ab")))
def test_of_two_newest_attempts_the_whole_one_stays(tmp_path, expected, order):
    for number in (0, 1, 2):
        add_run(tmp_path / "a", drawn(number), run(number))
    add_run(tmp_path / "a", drawn(3, part=0.5), run(3, "broken off"))
    add_run(tmp_path / "b", drawn(3), run(3, "again"))
    assert_counts(merge_files(tmp_path / "sum", [tmp_path / name for name in order]), expected)


def test_runs_that_would_count_twice_and_cannot_be_told_apart_are_refused(tmp_path):
    for name in "ab":
        for number in (0, 1, 2):
            add_run(tmp_path / name, drawn(number), run(number, name))
    with pytest.raises(UserError, match="holds 2 runs of a queue that this recording holds too"):
        merge_files(tmp_path / "sum", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("text", [None, "", "no json", "{}", "[1, 2]", "7", ["1", 0], '["a", "b", 3]'])
def test_what_no_queue_wrote_is_none(text):
    assert QueuedRun.from_json(text) is None


def test_a_reader_beside_a_writer_meets_one_file_or_the_other(path, tmp_path):
    """The header grows with every run of a queue, so that numbers of one file would be found at places of another."""
    add_run(path, drawn(0), run(0))
    small = Internals.load(path)
    large = replace(small, runs=2, queued=frozenset(map(str, range(50))), sites={k: s + s for k, s in small.sites.items()})
    files = [tmp_path / "small.safetensors", tmp_path / "large.safetensors"]
    for internals, file in zip((small, large), files, strict=True):
        internals.save(file)
    code = """
import sys
from itertools import cycle
from pathlib import Path
from flux_poke.recording.internals import Internals

*files, path = map(Path, sys.argv[1:])
for number, internals in enumerate(cycle([Internals.load(file) for file in files])):
    internals.save(path)
    if number == 1:
        print("writing", flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code, *files, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    try:
        for _ in range(300):
            found = Internals.load(path)
            assert found.sites["single-0"].tokens == 64 * found.runs
            assert torch.equal(found.sites["single-0"].sum, found.runs * small.sites["single-0"].sum)
    finally:
        writer.kill()
        writer.communicate()
