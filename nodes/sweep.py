"""Sweep: the same noise drawn with neurons or blocks poked in one way after the other, on one labelled picture."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..analysis.metrics import Comparison, compare, comparison_table
from ..analysis.sheets import labelled_grid
from ..poking.neurons import Neurons
from ..poking.poke import BlockPoke, Poke
from ..poking.sweep import factors_of, sweep
from ..progress import part as part_of
from . import host, inputs
from .computing import NodeProgress
from .models import flux_layout
from .poking import NeuronsType, poked_clone


class Sweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        factors = "Numbers with commas, a picture for each: 0 puts the mean of the others or skips a block, 1 changes nothing."
        blocks = 'Where no neurons are connected: "all", or a list such as "double 0, single 30-37", each by itself.'
        part = "Of blocks: what the attention adds, what the MLP adds, or both."
        return inputs.schema(
            cls,
            "Sweep (Flux Poke)",
            "Draws the same noise again and again, with neurons at one factor after the other or with one block after the "
            "other poked, and compares each with the picture of the model as it is.",
            [
                io.Model.Input("model", tooltip="The FLUX to poke: FLUX.1, FLUX.2 or Chroma. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it is used with a cfg above 1 alone."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size to draw."),
                io.Vae.Input("vae", tooltip="The model's own autoencoder."),
                inputs.random_seed("Of the noise, the same for all pictures."),
                inputs.whole("steps", 20, 1, 10000, "As in KSampler."),
                inputs.number("cfg", 1.0, 0.0, 100.0, 0.1, "As in KSampler; FLUX.1-dev and klein take 1."),
                inputs.choice("sampler_name", comfy.samplers.KSampler.SAMPLERS, "As in KSampler.", "euler"),
                inputs.choice("scheduler", comfy.samplers.KSampler.SCHEDULERS, "As in KSampler.", "simple"),
                inputs.text("factors", "0", factors),
                inputs.text("blocks", "all", blocks),
                inputs.choice("part", ["both", "attention", "mlp"], part),
                NeuronsType.Input("neurons", optional=True, tooltip="From Find Neurons or Load Neurons; blocks otherwise."),
            ],
            [
                io.Image.Output(display_name="grid"),
                io.Image.Output(display_name="images", tooltip="All pictures; the first is of the model as it is."),
                io.String.Output(display_name="text"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, vae, steps, cfg, sampler_name, scheduler, factors, blocks, part,
        seed=0, neurons: Neurons | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        pokes = sweep(flux_layout(model), factors_of(factors), neurons, blocks, part)
        asked: list[tuple[str, Poke | BlockPoke | None]] = [("as it is", None), *pokes]
        progress = NodeProgress(cls.hidden.unique_id)
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        images: list[Tensor] = []
        for done, (label, poke) in enumerate(asked):
            within = part_of(progress, done, len(asked))

            def step(number, x0, x, total, within=within, label=label) -> None:
                within(label, number + 1, total)

            within(label, 0, 1)
            drawn = comfy.sample.sample(
                model if poke is None else poked_clone(model, poke), noise, steps, cfg, sampler_name, scheduler, positive,
                negative, latent, callback=step, disable_pbar=True, seed=seed,
            )  # fmt: skip
            images.append(host.batch_of(vae.decode(drawn)))
        progress("done", 1, 1)
        rows = [compare(image, images[0], label) for (label, _), image in zip(asked, images, strict=True)]
        cells = [
            (
                row.name,
                numbers(row) if number else "",
                host.to_pictures(image.movedim(1, -1))[0],
            )
            for number, (row, image) in enumerate(zip(rows, images, strict=True))
        ]
        grid = host.to_images([labelled_grid(cells, title_of(neurons, part))])
        table = comparison_table(rows[1:])
        everything = [picture for image in images for picture in image.movedim(1, -1)]
        changed = sorted((row for row in rows[1:] if row.relative_mse), key=lambda row: -row.relative_mse)
        said = "Changes most: " + ", ".join(f"{row.name} ({row.psnr:.1f} dB)" for row in changed[:3])
        shown = {**ui.PreviewImage(grid, cls=cls).as_dict(), **host.said(cls, said if changed else "Nothing changed.")}
        return io.NodeOutput(grid, torch.stack(everything), table, ui=shown)


def title_of(neurons: Neurons | None, part: str) -> str:
    if neurons is None:
        return "One block at a time, poked" if part == "both" else f"The {part} of one block at a time, poked"
    return f"{neurons.count:,} neurons ({neurons.compared})"


def numbers(row: Comparison) -> str:
    return f"PSNR {row.psnr:.1f} dB, SSIM {row.ssim:.3f}" if row.relative_mse else "the same"
