"""Of how many images rows must be recorded for a prediction to hold on other prompts.

    uv run python benchmarks/images.py [--images 8 16 24 40 60]

The shipped tiny FLUX, `flux-poke fit` to a file of 3 MB in 10 steps: the velocity error that the plan predicts, and what the
file measures on prompts that were not recorded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from figures import figure
from flux_poke.fit import Fit
from flux_poke.pruning.planning import ByBudget
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[8, 16, 24, 40, 60])
    prompts = [prompt for digit in range(10) for prompt in digit_prompts(digit)]
    torch.set_num_threads(1)
    for images in parser.parse_args().images:
        with tempfile.TemporaryDirectory() as folder:
            out, recording = Path(folder) / "fitted.safetensors", Recording.at(Path(folder) / "recorded")
            what = ByBudget(size=0.003)
            fitted = Fit(FOLDER / "flux.safetensors", prompts, what, out, recording, count=images, steps=10).run()
        predicted = fitted.plan.velocity_error or 0.0
        measured = fitted.velocity_error
        figure(
            f"{images:3d} images: {predicted:.2g} predicted, {measured:.2g} measured",
            images=images,
            predicted=predicted,
            measured=measured,
        )


if __name__ == "__main__":
    main()
