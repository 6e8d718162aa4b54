"""One drawing of a FLUX of the tiny kind with what every block predicted of it, and drawing that again from raw states.

folder = capture_tiny(TinyFlux.load(), "a 7", "tiny", Path("output"), seed=7, raw=True)
decode_raw(folder, checkpoint, decode)           # the pictures once more, in another view or with a lens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..flux.autoencoder import to_picture
from ..flux.blocks import choose_blocks
from ..flux.integrators import euler
from ..parsing import from_json, read_text
from ..progress import Progress, part, silent
from ..recording.call import Call
from ..tiny.model import STEPS, TinyFlux
from .decoding import Decode, read_picture
from .generation import Generation, write_generations
from .lens import Lens
from .raw import final_layer, read_raw
from .taps import BlockTaps, StepChoice, TapRecorder, View


@torch.no_grad()
def capture_tiny(
    tiny: TinyFlux,
    prompt: str,
    model: str,
    out: Path,
    generation_id: str,
    seed: int,
    steps: int | None = None,
    size: tuple[int | None, int | None] = (None, None),
    guidance: float | None = None,
    blocks: str = "all",
    at_steps: str = "all",
    lens: Lens | None = None,
    view: View = "x0",
    raw: bool = False,
    decode: bool = True,
    metadata: bool = True,
    progress: Progress = silent,
) -> Path:
    """Draws a prompt and writes all that goes with it to `out/{generation_id}`; `size` is width and height in pixels.

    Raises `UserError`, before anything is drawn, where blocks, steps or the lens do not fit the model, or the folder is there.
    """
    layout, folder = tiny.flux.layout, out / generation_id
    if folder.exists():
        raise UserError(f"{folder} is there already: move it, or choose another folder with --output-dir.")
    if lens is not None:
        lens.check_fits(layout)
    recorder = TapRecorder(layout, choose_blocks(blocks, layout), StepChoice.parse(at_steps), lens)
    taps, shape = BlockTaps(raw=raw), tiny.latent_shape_of(*size)
    sigmas, (context, vector) = tiny.sigmas(steps or STEPS), tiny.words([prompt])
    told = torch.full((1,), 2.5 if guidance is None else guidance) if layout.guidance else None
    calls = iter(range(len(sigmas)))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        step = next(calls)
        progress("drawing", step, 4 * len(sigmas))
        with recorder.watching(tiny.flux, Call.at(x, sigma, sigmas, step, context=context), taps):
            return tiny.flux(x, sigma, context, vector, told)

    noise = tiny.noise(1, seed, shape)
    final = to_picture(tiny.autoencoder.decode(euler(velocity, noise, sigmas))[0])
    timesteps, distilled = sigmas.tolist(), None if told is None else told.item()
    generation = Generation(model, prompt, final.width, final.height, seed, timesteps, distilled, generation_id)
    write_generations(
        out, [generation], taps, tiny.autoencoder.decode if decode else None, [final], view=view,
        in_pictures={} if metadata else None, progress=part(progress, 1, 4, 3),
    )  # fmt: skip
    return folder


def decode_raw(
    folder: Path,
    checkpoint: Path,
    decode: Decode,
    to_autoencoder: Callable[[Tensor], Tensor] = lambda latents: latents,
    lens: Lens | None = None,
    view: View = "x0",
    progress: Progress = silent,
) -> int:
    """Writes the pictures of a generation's folder again, from its raw block states; how many predictions there are.

    Raises `UserError` where the folder is not one, holds no raw states, or they are of another model.
    """
    layer, layout = final_layer(checkpoint)
    if lens is not None:
        lens.check_fits(layout)
    generation, taps = read_generation(folder), read_raw(folder, layer, layout, lens)
    taps.to_autoencoder = to_autoencoder
    final = read_picture(folder / "img_0.jpg")
    write_generations(folder.parent, [generation], taps, decode, [final], view=view, in_pictures={}, progress=progress)
    return len(taps)


def read_generation(folder: Path) -> Generation:
    """How the image in a generation's folder came about; raises `UserError` where its metadata.json does not say."""
    path = folder / "metadata.json"
    try:
        found = from_json(read_text(path))
        known = {one.name: found[one.name] for one in fields(Generation)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not say how an image came about ({error}): name a folder that `capture` wrote."
        ) from error
    return Generation(**{**known, "generation_id": folder.name})
