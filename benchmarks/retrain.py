"""Retraining cut layers: the original flux-poke's recipe and this project's default, on the same data in one run.

    uv run python benchmarks/retrain.py [--only layers|pairs] [--images 60] [--steps-each 4] [--seed 0] [--threads 1]

The shipped tiny FLUX, half of every MLP cut by frequency. The original's recipe: AdamW 5e-5 with a cosine, 1,000 steps,
batch 8, squared error of the block states. Both train the MLPs of one block at a time, on the same block states, with the same
images held out, and both are measured by the same code: squared error on the held-out images relative to the states' mean
square, img and txt alike, and plain. They take turns layer by layer. Times are processor seconds. The second table has the
held-out error after the second of two blocks, trained each by itself, the second on what the first one gives, and together.
Another seed gives other drawings, other prompts, another split and other batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from figures import figure
from flux_poke.flux.blocks import blocks_of
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.planning import ByCount, make_plan
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.drawing import Wanted, record
from flux_poke.recording.recording import Recording
from flux_poke.recording.states import StateChoice
from flux_poke.retrain.blocks import BlockProblem, Chain
from flux_poke.retrain.layers import retrain_layers
from flux_poke.retrain.options import Options
from flux_poke.retrain.problem import Loss, batch, held_out_loss
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from flux_poke.tiny.model import FOLDER
from flux_poke.tiny.words import digit_prompts
from torch.nn import functional as F


def originals_recipe(dense: Dense, plan: PruningPlan, states: BlockStates, block_index: int, seed: int) -> tuple[Loss, float]:
    """Held-out loss and seconds of 1,000 steps; its four evaluations on the way are not counted against it."""
    begun = time.process_time()
    chain = Chain.load(Cut(dense, plan), range(block_index, block_index + 1))
    problem = BlockProblem(chain, states, Options(seed=seed))
    weights = [weight for weight in chain.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(1000):
        samples = batch(problem.train, 8, seed, step)
        found, expected = chain(problem.state(samples)), states.tokens(samples, block_index + 1)
        loss = F.mse_loss(torch.cat(found, dim=1), torch.cat(expected, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - begun
    return held_out_loss(problem), seconds


def compare_recipes(dense: Dense, plan: PruningPlan, states: BlockStates, seed: int, folder: Path) -> None:
    """Every layer: the original's recipe and the default."""
    print(f"{'':<12}{'as cut':>10}{'original':>24}{'this project':>24}{'ratios':>24}")
    print(
        f"{'layer':<12}{'relative':>10}" + f"{'relative':>10}{'plain':>8}{'s':>6}" * 2 + f"{'loss':>10}{'plain':>7}{'time':>7}"
    )
    for block_index, block in enumerate(blocks_of(dense.layout)):
        theirs, seconds = originals_recipe(dense, plan, states, block_index, seed)
        begun = time.process_time()
        (ours,) = retrain_layers(dense, plan, states, str(block_index), folder, Options(seed=seed))
        own = time.process_time() - begun
        figure(
            f"{block.name:<12}{ours.relative_cut:>10.2e}"
            f"{theirs.relative:>10.2e}{theirs.mse:>8.4f}{seconds:>6.1f}"
            f"{ours.relative_final:>10.2e}{ours.final_loss:>8.4f}{own:>6.1f}"
            f"{ours.relative_final / theirs.relative:>10.3f}{ours.final_loss / theirs.mse:>7.3f}{own / seconds:>7.3f}",
            layer=block.name, cut=ours.relative_cut, original=theirs.relative, found=ours.relative_final,
            original_s=seconds, found_s=own,
        )  # fmt: skip


def compare_pairs(dense: Dense, plan: PruningPlan, states: BlockStates, seed: int, folder: Path) -> None:
    """Every two consecutive blocks: the error after the second one, by how they are trained."""
    ways: dict[str, dict[str, Any]] = {
        "each by itself": {},
        "one after the other": {"sequential": True},
        "together": {"thickness": 2},
    }
    print(f"{'pair':<22}{'steps':>6}" + "".join(f"{way:>28}" for way in ways))
    print(" " * 28 + f"{'relative':>22}{'s':>6}" * len(ways))
    blocks = blocks_of(dense.layout)
    retrain_layers(dense, plan, states, "0", folder / "warm up", Options())
    for block_index, (first, second) in enumerate(pairwise(blocks)):
        pair = range(block_index, block_index + 2)
        for steps in (32, 256):
            line, found = f"{first.name + ', ' + second.name:<22}{steps:>6}", dict[str, float]()
            for way, how in ways.items():
                options = Options(steps=steps, seed=seed, **how)
                begun = time.process_time()
                retrain_layers(dense, plan, states, f"{pair[0]}-{pair[1]}", folder / way, options)
                seconds = time.process_time() - begun
                layers = RetrainedLayers.open(folder / way, dense, pair[0], pair[1])
                problem = BlockProblem(Chain.load(Replaced(dense, layers), pair), states, options)
                error = held_out_loss(problem).relative
                line += f"{error:>22.3e}{seconds:>6.1f}"
                found |= {way: error, f"{way}, s": seconds}
            figure(line, pair=f"{first.name}, {second.name}", steps=steps, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=("layers", "pairs"))
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--steps-each", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = FOLDER / "flux.safetensors"
    dense = Dense.open(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = [digit_prompts(number % 10)[(number // 10 + 6 * given.seed) % 13] for number in range(given.images)]
        recording = Recording.at(folder)
        wanted = Wanted(internals=True, blocks=StateChoice(given.steps_each, seed=given.seed))
        record(checkpoint, prompts, recording, wanted, seed=10_000 * given.seed, batch=10)
        half = dense.layout.sites[0].width // 2
        plan = make_plan(dense, recording, ByCount(half, half, half, "frequency")).plan
        states = BlockStates.open(recording.states_folder)
        print(f"torch {torch.__version__}, {given.threads} threads; {len(states)} states of {given.images} images")
        if given.only != "pairs":
            compare_recipes(dense, plan, states, given.seed, folder / "layers")
        if given.only != "layers":
            compare_pairs(dense, plan, states, given.seed, folder / "pairs")


if __name__ == "__main__":
    main()
