"""What saving in fp8 costs the picture, and what is predicted of it: `python benchmarks/rounding.py [CHECKPOINT]`.

    python benchmarks/rounding.py                              # the tiny FLUX that ships
    python benchmarks/rounding.py wide/flux.safetensors        # another of the tiny kind (`flux-poke train wide --out wide`)

Plans by budget for files in bf16 and in fp8, with affine repair; fp8 rounded plainly, and with compensation as rows allow it.
Velocity errors are measured on other prompts and seeds, at the dense model's x_t. The last column is what a GPU that multiplies
in 8 bits gives, emulated: there ComfyUI rounds what layers read to 8 bits as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from figures import figure
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.flux.weights import Plain
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.planning import ByBudget, make_plan
from flux_poke.pruning.precision import FP8, dense_bytes
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.rounded import Rounded
from flux_poke.pruning.rounding import LIMIT
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.recording import Recording
from flux_poke.recording.trajectories import trajectory, velocity_error
from flux_poke.tiny.model import FOLDER, TinyFlux
from predictions import prompt, recorded
from torch import Tensor

#: Of the bytes that the whole model takes in its precision.
SHARES = (0.98, 0.75, 0.5)
RECORDED, MEASURED = 120, 30


class Unseen(Cut):
    """A cut that is rounded as if nothing had been recorded."""

    @property
    def recording(self) -> None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=FOLDER / "flux.safetensors")
    parser.add_argument("--recording", type=Path, help="folder to record to, or that was recorded before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with recorded(options.checkpoint, options.recording, RECORDED) as recording:
        measure(options.checkpoint, recording)


def measure(checkpoint: Path, recording: Recording) -> None:
    """Prints a line for every plan."""
    tiny, dense = TinyFlux.load(checkpoint), Dense.open(checkpoint)
    texts = tiny.words([prompt(number, 1) for number in range(MEASURED)])
    points, _ = trajectory(tiny.flux, tiny.noise(MEASURED, 500_000), FluxTimer(10).sigmas(), *texts)

    def error(tensors: Mapping[str, Tensor], read_in_8_bits: bool = False) -> float:
        model = Flux.load(dict(Plain(tensors)), torch.float32)
        for key in tensors:
            if read_in_8_bits and key.endswith(".comfy_quant") and b"full_precision" not in bytes(tensors[key].tolist()):
                model.get_submodule(key.removesuffix(".comfy_quant")).register_forward_pre_hook(_in_8_bits)
        return velocity_error(model, points)

    print("| file | MB | predicted | measured | plain | in 8 bits |\n" + "|---" * 6 + "|")
    for precision in ("bf16", "fp8"):
        for share in SHARES:
            size = share * dense_bytes(dense, precision)
            planned = make_plan(dense, recording, ByBudget(size=size / 1e9, precision=precision))
            plan = planned.plan
            repairs = Repairs(dense, plan, "affine", recording)
            rounded = Rounded(Cut(dense, plan, repairs), precision)
            rounded.work_out()
            measured, predicted = error(rounded), plan.velocity_error or 0.0
            plain = error(Rounded(Unseen(dense, plan, repairs), precision))
            read = error(rounded, read_in_8_bits=True)
            rounded.forget()
            found = (predicted, measured, plain, read)
            figure(
                f"| {precision}, {share:.0%} | {size / 1e6:.3g} | {' | '.join(f'{value:.2g}' for value in found)} |",
                precision=precision, share=share, megabytes=size / 1e6, predicted=predicted, measured=measured, plain=plain,
                read_in_8_bits=read,
            )  # fmt: skip


def _in_8_bits(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clamp(-LIMIT, LIMIT).to(FP8).to(tensor) for tensor in inputs)


if __name__ == "__main__":
    main()
