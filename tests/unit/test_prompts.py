"""prompts.py: reading, filtering and picking prompts."""

import itertools
import re
import threading
import time

import pytest
from flux_poke import prompts
from flux_poke.errors import UserError
from flux_poke.prompts import RANDOM, SHIPPED, pick, read_prompts


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('a fox\n\n   \n  a sign that says "open"  \nein Bär im Schnee\na fox', encoding="utf-8")
    return path


def test_every_line_that_is_not_blank_is_a_prompt(file):
    assert read_prompts(file) == ["a fox", 'a sign that says "open"', "ein Bär im Schnee", "a fox"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffa fox\r\na bär\r\n".encode())
    assert read_prompts(path) == ["a fox", "a bär"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [('"', ['a sign that says "open"']), ("^a fox$", ["a fox", "a fox"]), ("(?i)BÄR|SIGN", [1, 2])],
)
def test_a_regular_expression_keeps_the_lines_it_is_found_in(file, pattern, found):
    everything = read_prompts(file)
    assert read_prompts(file, pattern) == [everything[f] if isinstance(f, int) else f for f in found]


def test_an_index_wraps_around():
    prompts = ["zero", "one", "two"]
    assert [pick(prompts, index) for index in (0, 2, 3, 7)] == [("zero", 0), ("two", 2), ("zero", 0), ("one", 1)]


def test_a_random_pick_is_the_same_for_the_same_seed_and_reaches_every_prompt():
    prompts = [f"prompt {number}" for number in range(10)]
    picks = [pick(prompts, RANDOM, seed) for seed in range(200)]
    assert picks == [pick(prompts, RANDOM, seed) for seed in range(200)]
    assert {place for _, place in picks} == set(range(10))
    assert all(prompts[place] == prompt for prompt, place in picks)


def test_a_random_pick_without_a_seed_varies():
    prompts = [str(number) for number in range(1000)]
    assert len({pick(prompts, RANDOM) for _ in range(20)}) > 1


def test_bad_input_is_named_in_one_sentence(tmp_path, file):
    empty, binary = tmp_path / "empty.txt", tmp_path / "image.png"
    empty.write_text("\n \n")
    binary.write_bytes(b"\x89PNG\r\n\xff\xfe")
    cases = [
        (lambda: read_prompts(tmp_path / "none.txt"), "none.txt is not there"),
        (lambda: read_prompts(empty), "empty.txt holds no prompts"),
        (lambda: read_prompts(binary), "image.png is not UTF-8 text"),
        (lambda: read_prompts(tmp_path), "cannot be read"),
        (lambda: read_prompts(file, "("), "regular expression '(' cannot be read"),
        (lambda: read_prompts(file, "zebra"), "None of the 4 prompts"),
        (lambda: pick(["a"], -2), "found -2"),
    ]
    for call, sentence in cases:
        with pytest.raises(UserError, match=re.escape(sentence)):
            call()


def test_the_shipped_list_is_varied_and_a_third_of_it_has_text_to_render():
    prompts = read_prompts(SHIPPED)
    assert len(prompts) >= 50
    assert len(set(prompts)) == len(prompts)
    assert 0.25 < len(read_prompts(SHIPPED, '".+"')) / len(prompts) < 0.45


def test_a_pattern_that_would_run_for_ever_ends_in_a_sentence_while_other_threads_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SEARCH_LIMIT", 1.0)
    (tmp_path / "long.txt").write_text("a" * 60 + "\n")
    beats: list[float] = []
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            beats.append(time.monotonic())

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(UserError, match=r"took more than 1 s on 1 prompts: make it simpler"):
            read_prompts(tmp_path / "long.txt", r"(\w+\s?)+$X")
    finally:
        stop.set()
        other.join()
    assert max(after - before for before, after in itertools.pairwise(beats)) < 0.7


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}", "(" * 5000 + ")" * 5000, "(?<=a+)b", "\ud800("])
def test_patterns_that_cannot_be_compiled_are_named(file, pattern):
    with pytest.raises(UserError, match="cannot be read: "):
        read_prompts(file, pattern)


def test_all_that_python_knows_of_regular_expressions_works(file):
    assert read_prompts(file, r"(?<!\S)(\w)\w*\s(?=fox)") == ["a fox", "a fox"]
    assert read_prompts(file, r"([a-z])\1") == ["ein Bär im Schnee"]
    assert read_prompts(file, "says") == ['a sign that says "open"']
