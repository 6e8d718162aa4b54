"""Drawing, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from .terminal import number, progress_bar, seed, whole


def draw(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="FLUX of the tiny kind, dense or smaller, or retrained layers; on ComfyUI, any FLUX by name."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures, and a grid of them.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given more than once.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    num_samples: Annotated[int, whole(help="Pictures of each prompt.", least=1, most=10_000)] = 1,
    steps: Annotated[int | None, whole(help="Default: the model's usual (tiny: 20).", least=1, most=10_000)] = None,
    guidance: Annotated[
        float | None,
        number(help="Distilled guidance where the model takes one, else classifier-free (1 = none).", least=0, most=100),
    ] = None,
    negative: Annotated[str, typer.Option(help="For classifier-free guidance: what to draw away from.")] = "",
    seed: Annotated[int, seed("Noise of the first picture; each takes the next.", most=2**62)] = 0,
    width: Annotated[int | None, whole(help="Pixels, by 16 (default: tiny 64, else 1024).", least=16, most=16384)] = None,
    height: Annotated[int | None, whole(help="Pixels, by 16 (default: tiny 64, else 1024).", least=16, most=16384)] = None,
    integrator: Annotated[
        Literal["euler", "heun", "dpmpp_2m", "stochastic"], typer.Option(help="stochastic: with fresh noise in every step.")
    ] = "euler",
    shift: Annotated[str | None, typer.Option(help="A number (1 = none), dynamic or flux2; default: the model's own.")] = None,
    input_image: Annotated[
        list[Path] | None, typer.Option(help="Reference picture, for FLUX.2; may be given more than once.")
    ] = None,
    poke: Annotated[
        list[str] | None,
        typer.Option(help="FILE:FACTOR: neurons of the tiny kind, turned (-1 mirrors, 0 is the others' mean, 2 boosts)."),
    ] = None,
    batch: Annotated[int, whole(help="Pictures drawn at once, of the tiny kind.", least=1, most=10_000)] = 16,
    clip: Annotated[
        list[str] | None,
        typer.Option(help="On ComfyUI: text encoder, in place of the one that is found; FLUX.1: clip_l, then t5."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="On ComfyUI: autoencoder, in place of the one that is found.")] = None,
    server: Annotated[str | None, typer.Option(help="host:port of a ComfyUI that runs: it is drawn there.")] = None,
    comfyui: Annotated[Path | None, typer.Option(help="Folder of a ComfyUI to start for it, and stop afterwards.")] = None,
) -> None:
    """Draw prompts with a model: of the tiny kind here, any other FLUX on ComfyUI."""
    from ..draw import DrawRequest, draw_tiny, open_pokes, open_tiny, shift_of, write_drawings
    from ..headless.client import ComfyClient
    from ..headless.draw import draw_there
    from ..headless.families import Setup
    from ..headless.fit import fit_server
    from ..poking.poke import poked
    from ..prompts import read_prompts

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    chosen = None if shift is None else shift_of(shift)
    request = DrawRequest(
        texts, num_samples, steps, guidance, negative, seed, width, height, integrator, chosen, tuple(input_image or ())
    )
    if server is None and comfyui is None:
        if clip or vae:
            raise UserError("--clip and --vae are for ComfyUI: leave them out, or give --server or --comfyui.")
        tiny = open_tiny(checkpoint)
        with progress_bar() as progress, poked(tiny.flux, open_pokes(checkpoint, poke or ())):
            files = write_drawings(out, draw_tiny(tiny, request, batch, progress), request, checkpoint.name)
    else:
        if poke:
            raise UserError("--poke is for models of the tiny kind; in ComfyUI, use the node Poke Neurons.")
        with progress_bar() as progress:
            progress("waiting for ComfyUI", 0, 1)
            with fit_server(server, comfyui) as address, ComfyClient(address) as client:
                setup = Setup.find(client, checkpoint.as_posix(), clip or [], vae)
                files = write_drawings(out, draw_there(client, setup, request, progress), request, setup.model)
    for file in files:
        typer.echo(f"{file}")
