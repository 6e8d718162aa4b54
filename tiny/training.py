"""Makes the tiny FLUX from scratch: first its autoencoder, then transformer and word encoder together.

    train_tiny(Path("out"))          # flux.safetensors, words.safetensors, autoencoder.safetensors

Each part writes a checkpoint every `SAVE_EVERY` steps and, called again on the same folder, goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..flux.autoencoder import CHANNELS, Autoencoder
from ..flux.layout import Layout, Site, Stream
from ..flux.model import Flux
from ..flux.resume import load_training, save_training
from .data import digit_images
from .model import FOLDER
from .words import WordEncoder, digit_prompts, word_ids

SAVE_EVERY = 250

#: Told after every step: part ("autoencoder" or "flux"), step, steps, loss.
Progress = Callable[[str, int, int, float], None]


def train_tiny(out: Path, config: dict[str, Any] | None = None, progress: Progress | None = None) -> None:
    """Trains what is not finished in `out`; finished parts are kept as they are."""
    config = config or read_config()
    out.mkdir(parents=True, exist_ok=True)
    report: Progress = progress or (lambda *_: None)
    images, digits = digit_images()

    encoder_file = out / "autoencoder.safetensors"
    if not encoder_file.exists():
        torch.manual_seed(config["seed"])
        autoencoder = Autoencoder()
        _train(autoencoder, autoencoder_loss(autoencoder, images, config["autoencoder"]), "autoencoder", config, out, report)
        _save(autoencoder, encoder_file)
    autoencoder = Autoencoder.load(load_file(encoder_file))

    if not (out / "flux.safetensors").exists():
        torch.manual_seed(config["seed"])
        flux, words = Flux(tiny_layout(config["flux"])), WordEncoder(config["flux"]["text_width"])
        nn.init.zeros_(flux.final_layer.linear.weight)
        with torch.no_grad():
            latents = torch.cat([autoencoder.encode(part) for part in images.split(128)])
        both = nn.ModuleDict({"flux": flux, "words": words})
        _train(both, flux_loss(flux, words, latents, digits, config["flux"]), "flux", config, out, report)
        _save(words, out / "words.safetensors")
        _save(flux, out / "flux.safetensors")


def read_config(path: Path | None = None) -> dict[str, Any]:
    """The training's configuration from a YAML file (default: the one that made the shipped weights)."""
    path = path or FOLDER / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({error}).") from error
    for part in ("autoencoder", "flux"):
        if not isinstance(config, dict) or not isinstance(config.get(part), dict):
            raise UserError(f"{path} has no section '{part}': expected one like tiny/config.yaml.")
    return config


def autoencoder_loss(model: Autoencoder, images: Tensor, config: dict[str, Any]) -> Callable[[int], Tensor]:
    """Squared error of decode(encode(image)), with latents held near mean 0 and variance 1 per channel."""

    def loss(step: int) -> Tensor:
        batch = images[_batch(len(images), config["batch"], step)]
        latents = model.encode(batch)
        noisy = latents + config["latent_noise"] * torch.randn_like(latents)
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        moments = (mean**2).mean() + ((variance + 1e-6).sqrt() - 1).pow(2).mean()
        return F.mse_loss(model.taesd_decoder(noisy), batch) + config["moment_weight"] * moments

    return loss


def flux_loss(
    flux: Flux, words: WordEncoder, latents: Tensor, digits: Tensor, config: dict[str, Any]
) -> Callable[[int], Tensor]:
    """Squared error of the velocity at logit-normal noise levels (Esser et al. 2024, arXiv 2403.03206)."""
    prompts = torch.tensor([[word_ids(prompt) for prompt in digit_prompts(digit)] for digit in range(10)])

    def loss(step: int) -> Tensor:
        chosen = _batch(len(latents), config["batch"], step)
        clean, noise = latents[chosen], torch.randn(len(chosen), *latents.shape[1:])
        sigma = torch.sigmoid(torch.randn(len(chosen)))
        ids = prompts[digits[chosen], torch.randint(prompts.shape[1], (len(chosen),))]
        context, vector = words.encode(ids)
        x = torch.lerp(clean, noise, sigma[:, None, None, None])
        return F.mse_loss(flux(x, sigma, context, vector), noise - clean)

    return loss


def tiny_layout(config: dict[str, Any]) -> Layout:
    """FLUX.1's layout at the widths of `config`."""
    hidden, text = config["hidden"], config["text_width"]
    width = hidden * config["mlp_ratio"]

    def double(stream: Stream, index: int) -> Site:
        mlp = f"double_blocks.{index}.{stream}_mlp"
        return Site(f"double-{stream}-{index}", stream, index, f"{mlp}.0", f"{mlp}.1", f"{mlp}.2", 0, 0, width, False, True)

    def single(index: int) -> Site:
        block = f"single_blocks.{index}"
        paths = (f"{block}.linear1", f"{block}.mlp_act", f"{block}.linear2")
        return Site(f"single-{index}", "single", index, *paths, 3 * hidden, hidden, width, False, True)

    patch_width = 4 * CHANNELS
    return Layout(
        family="flux1", prefix="", hidden=hidden, in_channels=patch_width, out_channels=patch_width,
        context=text, vector=text, guidance=False, depth=config["depth"], depth_single=config["depth_single"],
        sites=(
            *(double(stream, index) for index in range(config["depth"]) for stream in ("img", "txt")),
            *(single(index) for index in range(config["depth_single"])),
        ),
    )  # fmt: skip


def _batch(count: int, size: int, step: int) -> Tensor:
    """Indices [size] of the batch at `step`: every pass over all of them has its own order, the same in every run."""
    epoch, place = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[place * size : (place + 1) * size]


def _train(
    model: nn.Module, loss: Callable[[int], Tensor], part: str, config: dict[str, Any], out: Path, report: Progress
) -> None:
    """AdamW, one-cycle learning rate, clipped gradients; resumes from and leaves checkpoints in `out`."""
    steps, rate = config[part]["steps"], config[part]["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    saved = out / f"{part}.training.safetensors"
    first = load_training(saved, model, optimizer, schedule) if saved.exists() else 0
    model.train()
    for step in range(first, steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(part, step + 1, steps, value.item())
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            save_training(saved, model, optimizer, schedule, step + 1)
    saved.unlink(missing_ok=True)


def _save(model: nn.Module, path: Path) -> None:
    """Weights in bfloat16, scalars in float32."""
    tensors = {key: (t.bfloat16() if t.ndim else t).contiguous() for key, t in model.state_dict().items()}
    save_file(tensors, path)
