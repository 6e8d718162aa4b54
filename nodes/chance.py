"""Random Int, Random Size and Queue Limit: numbers by a seed, and an end to a queue that goes on by itself."""

from __future__ import annotations

import random

from comfy_api.latest import io

from ..counter import count_up
from ..errors import UserError
from ..sizes import pick_size
from . import host, inputs

SIZES = "1024x1024, 1152x896, 896x1152, 1216x832, 832x1216, 1344x768, 768x1344"


class RandomInt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            cls,
            "Random Int (Flux Poke)",
            "A whole number at random, by a seed.",
            [
                inputs.whole("least", 0, -inputs.MOST_SEED, inputs.MOST_SEED, "The smallest that may come."),
                inputs.whole("most", 100, -inputs.MOST_SEED, inputs.MOST_SEED, "The largest that may come."),
                inputs.random_seed("The same seed, the same number."),
            ],
            [io.Int.Output(display_name="number")],
        )

    @classmethod
    def execute(cls, least: int, most: int, seed: int = 0) -> io.NodeOutput:
        if least > most:
            raise UserError(f"Random Int: least is {least} and most is {most}: the first is to be no larger.")
        number = random.Random(seed).randint(least, most)
        host.say(cls.hidden.unique_id, f"{number}")
        return io.NodeOutput(number)


class RandomSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        budget = "Sizes of more pixels are not taken, in millions; 1024x1024 is 1.05."
        return inputs.schema(
            cls,
            "Random Size (Flux Poke)",
            "A width and a height out of a list at random, by a seed, within a budget of pixels.",
            [
                inputs.text("sizes", SIZES, "Such as 1024x1024, 1216x832; with commas or on lines of their own."),
                inputs.number("megapixels", 1.1, 0.001, 300.0, 0.05, budget),
                inputs.random_seed("The same seed, the same size."),
            ],
            [io.Int.Output(display_name="width"), io.Int.Output(display_name="height")],
        )

    @classmethod
    def execute(cls, sizes: str, megapixels: float, seed: int = 0) -> io.NodeOutput:
        width, height = pick_size(sizes, megapixels, seed)
        host.say(cls.hidden.unique_id, f"{width} x {height}")
        return io.NodeOutput(width, height)


class QueueLimit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        runs = "So many runs go through. The next one ends here, with all that waits in the queue, and counting begins anew."
        value = "Anything that the graph needs, such as the model or the prompt: what comes in goes out."
        return inputs.schema(
            cls,
            "Queue Limit (Flux Poke)",
            "Ends a queue that goes on by itself after a number of runs.",
            [
                io.AnyType.Input("value", tooltip=value),
                inputs.whole("runs", 100, 1, inputs.MOST_SEED, runs),
                inputs.text("name", "queue", "Limits of one name count together."),
            ],
            [io.AnyType.Output(display_name="value")],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return float("nan")

    @classmethod
    def execute(cls, value, runs: int, name: str) -> io.NodeOutput:
        done = count_up(host.output_path(f"counters/limit-{name}", ".txt"), runs + 1)
        if done == runs:
            host.drop_queue()
            raise UserError(f"Queue Limit: {runs} runs are done, and the rest of the queue is dropped: run again for more.")
        host.say(cls.hidden.unique_id, f"run {done + 1} of {runs}")
        return io.NodeOutput(value)
