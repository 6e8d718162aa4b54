"""Prompts and Counter: feed a graph one prompt, or one number, a run."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..counter import count_up
from ..prompts import LISTS, RANDOM, pick, read_prompts
from . import host, inputs


def file_input() -> io.Input:
    files = [*LISTS, *(name for name in host.input_files(".txt") if name not in LISTS)]
    file = "One prompt a line. Files come from ComfyUI's input folder; prompts.txt and digits.txt ship with the pack."
    return inputs.choice("file", files, file)


def prompt_file(name: str) -> Path:
    """The file that is called `name` in the list of `file_input`."""
    path = host.input_path(name)
    return LISTS[name] if name in LISTS and not path.exists() else path


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        index = "Which prompt, counted from 0; starts over after the last. -1 = one at random, by the seed."
        return inputs.schema(
            cls,
            "Prompts (Flux Poke)",
            "One line of a text file: by number, or at random.",
            [
                file_input(),
                inputs.whole("index", RANDOM, RANDOM, inputs.MOST_SEED, index),
                inputs.text("regex", "", 'Only prompts in which this is found, such as ".*" or \\bred\\b.'),
                inputs.random_seed("For index -1: the same seed, the same prompt."),
            ],
            [io.String.Output(display_name="prompt"), io.Int.Output(display_name="index")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, index: int | None = None, regex: str = "", seed: int | None = None):
        return float("nan") if index == RANDOM and seed is None else prompt_file(file).stat().st_mtime_ns

    @classmethod
    def execute(cls, file: str, index: int, regex: str, seed: int | None = None) -> io.NodeOutput:
        prompt, number = pick(read_prompts(prompt_file(file), regex), index, seed)
        host.say(cls.hidden.unique_id, f"{number}: {prompt}")
        return io.NodeOutput(prompt, number)


class Counter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Counter (Flux Poke)",
            "0, 1, 2, ...: one more each run, also over a restart of ComfyUI and when queued over the API.",
            [
                inputs.text("name", "counter", "Counters of one name share their number."),
                inputs.whole("max", 0, 0, inputs.MOST_SEED, "Starts over at 0 after this many; 0 = never."),
                inputs.switch("restart", False, "Start over at 0 now."),
            ],
            [io.Int.Output(display_name="count")],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return float("nan")

    @classmethod
    def execute(cls, name: str, max: int, restart: bool) -> io.NodeOutput:
        count = count_up(host.output_path(f"counters/{name}", ".txt"), max, restart)
        host.say(cls.hidden.unique_id, str(count))
        return io.NodeOutput(count)
