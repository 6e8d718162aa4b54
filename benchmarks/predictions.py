"""What plans by budget predict, against what is measured: `python benchmarks/predictions.py [CHECKPOINT]`.

    python benchmarks/predictions.py                           # the tiny FLUX that ships
    python benchmarks/predictions.py tiny/flux2/flux.safetensors
    python benchmarks/predictions.py wide/flux.safetensors     # another of the tiny kind (`flux-poke train wide --out wide`)

Records 200 prompts, and makes plans by budget with affine repair: of 25, 50 and 75 % of all neurons, beside as many cut by
count with the same score; where blocks have modulation layers of their own, of 25, 50 and 75 % of what these hold, of these to
an average rank of about 8, of 25, 50 and 60 % of all parameters, neurons and ranks (60 % are nearly all that may go), and half
of all parameters after a short retraining. Velocity errors are measured on other
prompts and seeds, at the dense model's x_t; beside them, the error of the final latents of free runs, and how many digits are
read right.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from figures import figure
from flux_poke.flux.model import Flux
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.planning import ByBudget, ByCount, Request, make_plan
from flux_poke.pruning.repair import Repairs
from flux_poke.pruning.surgery import Cut, shape_of
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.rows import RowChoice
from flux_poke.recording.trajectories import Trajectories, relative_error, trajectory, velocity_error
from flux_poke.retrain.distill import distill
from flux_poke.retrain.options import Options
from flux_poke.tiny.data import digit_accuracy
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts
from torch import Tensor

SHARES = (0.25, 0.5, 0.75)
RECORDED, MEASURED, TAUGHT = 200, 100, 60
#: Of a short retraining.
TRAINING = Options(steps=400, learning_rate=5e-4, batch=32, eval_every=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=FOLDER / "flux.safetensors")
    parser.add_argument("--recording", type=Path, help="folder to record to, or that was recorded before")
    parser.add_argument("--multiple", type=int, default=32, help="of neurons; a quarter of it where ranks are cut as well")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with recorded(options.checkpoint, options.recording, RECORDED, options.seed) as recording:
        measure(options.checkpoint, recording, options.multiple, options.seed)


@contextmanager
def recorded(checkpoint: Path, folder: Path | None, number: int, seed: int = 0) -> Iterator[Recording]:
    """A recording of `number` prompts: in `folder`, where it may have been made before, or for the length of the `with`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary) / "recording"
        if not folder.exists():
            prompts = [prompt(index, 0) for index in range(number)]
            wanted = Wanted(internals=True, rows=RowChoice(rows=24, steps=8, seed=seed))
            record(checkpoint, prompts, Recording.at(folder), wanted, seed=10_000 + 1_000 * seed, batch=40)
        yield Recording.open(folder)


def measure(checkpoint: Path, recording: Recording, multiple: int, seed: int) -> None:
    """Prints a line for every plan."""
    tiny, dense = TinyFlux.load(checkpoint), Dense.open(checkpoint)
    texts = tiny.words([prompt(number, 1) for number in range(MEASURED)])
    noise, sigmas = tiny.noise(MEASURED, 500_000 + 1_000 * seed), tiny.sigmas(20)
    points, latents = trajectory(tiny.flux, noise, sigmas, *texts)

    def line(name: str, tensors: Mapping[str, Tensor], predicted: float | None) -> None:
        """What is measured of a model with these tensors."""
        changed = Flux.load(tensors, torch.float32)
        _, found = trajectory(changed, noise, sigmas, *texts)
        velocity, latent = velocity_error(changed, points), relative_error(latents, found)
        right = digit_accuracy(tiny.autoencoder.decode(found), [number % 10 for number in range(MEASURED)])
        said = "| |" if predicted is None else f"{predicted:.2g} | {predicted / velocity:.2f} |"
        figure(
            f"| {name} | {said} {velocity:.2g} | {latent:.2g} | {right:.0%} |",
            plan=name, predicted=predicted or 0.0, measured=velocity, latents=latent, digits=right,
        )  # fmt: skip

    def planned(name: str, what: Request) -> Cut:
        plan = make_plan(dense, recording, what).plan
        cut = Cut(dense, plan, Repairs(dense, plan, "affine", recording))
        line(name, cut, plan.velocity_error)
        return cut

    print("| cut | predicted | ratio | measured | latents | digits |\n" + "|---" * 6 + "|")
    line("nothing", dense.tensors, None)
    for share in SHARES:
        planned(f"{share:.0%} of the neurons", ByBudget(neurons=share, multiple=multiple))
        each = round(share * dense.layout.sites[0].width)
        planned("as many by count", ByCount(each, each, each, "obs"))
    if not dense.layout.modulated:
        return
    outputs, hidden = shape_of(dense.tensors, f"{dense.layout.sites[0].modulation}.weight")
    whole = sum(dense.tensors[f"{site.modulation}.weight"].numel() for site in dense.layout.modulated)
    parameters = sum(tensor.numel() for tensor in dense.tensors.values())
    for share in SHARES:
        planned(f"{share:.0%} of modulation", ByBudget(share=share * whole / parameters, touch="modulation", multiple=8))
    low = whole * (1 - 8 * (outputs + hidden) / (outputs * hidden)) / parameters  # at rank 8 in all layers
    planned("modulation to rank 8 on average", ByBudget(share=low, touch="modulation", multiple=8))
    for share in (0.25, 0.6, 0.5):
        cut = planned(f"{share:.0%} of all parameters", ByBudget(share=share, multiple=multiple // 4))
    taught = tiny.words([prompt(number, 0) for number in range(TAUGHT)])
    steps, _ = trajectory(tiny.flux, tiny.noise(TAUGHT, 30_000 + 1_000 * seed), sigmas, *taught)
    line("the last one retrained", {**cut, **distill(cut, Trajectories.of(steps), TRAINING).tensors}, None)


def prompt(number: int, half: int) -> str:
    """A prompt for the digit `number` % 10; those of one half are not in the other."""
    template = number // 10 % 13
    return digit_prompts(number % 10)[2 * template + (template + half) % 2]


if __name__ == "__main__":
    main()
