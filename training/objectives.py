"""What a training makes smaller: the autoencoder's error, and the error of the velocity.

Everything random is drawn on the CPU for the whole batch, in every process alike, of which each then takes its part: but for
rounding, figures depend neither on the device nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..flux.autoencoder import Autoencoder
from ..flux.model import Flux
from ..tiny.words import COPY_TEMPLATES, NEGATIVE_TEMPLATES, WordEncoder, pad_text
from .config import AutoencoderTraining, Transformer
from .data import Examples

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[nn.Module, int], Tensor]
#: What asks for a reference picture again, and for its negative.
REFERENCE_PROMPTS = (COPY_TEMPLATES, NEGATIVE_TEMPLATES)


def batch_at(count: int, size: int, step: int) -> Tensor:
    """Indices [size] of the batch at `step`: every pass over all of them has its own order, the same in every run."""
    epoch, number = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[number * size : (number + 1) * size]


class Reconstruction(nn.Module):
    """Squared error of decode(encode(image) + noise), with latents held near mean 0 and variance 1 per channel."""

    def __init__(self, autoencoder: Autoencoder, options: AutoencoderTraining):
        super().__init__()
        self.autoencoder, self.options = autoencoder, options

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        latents = self.autoencoder.encode(images)
        noisy = latents + self.options.latent_noise * noise
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        moments = (mean**2).mean() + ((variance + 1e-6).sqrt() - 1).pow(2).mean()
        return F.mse_loss(self.autoencoder.raw_decode(noisy), images) + self.options.moment_weight * moments


def reconstruction_loss(
    images: Tensor,
    latent_shape: tuple[int, int, int],
    options: AutoencoderTraining,
    accelerator: Accelerator,
    negatives: bool = False,
) -> Loss:
    """The loss of a `Reconstruction` at a step; with `negatives`, every other image of a batch is in negative."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = batch_at(len(images), options.batch, step)
        batch = images[chosen]
        if negatives:
            batch = torch.cat((batch[::2], 1 - batch[1::2]))
        noise = torch.randn(len(chosen), *latent_shape)
        return model(batch[mine].to(accelerator.device), noise[mine].to(accelerator.device))

    return loss


@dataclass(frozen=True)
class Latents:
    """What the transformer learns to draw: latents [pictures, channels, height, width], and word ids of what each is called.

    `ids` [captions, words] are those of all captions; picture n may be called any of the first `counts[n]` of `captions[n]`.
    `negatives` are latents of the pictures in negative, where a picture is also drawn from a reference: the reference again, or
    its negative, as one of `turns` [2, prompts, words] says.
    """

    clean: Tensor
    ids: Tensor
    captions: Tensor
    counts: Tensor
    negatives: Tensor | None = None
    turns: Tensor | None = None

    @classmethod
    def of(cls, examples: Examples, clean: Tensor, words: WordEncoder, negatives: Tensor | None = None) -> Latents:
        """Latents `clean` of the examples' pictures; `negatives` where there are to be references."""
        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(caption, len(numbers)) for caption in some] for some in examples.captions]
        counts = torch.tensor([len(row) for row in rows])
        most = int(counts.max())
        captions = torch.tensor([row + [0] * (most - len(row)) for row in rows])
        turns = torch.stack([words.ids(some) for some in REFERENCE_PROMPTS]) if negatives is not None else None
        return cls(clean, words.ids(list(numbers)), captions, counts, negatives, turns)

    def called(self, chosen: Tensor) -> Tensor:
        """Word ids [batch, words] of one caption for each of the chosen pictures."""
        if bool((self.counts == self.counts[0]).all()):
            which = torch.randint(int(self.counts[0]), (len(chosen),))
        else:
            which = (torch.rand(len(chosen)) * self.counts[chosen]).long()
        return self.ids[self.captions[chosen, which]]


@dataclass(frozen=True)
class Batch:
    """Latents to be drawn [batch, channels, height, width], noise and its level [batch], the word ids of what they are called
    [batch, words], and latents of reference pictures beside each, if any. `padded`: the text is as long as a host makes it."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    ids: Tensor
    references: tuple[Tensor, ...] = ()
    padded: bool = False


class Velocity(nn.Module):
    """Squared error of the velocity that `flux` predicts from the text of `words`."""

    def __init__(self, flux: Flux, words: WordEncoder):
        super().__init__()
        self.flux, self.words = flux, words

    def forward(self, batch: Batch) -> Tensor:
        x = torch.lerp(batch.clean, batch.noise, batch.sigma[:, None, None, None])
        context, vector = self.words.encode(batch.ids)
        context = pad_text(context) if batch.padded else context
        found = self.flux(x, batch.sigma, context, vector, references=batch.references)
        return F.mse_loss(found.float(), batch.noise - batch.clean)


def velocity_loss(latents: Latents, options: Transformer, accelerator: Accelerator) -> Loss:
    """The loss of a `Velocity` at a step; without a caption where guidance learns what none draws."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)

    def loss(model: nn.Module, step: int) -> Tensor:
        whole = draw_batch(latents, options, step)
        clean, noise, sigma, ids, *references = (
            part[mine].to(accelerator.device) for part in (whole.clean, whole.noise, whole.sigma, whole.ids, *whole.references)
        )
        return model(Batch(clean, noise, sigma, ids, tuple(references), whole.padded))

    return loss


def draw_batch(latents: Latents, options: Transformer, step: int) -> Batch:
    """The batch of a step, from torch's random state."""
    chosen = batch_at(len(latents.clean), options.batch, step)
    padded = bool(options.padded_every) and (step + 1) % options.padded_every == 0
    if padded:
        chosen = chosen[: options.padded_batch]
    if latents.turns is not None and (step + 1) % options.reference_every == 0:
        return _beside_reference(latents, latents.turns, options, chosen, padded)
    clean = latents.clean[chosen]
    noise = torch.randn(len(chosen), *clean.shape[1:])
    sigma = draw_times(options, len(chosen))
    ids = latents.called(chosen)
    if options.guidance_dropout:
        ids = ids * (torch.rand(len(chosen), 1) >= options.guidance_dropout)
    return Batch(clean, noise, sigma, ids, padded=padded)


def _beside_reference(latents: Latents, turns: Tensor, options: Transformer, chosen: Tensor, padded: bool) -> Batch:
    """The chosen pictures beside themselves, or beside their negatives.

    The prompt says which of the two, and not what it shows: that is in the reference alone, in negative half of the time.
    """
    assert latents.negatives is not None
    both = torch.stack((latents.clean[chosen], latents.negatives[chosen]))
    given, turned = torch.randint(2, (2, len(chosen)))
    each = torch.arange(len(chosen))
    reference, clean = both[given, each], both[given ^ turned, each]
    noise, sigma = torch.randn_like(clean), draw_times(options, len(chosen))
    ids = turns[turned, torch.randint(turns.shape[1], (len(chosen),))]
    return Batch(clean, noise, sigma, ids, (reference,), padded)


def draw_times(options: Transformer, count: int) -> Tensor:
    """Noise levels [count] to learn at: logit-normal (Esser et al. 2024, arXiv 2403.03206), uniform, or uniform and then
    shifted towards noise as a schedule's static shift does."""
    if options.times == "logit-normal":
        return torch.sigmoid(torch.randn(count) + options.noise_mean)
    times = torch.rand(count)
    return options.shift * times / (1 + (options.shift - 1) * times) if options.times == "shifted" else times
