"""The autoencoder of a training: the one in its folder, or a new one; in pixel space, what stands for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_safetensors
from ..flux.autoencoder import SIDE, Autoencoder, Block, load_autoencoder
from ..flux.autoencoder import Pixels as PixelSpace
from ..flux.checkpoint import read_finite
from ..progress import Progress
from ..tiny.model import FOLDER
from .config import AutoencoderTraining, Config
from .loop import Course, optimise
from .objectives import Reconstruction, reconstruction_loss

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOENCODER = "autoencoder.safetensors"


def trained_autoencoder(
    config: Config, images: Tensor, out: Path, accelerator: Accelerator, progress: Progress
) -> Autoencoder | PixelSpace:
    """The autoencoder in `out`, trained on `images` [pictures, 3, side, side] where it is not there yet.

    Raises `UserError` where the file that is there is for other pictures or another family.
    """
    path, options = out / AUTOENCODER, config.autoencoder
    if not path.exists():
        if options is None:
            made: nn.Module = _pixels(config)
        else:
            made = _train(config, options, images, out, accelerator, progress)
        if accelerator.is_main_process:
            write_weights(path, made, {} if config.data.side == SIDE and options else {"side": str(config.data.side)})
            (out / "autoencoder.training.safetensors").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    tensors, metadata = read_finite(path)
    try:
        found = load_autoencoder(tensors, metadata)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not an autoencoder of the tiny FLUX: remove it, or choose another folder.") from error
    wanted = (config.flux.family if options else "pixels", config.data.side)
    kind = "pixels" if isinstance(found, PixelSpace) else "flux2" if found.patch == 2 else "flux1"
    if (kind, found.side) != wanted:
        raise UserError(
            f"{path} is for {kind} and pictures of {found.side} pixels; the configuration is for {wanted[0]} and {wanted[1]}. "
            "Choose another folder."
        )
    return found.to(accelerator.device)


@torch.no_grad()
def encoded(autoencoder: Autoencoder | PixelSpace, images: Tensor, accelerator: Accelerator) -> Tensor:
    """Latents of all images, on the CPU."""
    return torch.cat([autoencoder.encode(some.to(accelerator.device)).cpu() for some in images.split(128)])


def write_weights(path: Path, model: nn.Module, header: dict[str, str]) -> None:
    """Weights in bfloat16, scalars as they are."""
    write_safetensors(path, {key: t.cpu().bfloat16() if t.ndim else t.cpu() for key, t in model.state_dict().items()}, header)


def _pixels(config: Config) -> PixelSpace:
    assert config.pixels is not None
    along = 2 if config.flux.family == "flux1" else 1  # latent pixels along a token of the transformer
    return PixelSpace(config.data.side, config.pixels.patch // along, config.data.channels)


def _train(
    config: Config, options: AutoencoderTraining, images: Tensor, out: Path, accelerator: Accelerator, progress: Progress
) -> Autoencoder:
    torch.manual_seed(config.seed)
    autoencoder = Autoencoder(config.flux.family, config.data.side)
    if options.from_tiny:
        _begin_as_tiny(autoencoder)
    course = Course("autoencoder", options.steps, options.learning_rate)
    saved, notes = out / "autoencoder.training.safetensors", {"training": config.model_dump_json()}
    negatives = bool(config.flux.reference_every)
    loss = reconstruction_loss(images, autoencoder.latent_shape, options, accelerator, negatives)
    optimise(accelerator, Reconstruction(autoencoder, options), loss, course, saved, notes, lambda *_: None, progress)
    return autoencoder


@torch.no_grad()
def _begin_as_tiny(autoencoder: Autoencoder) -> None:
    """The weights of the tiny FLUX.1's autoencoder that ships, where they fit; what FLUX.2's blocks have more is 0 at first."""
    begun, _ = read_finite(FOLDER / AUTOENCODER)
    own = autoencoder.state_dict()
    fitting = {key: tensor.float() for key, tensor in begun.items() if key in own and own[key].shape == tensor.shape}
    autoencoder.load_state_dict({**own, **fitting})
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for block in autoencoder.modules():
        if isinstance(block, Block) and block.pool is not None:
            last = block.pool[-1]
            assert isinstance(last, nn.Conv2d)
            nn.init.zeros_(last.weight)
