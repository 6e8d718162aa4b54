"""The tuned lens: for each block, the affine map that best predicts the last block's image tokens from its own.

    lens = fit_lens(LensRows(folder))                # closed form; errors on images that the fit has not seen
    lens.save("lens.safetensors")
    lens.errors[Block("double", 3)]                  # 0 = the rest of the model is an affine map, 1 = no better than a constant

A block's prediction goes through its map before the final layer (Belrose et al. 2023, arXiv 2303.08112). Where the error
hardly falls from one block to the next, that block adds nothing an affine map could not: it is replaceable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..files import write_safetensors
from ..flux.blocks import Block, blocks_of
from ..flux.checkpoint import open_safetensors, require_format
from ..flux.layout import Layout
from ..parsing import from_json
from ..progress import Progress, silent
from ..recording.lens_rows import LensRows
from ..recording.split import held_out

FORMAT = "flux-poke lens 1"

#: Ridge strengths to choose from, relative to the mean variance of a hidden unit.
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Lens:
    """An affine map for every block but the last: h to weight @ h + bias, [hidden, hidden] and [hidden].

    `errors` holds, by block, the squared error on held-out images divided by the squared distance of the last block's
    tokens from their mean; `raw_errors` the same without a map. `family`, `rows` and `images` say what it was fitted on.
    """

    family: str
    weights: Mapping[Block, Tensor]
    biases: Mapping[Block, Tensor]
    errors: Mapping[Block, float]
    raw_errors: Mapping[Block, float]
    rows: int
    images: int

    def __call__(self, block: Block, state: Tensor) -> Tensor:
        """The last block's tokens as predicted from `state` [..., hidden] after `block`, on its device, in its precision."""
        if block not in self.weights:
            return state  # the last block needs no map
        return F.linear(state, self.weights[block].to(state), self.biases[block].to(state))

    def _check(self) -> None:
        """Raises `ValueError` where this cannot have been fitted."""
        hidden = {len(bias) for bias in self.biases.values() if bias.ndim == 1}
        shapes = {tuple(weight.shape) for weight in self.weights.values()}
        if len(hidden) != 1 or shapes != {(*hidden, *hidden)}:
            raise ValueError(f"maps of shapes {sorted(shapes)}, expected square ones of one width")
        for block in self.weights:
            if not (self.weights[block].isfinite().all() and self.biases[block].isfinite().all()):
                raise ValueError(f"the map of {block.title} holds numbers that are not finite")

    def check_fits(self, layout: Layout) -> None:
        """Raises `UserError` where the lens is not one for a model of this layout."""
        hidden = next(iter(self.biases.values())).shape[0]
        if (self.family, hidden, set(self.weights)) != (layout.family, layout.hidden, set(blocks_of(layout)[:-1])):
            raise UserError(
                f"This lens was fitted on a {self.family} of {len(self.weights) + 1} blocks of width {hidden}; the model is a "
                f"{layout.family} of {layout.depth + layout.depth_single} blocks of width {layout.hidden}. Fit a lens for it."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes maps in bfloat16, errors in the header."""
        tensors = {f"{block.name}.weight": weight.bfloat16() for block, weight in self.weights.items()}
        tensors |= {f"{block.name}.bias": bias.bfloat16() for block, bias in self.biases.items()}
        metadata = {"format": FORMAT, "family": self.family, "rows": str(self.rows), "images": str(self.images)}
        for key, errors in (("errors", self.errors), ("raw_errors", self.raw_errors)):
            metadata[key] = json.dumps({block.name: error for block, error in errors.items()})
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lens:
        """Raises `UserError` where the file is missing, damaged, or holds something else."""
        with open_safetensors(path) as file:
            metadata = require_format(file.metadata(), path, FORMAT, "lens", "`flux-poke lens fit` makes one.")
            try:
                errors, raw = (
                    {Block.named(name): error for name, error in from_json(metadata[key]).items()}
                    for key in ("errors", "raw_errors")
                )
                weights, biases = (
                    {block: file.get_tensor(f"{block.name}.{part}") for block in errors} for part in ("weight", "bias")
                )
                rows, images = int(metadata["rows"]), int(metadata["images"])
                lens = cls(metadata["family"], weights, biases, errors, raw, rows, images)
                lens._check()
                return lens
            except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
                raise UserError(f"{path} is a damaged lens ({error}): fit it again or use a copy.") from error


def fit_lens(rows: LensRows, device: torch.device | str = "cpu", progress: Progress = silent) -> Lens:
    """A lens by ridge regression, each block's strength chosen from `ALPHAS` on the held-out images.

    The penalty is on the map's distance from the identity, so that few rows give the raw prediction and not zero.
    Raises `UserError` where there are fewer than two images to keep apart.
    """
    _, held = held_out(rows.images)
    test_at = torch.isin(rows.images, torch.tensor(sorted(held))).to(device)
    *blocks, last = rows
    target = rows[last].to(device, torch.float32)
    scale = (target[test_at] - target[~test_at].mean(0)).double().square().sum()
    weights, biases, errors, raw_errors = {}, {}, {}, {}
    for done, block in enumerate(blocks):
        progress(f"fitting the lens of {block.title}", done, len(blocks))
        h = rows[block].to(device, torch.float32)
        raw_errors[block] = float((target[test_at] - h[test_at]).double().square().sum() / scale)
        best = None
        for weight, bias in _ridge(h[~test_at], target[~test_at]):
            # As it will be stored: the error is that of the file.
            weight, bias = weight.bfloat16(), bias.bfloat16()
            predicted = F.linear(h[test_at], weight.float(), bias.float())
            error = float((target[test_at] - predicted).double().square().sum() / scale)
            if best is None or error < best[0]:
                best = error, weight.cpu(), bias.cpu()
        assert best is not None
        errors[block], weights[block], biases[block] = best
    progress("the lens is fitted", len(blocks), len(blocks))
    return Lens(rows.family, weights, biases, errors, raw_errors, len(rows.images), len(rows.images.unique()))


def _ridge(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each alpha, the affine map I + B that brings x to y [rows, hidden]: B = (y - x)^T x (x^T x + lam I)^-1, centred."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    # Products in float32, which rows in bfloat16 do not exceed; the solve in float64.
    gram = (centred.T @ centred).double()
    cross = (centred.T @ (y - x - mean_y + mean_x)).double()
    identity = torch.eye(len(gram), dtype=torch.float64, device=x.device)
    for alpha in ALPHAS:
        step = torch.linalg.solve(gram + alpha * gram.diagonal().mean() * identity, cross).T
        weight = (identity + step).float()
        yield weight, mean_y - weight @ mean_x
