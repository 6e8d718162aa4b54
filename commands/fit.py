"""The whole loop in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .plans import Budget
from .terminal import Device, progress_bar, seed, spread, typed, whole


@spread
def fit(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX: of the tiny kind, or any on ComfyUI.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Smaller checkpoint to write.")],
    budget: Budget,
    recording: Annotated[
        Path | None, typer.Option(help="Folder to record to, and go on in (default: beside OUT, CHECKPOINT_recording).")
    ] = None,
    count: Annotated[
        int | None,
        whole(help="Images to record (default: 60, or one for each prompt); above that, prompts again.", least=2),
    ] = None,
    steps: Annotated[int, whole(help="Euler steps per image.", least=2, most=10_000)] = 20,
    seed: Annotated[int, seed("Noise of the first image; each image takes the next.", most=2**62)] = 0,
    device: Device = "cpu",
    server: Annotated[str | None, typer.Option(help="host:port of a ComfyUI that runs: the loop is done there.")] = None,
    comfyui: Annotated[Path | None, typer.Option(help="Folder of a ComfyUI to start for it, and stop afterwards.")] = None,
) -> None:
    """Make a FLUX of the size you say: record it, plan, cut, repair, save and compare, all in one.

    What is recorded is kept: another size costs planning alone, and after Ctrl-C the same command goes on. On ComfyUI,
    CHECKPOINT and OUT are names in its models/diffusion_models (or "tiny"), and --recording one in its output/flux_poke.
    """
    from ..fit import Fit
    from ..headless.client import ComfyClient
    from ..headless.fit import FitRequest, fit_server, fit_there
    from ..prompts import read_prompts
    from ..recording.recording import Recording

    texts, what = read_prompts(prompts), budget.by_budget()
    there = server is not None or comfyui is not None
    if there and device != "cpu":
        raise UserError("--device says where the terminal computes, and ComfyUI chooses for itself: leave it out.")
    try:
        if there:
            name = recording.as_posix() if recording else None
            request = FitRequest(checkpoint.as_posix(), texts, what, out.as_posix(), name, count, steps, seed)
            with progress_bar() as progress:
                progress("waiting for ComfyUI", 0, 1)
                with fit_server(server, comfyui) as address, ComfyClient(address) as client:
                    left = fit_there(client, request, progress, typer.echo)
            typer.echo(f"{left.table}\n{left.compared}\n{left.file} in ComfyUI's models/diffusion_models: {what.asked}")
            return
        recorded = Recording.at(recording or out.parent / f"{checkpoint.stem}_recording")
        fit = Fit(checkpoint, texts, what, out, recorded, count, steps, seed, device)
        typer.echo(f"{fit.takes}.")
        with progress_bar() as progress:
            fitted = fit.run(progress)
    except KeyboardInterrupt as error:
        raise UserError("Stopped. Images that were recorded are kept: the same command goes on from there.") from error
    for line in (*fitted.notes, fitted.plan.table(), typed("inspect", out), fitted):
        typer.echo(f"{line}")
