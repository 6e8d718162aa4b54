"""Prompts and Counter: feed a graph one prompt, or one number, a run."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..counter import count_up
from ..prompts import RANDOM, SHIPPED, pick, read_prompts
from . import host


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokePrompts",
            display_name="Prompts",
            category=host.CATEGORY,
            description="One line of a text file: by number, or at random.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[SHIPPED.name, *(name for name in host.input_files(".txt") if name != SHIPPED.name)],
                    tooltip="One prompt a line. Files come from ComfyUI's input folder; prompts.txt ships with the pack.",
                ),
                io.Int.Input(
                    "index",
                    default=RANDOM,
                    min=RANDOM,
                    max=2**31 - 1,
                    tooltip="Which prompt, counted from 0; starts over after the last. -1 = a random one each run.",
                ),
                io.String.Input("regex", default="", tooltip='Only prompts in which this is found, such as ".*" or \\bred\\b.'),
            ],
            outputs=[io.String.Output(display_name="prompt"), io.Int.Output(display_name="index")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, index: int | None = None, regex: str = ""):
        return float("nan") if index == RANDOM else _file(file).stat().st_mtime_ns

    @classmethod
    def execute(cls, file: str, index: int, regex: str) -> io.NodeOutput:
        prompt, number = pick(read_prompts(_file(file), regex), index)
        host.say(cls.hidden.unique_id, f"{number}: {prompt}")
        return io.NodeOutput(prompt, number)


def _file(name: str) -> Path:
    path = host.input_path(name)
    return SHIPPED if name == SHIPPED.name and not path.exists() else path


class Counter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxPokeCounter",
            display_name="Counter",
            category=host.CATEGORY,
            description="0, 1, 2, ...: one more each run, also over a restart of ComfyUI and when queued over the API.",
            inputs=[
                io.String.Input("name", default="counter", tooltip="Counters of one name share their number."),
                io.Int.Input("max", default=0, min=0, max=2**31 - 1, tooltip="Starts over at 0 after this many; 0 = never."),
                io.Boolean.Input("restart", default=False, tooltip="Start over at 0 now."),
            ],
            outputs=[io.Int.Output(display_name="count")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return float("nan")

    @classmethod
    def execute(cls, name: str, max: int, restart: bool) -> io.NodeOutput:
        count = count_up(host.output_path(f"counters/{name}", ".txt"), max, restart)
        host.say(cls.hidden.unique_id, str(count))
        return io.NodeOutput(count)
