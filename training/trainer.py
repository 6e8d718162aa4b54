"""Makes a FLUX of the tiny kind from scratch: first its autoencoder, then transformer and word encoder together.

    train(read_config("tiny"), Path("out"))          # flux.safetensors, words.safetensors, autoencoder.safetensors

Called again on the same folder, it goes on where it was; with more steps than before, along the learning rates of the longer
training. Beside the three files stands the state of the training (`flux.training.safetensors`), which more steps go on from;
with samples `samples/`, with checkpoints that are kept `checkpoints/STEP/`, with TensorBoard `tensorboard/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..files import check_replaces
from ..flux.autoencoder import Autoencoder
from ..flux.autoencoder import Pixels as PixelSpace
from ..flux.checkpoint import open_safetensors
from ..flux.model import Flux
from ..flux.resume import saved_notes
from ..parsing import from_json
from ..progress import Progress, part, silent
from ..tiny.model import TinyFlux
from ..tiny.words import WordEncoder, grown
from .autoencoders import AUTOENCODER, encoded, trained_autoencoder, write_weights
from .config import Computing, Config
from .data import Examples, load_examples
from .loop import Course, optimise
from .objectives import REFERENCE_PROMPTS, Latents, Velocity, velocity_loss
from .samples import write_samples

if TYPE_CHECKING:
    from accelerate import Accelerator

FLUX, WORDS = "flux.safetensors", "words.safetensors"
#: What files of a training have in them, among their tensors' names or in the header.
_SIGNS = {FLUX: "axes", WORDS: "text.weight"}
#: Keys, and whole sections, that may be others when a training goes on.
_MAY_CHANGE = ("flux.steps", "samples", "saving", "computing")
#: Steps between two figures for TensorBoard.
LOGGED = 10


def train(config: Config, out: Path, progress: Progress = silent) -> None:
    """Trains what is not finished in `out`; finished parts are kept as they are.

    Raises `UserError` where the data cannot be read or be trained on, `out` holds another training, and on Ctrl-C once the
    state is saved.
    """
    accelerator = start(config.computing)
    examples = load_examples(config.data, config.seed)
    _check_batches(config, len(examples), accelerator.num_processes)
    for name in (FLUX, WORDS, AUTOENCODER):
        check_replaces(out / name, None)
    for name, sign in _SIGNS.items():
        _check_trained(out / name, sign)
    _check_same(config, out)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
    first = config.autoencoder.steps if config.autoencoder else 0
    whole = first + config.flux.steps
    autoencoder = trained_autoencoder(config, examples.images, out, accelerator, part(progress, 0, whole, first))
    if (out / FLUX).exists() and not (out / "flux.training.safetensors").exists():
        return
    torch.manual_seed(config.seed)
    beside = REFERENCE_PROMPTS if config.flux.reference_every else ()
    vocabulary, longest = grown(caption for captions in (*examples.captions, *beside) for caption in captions)
    flux = Flux(config.flux.layout(autoencoder.latent_shape))
    words = WordEncoder(config.flux.text_width, vocabulary, longest, pooled=config.flux.family == "flux1")
    nn.init.zeros_(flux.final_layer.linear.weight)
    negatives = encoded(autoencoder, 1 - examples.images, accelerator) if beside else None
    latents = Latents.of(examples, encoded(autoencoder, examples.images, accelerator), words, negatives)
    watcher = Watcher(config, out, autoencoder, examples, accelerator)
    options = config.flux
    course = Course(
        "flux", options.steps, options.learning_rate, options.schedule, options.warmup, options.ema, config.saving.every
    )
    model = Velocity(flux, words)
    loss, notes = velocity_loss(latents, options, accelerator), _notes(config, accelerator)
    saved = out / "flux.training.safetensors"
    within = part(progress, first, whole, options.steps)
    with watcher:
        trained = optimise(accelerator, model, loss, course, saved, notes, watcher.watch, within)
    assert isinstance(trained, Velocity)
    if accelerator.is_main_process:
        write_model(out, trained, config)
    progress("flux: trained", whole, whole)


def _notes(config: Config, accelerator: Accelerator) -> dict[str, str]:
    """What a saved state says of its training."""
    return {"training": config.model_dump_json(), "processes": str(accelerator.num_processes)}


def start(computing: Computing) -> Accelerator:
    """Device, precision and processes; `accelerate launch` starts several."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise UserError("Training needs accelerate: pip install 'flux-poke[train]'.") from error
    try:
        if computing.device not in (None, "cpu"):
            torch.zeros(1, device=computing.device)
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(computing.device)
        accelerator = Accelerator(cpu=computing.device == "cpu", mixed_precision=computing.mixed_precision)
        torch.zeros(1, device=accelerator.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"Section computing cannot be had on this machine ({said:.200}): choose another device or precision."
        ) from error
    return accelerator


def write_model(folder: Path, trained: Velocity, config: Config) -> None:
    """Words, then transformer; what tells that a training is finished is written last."""
    axes = ",".join(map(str, trained.flux.layout.axes))
    write_weights(folder / WORDS, trained.words, trained.words.header)
    write_weights(folder / FLUX, trained.flux, {"training": config.model_dump_json(), "axes": axes})


class Watcher:
    """Looks on while a transformer is trained: samples, numbered checkpoints, figures for TensorBoard."""

    def __init__(
        self, config: Config, out: Path, autoencoder: Autoencoder | PixelSpace, examples: Examples, accelerator: Accelerator
    ):
        self.config, self.out, self.autoencoder, self.accelerator = config, out, autoencoder, accelerator
        self.board: Any = None
        self.prompts: list[str] = []
        if config.samples:
            spread = range(0, len(examples), max(1, len(examples) // 16))
            captions = [examples.captions[index] for index in spread][:16]
            self.prompts = config.samples.prompts or [some[n % len(some)] for n, some in enumerate(captions)]

    def __enter__(self) -> Watcher:
        if self.config.saving.tensorboard and self.accelerator.is_main_process:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("tensorboard in section saving needs it: pip install 'flux-poke[train]'.") from error
            saved = self.out / "flux.training.safetensors"
            done = int(saved_notes(saved)["step"]) if saved.exists() else 0
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=done + 1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()

    def watch(self, done: int, loss: float, rate: float, model: nn.Module) -> None:
        if not self.accelerator.is_main_process:
            return
        assert isinstance(model, Velocity)
        config, last = self.config, done == self.config.flux.steps
        if self.board and (done % LOGGED == 0 or done == 1 or last):
            self.board.add_scalar("loss", loss, done)
            self.board.add_scalar("learning rate", rate, done)
        if config.samples and (done % config.samples.every == 0 or last):
            tiny = TinyFlux(model.flux, model.words, self.autoencoder)
            path = self.out / "samples" / f"{done:07}.png"
            picture = write_samples(path, tiny, self.prompts, config.samples)
            if self.board:
                self.board.add_image("samples", picture, done)
        if config.saving.keep and done % config.saving.every == 0:
            self._keep(done, model)

    def _keep(self, done: int, model: Velocity) -> None:
        """A folder of its own for the model as it is, beside which all but the newest are removed."""
        folder = self.out / "checkpoints"
        one = folder / f"{done:07}"
        one.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.out / AUTOENCODER, one / AUTOENCODER)
        write_model(one, model, self.config)
        numbered = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
        for old in numbered[: -self.config.saving.keep]:
            for name in (FLUX, WORDS, AUTOENCODER):
                (old / name).unlink(missing_ok=True)
            with suppress(OSError):  # something of the user's is in it
                old.rmdir()


def _check_batches(config: Config, images: int, processes: int) -> None:
    for name, section in (("autoencoder", config.autoencoder), ("flux", config.flux)):
        if section is None:
            continue
        if section.batch > images:
            raise UserError(
                f"batch in section {name} must be at most {images}, since there are {images} images; found {section.batch}."
            )
        if section.batch % processes:
            raise UserError(f"batch in section {name} must be a multiple of the {processes} processes; found {section.batch}.")


def _check_trained(path: Path, sign: str) -> None:
    """Raises `UserError` where a file is there that no training has written: one would replace it, or take it for its own."""
    if path.exists():
        with open_safetensors(path) as file:
            if sign not in {*file.keys(), *(file.metadata() or {})}:
                raise UserError(
                    f"{path} is something else and is not replaced: expected what a training has written, with {sign} in it. "
                    "Choose another folder."
                )


def _check_same(config: Config, out: Path) -> None:
    """Raises `UserError` where a state in `out` is of a training with other settings than those that may change."""
    for name in ("autoencoder", "flux"):
        path = out / f"{name}.training.safetensors"
        if not path.exists() or "training" not in (notes := saved_notes(path)):
            continue
        try:  # keys that were not known then have the value that stands for leaving them out
            begun = Config.of(from_json(notes["training"]), str(path))
        except ValueError as error:
            raise UserError(f"{path} does not say which training it is of ({error}): remove it to begin anew.") from error
        then, now = _flat(begun.model_dump()), _flat(config.model_dump())
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
                raise UserError(
                    f"{path} is a training with {key}: {then.get(key)}; the configuration has {now.get(key)}. Go on with what "
                    "it was begun with, or choose another folder."
                )


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"flux": {"steps": 3}}` as `{"flux.steps": 3}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found
