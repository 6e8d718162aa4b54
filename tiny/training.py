"""Makes the tiny FLUX from scratch: first its autoencoder, then transformer and word encoder together.

    train_tiny(Path("out"))          # flux.safetensors, words.safetensors, autoencoder.safetensors

Each part saves its state every `SAVE_STEPS` steps, every `SAVE_SECONDS` seconds and on Ctrl-C. Called again on the same
folder, it goes on from there; with more steps than before, along the learning rates of the longer training.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..files import write_safetensors
from ..flux.autoencoder import Autoencoder
from ..flux.checkpoint import open_safetensors
from ..flux.layout import Layout
from ..flux.model import Flux
from ..flux.resume import load_training, save_training
from ..progress import Progress, part, silent
from .data import digit_images
from .model import FOLDER
from .words import WordEncoder, digit_prompts, word_ids

SAVE_STEPS, SAVE_SECONDS = 250, 30.0

#: The configuration's sections and keys, with the type of each; numbers are above 0.
_KEYS: dict[str, dict[str, type]] = {
    "autoencoder": {"steps": int, "batch": int, "learning_rate": float, "latent_noise": float, "moment_weight": float},
    "flux": {
        "hidden": int, "depth": int, "depth_single": int, "mlp_ratio": int, "text_width": int, "steps": int, "batch": int,
        "learning_rate": float,
    },
}  # fmt: skip


def train_tiny(out: Path, config: dict[str, Any] | None = None, progress: Progress = silent) -> None:
    """Trains what is not finished in `out`; finished parts are kept as they are.

    Raises `UserError` where the configuration cannot be used, and on Ctrl-C once the state is saved.
    """
    config = read_config() if config is None else config
    images, digits = digit_images()
    check_config(config, "The configuration", len(images))
    out.mkdir(parents=True, exist_ok=True)
    steps = {name: config[name]["steps"] for name in _KEYS}

    encoder_file = out / "autoencoder.safetensors"
    if not encoder_file.exists():
        torch.manual_seed(config["seed"])
        autoencoder = Autoencoder()
        loss = autoencoder_loss(autoencoder, images, config["autoencoder"])
        within = part(progress, 0, sum(steps.values()), steps["autoencoder"])
        _train(autoencoder, loss, "autoencoder", config["autoencoder"], out, within)
        _save(autoencoder, encoder_file)
    autoencoder = _load_autoencoder(encoder_file)

    if not (out / "flux.safetensors").exists():
        torch.manual_seed(config["seed"])
        flux, words = Flux(tiny_layout(config["flux"])), WordEncoder(config["flux"]["text_width"])
        nn.init.zeros_(flux.final_layer.linear.weight)
        with torch.no_grad():
            latents = torch.cat([autoencoder.encode(some) for some in images.split(128)])
        both = nn.ModuleDict({"flux": flux, "words": words})
        within = part(progress, steps["autoencoder"], sum(steps.values()), steps["flux"])
        _train(both, flux_loss(flux, words, latents, digits, config["flux"]), "flux", config["flux"], out, within)
        _save(words, out / "words.safetensors")
        _save(flux, out / "flux.safetensors")


def read_config(path: Path | None = None) -> dict[str, Any]:
    """The training's configuration from a YAML file (default: the one that made the shipped weights), checked."""
    path = path or FOLDER / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({error}).") from error
    check_config(config, str(path))
    return config


def check_config(config: Any, source: str, images: int | None = None) -> None:
    """Raises `UserError`, calling the configuration `source`, where it lacks a key, has an unknown one, or a value that cannot
    be used; `images` is how many there are to train on, where that is known."""
    advice = "tiny/config.yaml shows all of them."
    for name, keys in (("", ["seed", *_KEYS]), *((name, [*keys]) for name, keys in _KEYS.items())):
        section, where = (config[name], f"{source}, section '{name}',") if name else (config, source)
        if not isinstance(section, Mapping):
            raise UserError(f"{where} is expected to hold {', '.join(keys)}; found {section!r:.60}. {advice}")
        missing, unknown = [key for key in keys if key not in section], [key for key in section if key not in keys]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}: {advice}")
        if unknown:
            raise UserError(f"{where} has the unknown {', '.join(map(str, unknown))}; expected {', '.join(keys)}.")
    seed = config["seed"]
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"{source}: seed must be a whole number from 0 to 2^63 - 1; found {seed!r}.")
    for name, kinds in _KEYS.items():
        for key, kind in kinds.items():
            value = config[name][key]
            if (type(value) is not int and (kind is int or type(value) is not float)) or not 0 < value < 1e9:
                number = "whole number" if kind is int else "number such as 1.0e-3"
                raise UserError(f"{source}: {key} in section '{name}' must be a {number} above 0; found {value!r}.")
        if images is not None and config[name]["batch"] > images:
            raise UserError(
                f"{source}: batch in section '{name}' is {config[name]['batch']:,}, but there are {images:,} images."
            )
    if config["flux"]["hidden"] % 128:
        raise UserError(
            f"{source}: hidden in section 'flux' must be a multiple of 128, the width of an attention head; found "
            f"{config['flux']['hidden']}."
        )


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


def tiny_layout(config: Mapping[str, Any]) -> Layout:
    """FLUX.1's layout at the widths of `config`."""
    text = config["text_width"]
    sizes = {"context": text, "vector": text, "ratio": config["mlp_ratio"]}
    return Layout.of("flux1", config["hidden"], config["depth"], config["depth_single"], **sizes)


def _batch(count: int, size: int, step: int) -> Tensor:
    """Indices [size] of the batch at `step`: every pass over all of them has its own order, the same in every run."""
    epoch, number = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[number * size : (number + 1) * size]


def _train(
    model: nn.Module, loss: Callable[[int], Tensor], name: str, config: Mapping[str, Any], out: Path, progress: Progress
) -> None:
    """AdamW, one-cycle learning rate, clipped gradients; resumes from and leaves its state in `out`."""
    steps, rate = config["steps"], config["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    saved = out / f"{name}.training.safetensors"
    first = load_training(saved, model, optimizer, steps) if saved.exists() else 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule is brought to where it was, which no optimizer step goes with
        for _ in range(first):
            schedule.step()
    model.train()
    kept = time.monotonic()
    with _interrupts_noted() as interrupted:
        for step in range(first, steps):
            optimizer.zero_grad(set_to_none=True)
            value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done, stop = step + 1, interrupted.is_set()
            if done < steps and (stop or done % SAVE_STEPS == 0 or time.monotonic() - kept >= SAVE_SECONDS):
                save_training(saved, model, optimizer, done)
                kept = time.monotonic()
                if stop:
                    raise UserError(
                        f"Stopped after {done:,} of {steps:,} steps of {name}, which are saved in {out}: the same command goes "
                        "on from there."
                    )
            progress(f"{name}: loss {value.item():.4f}", done, steps)
    saved.unlink(missing_ok=True)


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Set at the first Ctrl-C, in place of an exception in the middle of a step; the second one interrupts as usual."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no Ctrl-C arrives
        yield noted
        return

    def note(*_: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _load_autoencoder(path: Path) -> Autoencoder:
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    try:
        return Autoencoder.load(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} is not an autoencoder of the tiny FLUX: remove it, or choose another folder.") from error


def _save(model: nn.Module, path: Path) -> None:
    """Weights in bfloat16, scalars in float32."""
    write_safetensors(path, {key: t.bfloat16() if t.ndim else t for key, t in model.state_dict().items()}, {})
