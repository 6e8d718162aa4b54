"""What block predictions are made of, in files: for decoding them later, in another view or with a lens.

    write_raw([folder], taps)                        # of taps that are `raw`: one folder for each image
    layer, layout = final_layer("flux1-dev.safetensors")
    taps = read_raw(folder, layer, layout)           # BlockTaps as they were

In {folder}/raw/step_{s}: double_block_{i}, single_block_{i}.safetensors with `img` and `txt` [tokens, hidden] after it,
and `change`; context.safetensors with `x` [channels, height, width], `sigma`, `sigma_next`, `vec` [hidden], `text`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from ..flux.blocks import Block, blocks_of
from ..flux.checkpoint import Checkpoint, open_safetensors, require_finite, require_format
from ..flux.layout import Layout, canonical_key
from ..flux.model import FinalLayer, unpatchify
from ..flux.weights import Plain
from ..recording.call import Call
from .lens import Lens
from .taps import BlockTaps

FOLDER, FORMAT = "raw", "flux-poke raw block states 1"


def write_raw(folders: Sequence[Path], taps: BlockTaps) -> None:
    """One folder for each image of the batch; nothing where the taps are not raw."""
    for step in taps.steps if taps.raw else ():
        for image, folder in enumerate(folders):
            for name, tensors in taps.raw_of(step, image).items():
                path = folder / FOLDER / f"step_{step}" / f"{_file_name(name)}.safetensors"
                write_safetensors(path, tensors, {"format": FORMAT})


def final_layer(checkpoint: Path) -> tuple[FinalLayer, Layout]:
    """Of a FLUX.1 or FLUX.2, in float32; the rest of the file is not read. Raises `UserError` where it has none."""
    opened = Checkpoint(checkpoint)
    plain, layout = Plain(opened), opened.layout
    known = {canonical_key(key, layout.prefix): key for key in plain}
    if layout.family == "chroma" or "final_layer.adaLN_modulation.1.weight" not in known:
        raise UserError(f"{checkpoint} has no final layer that stands alone: expected a FLUX.1 or FLUX.2.")
    layer = FinalLayer(layout.hidden, layout.out_channels, layout.family == "flux1")
    layer.load_state_dict({key: plain[known[f"final_layer.{key}"]].float() for key in layer.state_dict()})
    return layer.eval().requires_grad_(False), layout


def read_raw(folder: Path, layer: FinalLayer, layout: Layout, lens: Lens | None = None) -> BlockTaps:
    """The predictions of one image, by the final layer of the model; with a `lens`, through its maps.

    Raises `UserError` where there are no raw states in `folder`, a file is damaged, or they are of a model of another width.
    """
    taps = BlockTaps()
    steps = {int(number): path for path in (folder / FOLDER).glob("step_*/") if (number := path.name[5:]).isdecimal()}
    if not steps:
        raise UserError(f"{folder} has no folder {FOLDER} of block states: capture with --raw.")
    for step, path in sorted(steps.items()):
        try:
            taps.add(*_predictions(path, step, layer, layout, lens))
        except UserError:
            raise
        except (KeyError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is damaged ({said}): capture it again, or copy it again.") from error
    return taps


@torch.no_grad()
def _predictions(
    path: Path, step: int, layer: FinalLayer, layout: Layout, lens: Lens | None
) -> tuple[Call, dict[Block, Tensor], dict[Block, Tensor]]:
    """What is known of one step: the call, every block's velocity, and how much it changed its tokens."""
    context = _read(path / "context.safetensors")
    x, sigma, vec = context["x"][None].float(), context["sigma"].reshape(1).float(), context["vec"][None].float()
    if vec.shape[-1] != layout.hidden:
        raise UserError(f"The states in {path} are {vec.shape[-1]} wide, those of this model {layout.hidden}: name theirs.")
    velocities: dict[Block, Tensor] = {}
    changes: dict[Block, Tensor] = {}
    for file in path.glob("*_block_*.safetensors"):
        if match := re.fullmatch(r"(double|single)_block_(\d+)", file.stem):
            block, kept = Block.named(f"{match[1]}-{match[2]}"), _read(file)
            changes[block], img = kept["change"].reshape(1), kept["img"][None].float()
            last = block == blocks_of(layout)[-1]
            out = layer(img if lens is None or last else lens(block, img), vec)
            velocities[block] = unpatchify(out, x, layout.patch)
            if velocities[block].shape != x.shape:
                raise ValueError(f"{file.name} predicts {tuple(velocities[block].shape)}, expected {tuple(x.shape)}")
    levels = (sigma.item(), context["sigma_next"].item())
    return Call(x, sigma, (*(levels[0],) * (step + 1), levels[1]), (0,), known_step=step), velocities, changes


def _file_name(block: str) -> str:
    return block if block == "context" else "{}_block_{}".format(*block.split("-"))


def _read(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        require_format(file.metadata(), path, FORMAT, "file of raw block states")
        return {key: require_finite(file.get_tensor(key), f"{path}: {key}") for key in file.keys()}
