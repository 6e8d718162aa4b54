"""The whole loop on the tiny FLUX, making the tiny FLUX, and what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import progress_bar, seed, table, typed


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("flux_poke_demo"),
    seed: Annotated[int, seed("Seed of the drawings.", most=2**32 - 1)] = 0,
) -> None:
    """Try the whole loop on a tiny FLUX that draws digits: no ComfyUI, no download, a minute on a CPU."""
    from ..demo import run_demo

    with progress_bar() as progress:
        summary = run_demo(out, seed, progress)
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


def tiny(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the weights; called again, it goes on from there.")
    ] = Path("tiny"),
    config: Annotated[Path | None, typer.Option(help="YAML like tiny/config.yaml.")] = None,
) -> None:
    """Make the tiny FLUX from scratch: autoencoder, transformer and word encoder, under 20 minutes on 2 cores."""
    from ..tiny.training import read_config, train_tiny

    with progress_bar() as update:
        train_tiny(out, read_config(config), update)


def inspect(file: Annotated[Path, typer.Argument(help="A FLUX checkpoint, dense or pruned.")]) -> None:
    """Print what a checkpoint is: family, widths, what was cut, how well it was repaired."""
    from ..pruning.checkpoint import inspect as described

    typer.echo(described(file))
