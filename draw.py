"""`flux-poke draw`: pictures of prompts, each from a seed of its own, with how they came about in them.

    request = DrawRequest(["three", "a 7"], num_samples=4, seed=1)
    drawn = draw_tiny(TinyFlux.load("pruned.safetensors"), request)      # one by one: (Asked, picture)
    write_drawings(Path("drawings"), drawn, request, "pruned.safetensors")

This is for models of the tiny kind; `headless/draw.py` draws with any other FLUX on ComfyUI, in the same words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .analysis.decoding import read_picture
from .analysis.generation import SOFTWARE, save_png
from .analysis.sheets import prompt_grid
from .errors import UserError
from .files import check_beginning, check_writable
from .flux.autoencoder import to_picture
from .flux.checkpoint import Checkpoint
from .flux.fingerprint import Fingerprint
from .flux.integrators import Name, integrator
from .flux.model import Flux
from .flux.sampling import FluxTimer
from .flux.weights import Plain
from .poking.poke import Poke, read_poke
from .progress import Progress, part, silent
from .pruning.checkpoint import Pruned
from .pruning.dense import PRUNED_FORMAT
from .pruning.plan import PruningPlan
from .retrain.replaced import Replaced, RetrainedLayers, open_dense_of
from .tiny.model import STEPS, TinyFlux

GRID = "grid.png"
Shift = float | Literal["dynamic", "flux2"]


@dataclass(frozen=True)
class Asked:
    """One picture: its prompt, the seed of its noise, and its place among all."""

    prompt: str
    seed: int
    number: int

    @property
    def file(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60].strip("-")
        return f"{words or 'picture'}_{self.seed}.png"


@dataclass(frozen=True)
class DrawRequest:
    """What to draw; picture number n, counted over all prompts, begins with noise of `seed` + n whatever is drawn beside it.

    None leaves a value to the model. `guidance` is what a model with distilled guidance is told; with any other it is
    classifier-free, against `negative`, and 1 is without. Raises `UserError` where there is nothing to draw, a size is
    none for a FLUX, or a negative prompt would do nothing.
    """

    prompts: Sequence[str]
    num_samples: int = 1
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    seed: int = 0
    width: int | None = None
    height: int | None = None
    integrator: Name = "euler"
    shift: Shift | None = None
    input_images: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("There is nothing to draw: give --prompt or --prompts.")
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and (size < 16 or size % 16):
                raise UserError(f"The {name} is a multiple of 16 pixels; found {size}.")

    @property
    def images(self) -> list[Asked]:
        pairs = [prompt for prompt in self.prompts for _ in range(self.num_samples)]
        return [Asked(prompt, self.seed + number, number) for number, prompt in enumerate(pairs)]


def shift_of(text: str) -> Shift:
    """A static shift, or "dynamic" or "flux2"; raises `UserError` where the text is none of them."""
    if text in ("dynamic", "flux2"):
        return text  # type: ignore[return-value]
    try:
        return FluxTimer(1, float(text)).shift
    except ValueError as error:
        raise UserError(f"--shift {text}: expected a number above 0 (1 = none), dynamic (FLUX.1) or flux2.") from error


def open_tiny(checkpoint: Path) -> TinyFlux:
    """The model in a file, dense or smaller, or a folder of retrained layers in their dense model.

    Raises `UserError` where it is not of the tiny kind, or a file is missing or damaged.
    """
    if not checkpoint.is_dir():
        return TinyFlux.load(checkpoint)
    dense = open_dense_of(checkpoint)
    tiny, replaced = TinyFlux.load(Path(dense.path)), Replaced(dense, RetrainedLayers.open(checkpoint, dense))
    return replace(tiny, flux=Flux.load(dict(Plain(replaced)), torch.float32, f"{checkpoint}"))


def open_pokes(checkpoint: Path, given: Sequence[str]) -> list[Poke]:
    """Pokes by FILE:FACTOR for what `open_tiny` opens.

    Raises `UserError` where they are of another model, or a file is missing or damaged.
    """
    pokes = [read_poke(one) for one in given]
    if not pokes:
        return []
    plan, own = _plan_of(checkpoint)
    found = []
    for poke in pokes:
        kept = None if plan is None else poke.neurons.kept_by(plan)
        if kept is None:
            poke.neurons.require(own, f"{checkpoint}")
        found.append(replace(poke, kept=kept or {}))
    return found


def _plan_of(checkpoint: Path) -> tuple[PruningPlan | None, Fingerprint]:
    """The plan of a pruned checkpoint or a folder of retrained layers, None of a dense model; and what model it is by itself.

    A folder is nothing by itself: it is its dense model.
    """
    if checkpoint.is_dir():
        dense = open_dense_of(checkpoint)
        return Replaced(dense, RetrainedLayers.open(checkpoint, dense)).plan, dense.fingerprint
    opened = Checkpoint(checkpoint)
    pruned = opened.metadata.get("format") == PRUNED_FORMAT
    return Pruned.open(checkpoint).plan if pruned else None, Fingerprint.of_checkpoint(opened)


@torch.no_grad()
def draw_tiny(
    tiny: TinyFlux, request: DrawRequest, batch: int = 16, progress: Progress = silent
) -> Iterator[tuple[Asked, Image.Image]]:
    """The pictures of a request, `batch` at a time.

    Raises `UserError` where the model takes no pictures and some are given, where a negative prompt would do nothing, and
    where memory is not enough.
    """
    layout, images = tiny.flux.layout, request.images
    if request.input_images and layout.family != "flux2":
        raise UserError("This model takes no reference pictures: leave --input-image out, or use a FLUX.2.")
    guidance = request.guidance if request.guidance is not None else 3.5 if layout.guidance else 1.0
    against = guidance != 1 and not layout.guidance
    if request.negative and not against:
        why = (
            "the model's guidance is distilled: leave it out" if layout.guidance else "--guidance is 1: give another, such as 2"
        )
        raise UserError(f"A negative prompt does nothing here, since {why}.")
    shape = tiny.latent_shape_of(request.width, request.height)
    tokens = shape[1] * shape[2] // layout.patch**2
    sigmas = FluxTimer(request.steps or STEPS, request.shift or tiny.shift).sigmas(tokens)
    references = [tiny.autoencoder.encode(_pixels(path, tiny)) for path in request.input_images]
    for first in range(0, len(images), batch):
        some = images[first : first + batch]
        within = part(progress, first, len(images), len(some))
        told = torch.full((len(some),), guidance) if layout.guidance else None
        given = [latents.expand(len(some), -1, -1, -1) for latents in references]
        prompts, free = [one.prompt for one in some], guidance if against else 1.0
        velocity = tiny.velocity(prompts, given, free, request.negative, told)
        noise = tiny.noise(len(some), some[0].seed, shape)
        method = integrator(request.integrator, some[0].seed)
        with memory_explained(f"Drawing {len(some)} pictures at once"):
            latents = method(velocity, noise, sigmas, lambda step, x, v: within("drawing", step, len(sigmas)))  # noqa: B023
            pictures = [to_picture(one) for one in tiny.autoencoder.decode(latents)]
        yield from zip(some, pictures, strict=True)


def write_drawings(
    out: Path,
    drawn: Iterable[tuple[Asked, Image.Image]],
    request: DrawRequest,
    model: str,
    settings: Mapping[str, object] | None = None,
) -> list[Path]:
    """Writes every picture to `out` as it comes, and at the end all of them as one, a row for each prompt; the files.

    Each holds how it came about: prompt, seed, size and settings as JSON under "flux-poke" in its text, the prompt as its
    description. Raises `UserError`, before anything is drawn, where a file of another kind stands in the place of one.
    """
    names = [one.file for one in request.images]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a folder is needed for the pictures: choose another name.")
    for name in (*names, GRID):
        check_writable(out / name)
        check_beginning(out / name)
    files: list[Path] = []
    rows: dict[str, list[Image.Image]] = {}
    about = {**asdict(request), "model": model, **(settings or {})}
    for name in ("prompts", "num_samples"):
        del about[name]
    about["input_images"] = [path.name for path in request.input_images]
    for one, picture in drawn:
        found = {**about, "prompt": one.prompt, "seed": one.seed, "width": picture.width, "height": picture.height}
        text = {"Description": one.prompt, "Software": SOFTWARE, SOFTWARE: json.dumps(found)}
        save_png(out / one.file, picture, {**{f"{key}": f"{value}" for key, value in picture.info.items()}, **text})
        files.append(out / one.file)
        rows.setdefault(one.prompt, []).append(picture)
    if len(files) > 1:
        save_png(out / GRID, prompt_grid(rows), {"Software": SOFTWARE, SOFTWARE: json.dumps({**about, "prompts": [*rows]})})
        files.append(out / GRID)
    return files


@contextmanager
def memory_explained(what: str) -> Iterator[None]:
    """Running out of memory as a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise UserError(
            f"{what} takes more memory than there is: draw smaller pictures (--width, --height) or fewer at once (--batch), or "
            "use a smaller model (`flux-poke fit`)."
        ) from error


def _pixels(path: Path, tiny: TinyFlux) -> Tensor:
    """A picture as the model's own size [1, 3, height, width] in 0..1."""
    _, rows, columns = tiny.latent_shape
    picture = read_picture(path).resize((columns * tiny.scale, rows * tiny.scale), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 255
