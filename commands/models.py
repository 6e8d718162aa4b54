"""The whole loop on the tiny FLUX, making the tiny FLUX, and what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .terminal import progress_bar, seed, table, typed

TinyFamily = Literal["flux1", "flux2"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("flux_poke_demo"),
    seed: Annotated[int, seed("Seed of the drawings.", most=2**32 - 1)] = 0,
    family: Annotated[TinyFamily, typer.Option(help="Which of the two tiny FLUXes.")] = "flux1",
) -> None:
    """Try the whole loop on a tiny FLUX that draws digits: no ComfyUI, no download, a minute on a CPU."""
    from ..demo import run_demo

    with progress_bar() as progress:
        summary = run_demo(out, seed, progress, family)
    columns = ("variant", "weights", "MB", "velocity error", "latent error", "PSNR", "read right")
    table(
        columns,
        [
            [
                v["name"], f"{v['parameters'] / 1e6:.2f} M", v["bytes"] / 1e6,
                v["velocity_error"], v["latent_error"], v["psnr"], f"{v['digit_accuracy']:.1%}",
            ]
            for v in summary["variants"]
        ],
    )  # fmt: skip
    typer.echo(
        f"{summary['seconds']:.0f} s. Look at variants.png (what each model draws), internals.png (what every neuron did) and "
        f"budget.png (memory against error) in {out}.\n"
        f"Next: {typed('internals', 'show', out)}\n"
        f"      {typed('inspect', out / 'budget-obs-affine.safetensors')}"
    )


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that ships: tiny, wide, ...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model; called again, it goes on from there.")],
) -> None:
    """Make a small FLUX from scratch: autoencoder, transformer and word encoder. `tiny` takes under 20 minutes on 2 cores."""
    from ..training.config import read_config
    from ..training.trainer import train as make

    with progress_bar() as update:
        make(read_config(config), out, update)
    typer.echo(f"{out} holds flux.safetensors, words.safetensors and autoencoder.safetensors.")
    typer.echo(f"Next: {typed('inspect', out / 'flux.safetensors')}")


def inspect(file: Annotated[Path, typer.Argument(help="A FLUX checkpoint, dense or pruned, in any layout.")]) -> None:
    """Print what a checkpoint is: family, widths, what was cut, how well it was repaired."""
    from ..convert.convert import describe

    typer.echo(describe(file))
