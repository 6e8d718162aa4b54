"""What every block predicts, in folders of pictures."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError
from ..progress import part
from .terminal import number, progress_bar, seed, whole

if TYPE_CHECKING:
    from ..headless.capture import CaptureRequest

#: `analysis.taps.View`, without what that loads.
View = Literal["x0", "euler"]
MODELS = "flux-schnell, flux-dev, flux-dev-krea, tiny, a file's name there, or a file of the tiny kind here."


def capture(
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given more than once.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    model: Annotated[str, typer.Option(help=MODELS)] = "flux-schnell",
    width: Annotated[int | None, whole(least=16, most=16384, help="Pixels, by 16 (default: 1024; tiny: 64).")] = None,
    height: Annotated[int | None, whole(least=16, most=16384, help="Pixels, by 16 (default: 1024; tiny: 64).")] = None,
    seed: Annotated[int | None, seed("Of the first image, the next take the next; default: random.")] = None,
    num_steps: Annotated[
        int | None, whole(least=1, most=10_000, help="Default: 4 for schnell and klein, 20 for tiny, 50 for FLUX.1-dev.")
    ] = None,
    guidance: Annotated[float, number(least=0, most=100, help="Distilled guidance, where the model takes one.")] = 2.5,
    output_dir: Annotated[Path, typer.Option(help="One folder per image goes in here.")] = Path("output"),
    decode_intermediates: Annotated[bool, typer.Option(help="Write previews as pictures, or their latents.")] = True,
    add_sampling_metadata: Annotated[bool, typer.Option(help="Write how it was drawn into EXIF and PNG text.")] = True,
    blocks: Annotated[str, typer.Option(help='"all", or a list such as "double, single 0, single 30-37".')] = "all",
    steps_to_tap: Annotated[str, typer.Option(help='"all", "every 5", or a list such as "0, 4, 10-12".')] = "all",
    lens: Annotated[str, typer.Option(help="Tuned lens: a file here, or its name in ComfyUI's output/flux_poke.")] = "",
    view: Annotated[View, typer.Option(help="x0: what a block takes the image for; euler: one step by it.")] = "x0",
    raw: Annotated[bool, typer.Option("--raw", help="Keep the blocks' tokens and context too, for `decode`.")] = False,
    clip: Annotated[list[str] | None, typer.Option(help="On ComfyUI: text encoder; FLUX.1: clip_l, then t5.")] = None,
    vae: Annotated[str | None, typer.Option(help="On ComfyUI: autoencoder.")] = None,
    server: Annotated[str | None, typer.Option(help="host:port of a ComfyUI that runs.")] = None,
    comfyui: Annotated[Path | None, typer.Option(help="Folder of a ComfyUI to start, and stop afterwards.")] = None,
    offload: Annotated[bool, typer.Option(help="Start it in its low-memory mode.")] = False,
    multi_gpu: Annotated[bool, typer.Option(help="Start one for each GPU and spread the prompts over them.")] = False,
) -> None:
    """Draw prompts with what every block predicted at every step: of the tiny kind here, any other FLUX on ComfyUI."""
    from ..analysis.capturing import capture_tiny
    from ..analysis.lens import Lens
    from ..headless.capture import CaptureRequest, capture_everywhere, capture_servers
    from ..headless.workflow import TINY
    from ..prompts import read_prompts
    from ..tiny.model import TinyFlux

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise UserError("There is nothing to draw: give --prompt or --prompts.")
    requests = [
        CaptureRequest(
            text, model, width, height, None if seed is None else seed + number, num_steps, guidance, decode_intermediates,
            add_sampling_metadata, blocks, steps_to_tap, lens, view, raw, tuple(clip or ()), vae,
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip
    if server is not None or comfyui is not None or not (model == TINY or Path(model).is_file()):
        with progress_bar() as progress:
            progress("waiting for ComfyUI", 0, 1)
            with capture_servers(server, comfyui, offload, multi_gpu) as servers:
                _announce(requests)
                found = capture_everywhere(servers, requests, output_dir, progress)
        for captured in found:
            typer.echo(f"{captured.generation_id}  {captured.folder}  {captured.request.prompt}")
        return
    if clip or vae or offload or multi_gpu:
        raise UserError("--clip, --vae, --offload and --multi-gpu are for ComfyUI: leave them out, or give --comfyui.")
    tiny, tuned = TinyFlux.load(None if model == TINY else Path(model)), Lens.load(Path(lens)) if lens else None
    _announce(requests)
    with progress_bar() as progress:
        for place, one in enumerate(requests):
            drawn = secrets.randbits(32) if one.seed is None else one.seed
            folder = capture_tiny(
                tiny, one.prompt, model, output_dir, one.generation_id, drawn, num_steps, (width, height), guidance, blocks,
                steps_to_tap, tuned, view, raw, decode_intermediates, add_sampling_metadata,
                part(progress, place, len(requests)),
            )  # fmt: skip
            typer.echo(f"{one.generation_id}  {folder}  {one.prompt}")


def _announce(requests: Sequence[CaptureRequest]) -> None:
    for one in requests:
        typer.echo(f"{one.generation_id}: {one.prompt}")


def decode(
    folder: Annotated[Path, typer.Argument(help="A generation's folder, as `capture --raw` writes it.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The FLUX that it was drawn with (default: what the folder names, of the tiny kind).")
    ] = None,
    lens: Annotated[Path | None, typer.Option(help="Tuned lens to read the tokens through.")] = None,
    view: Annotated[View, typer.Option(help="x0: what a block takes the image for; euler: one step by it.")] = "x0",
    vae: Annotated[str | None, typer.Option(help="On ComfyUI: the autoencoder's name in models/vae.")] = None,
    server: Annotated[str | None, typer.Option(help="host:port of a ComfyUI that runs, for its autoencoder.")] = None,
    comfyui: Annotated[Path | None, typer.Option(help="Folder of a ComfyUI to start for it, and stop afterwards.")] = None,
) -> None:
    """Make the pictures of raw block states again: in another view, or through a lens."""
    from ..analysis.capturing import decode_raw, read_generation
    from ..analysis.lens import Lens
    from ..headless.client import ComfyClient
    from ..headless.decoding import latent_format, server_decoder
    from ..headless.fit import fit_server
    from ..headless.workflow import TINY
    from ..tiny.model import SHIPPED, TinyFlux

    named = read_generation(folder).model
    path = checkpoint or (SHIPPED["flux1"] / "flux.safetensors" if named == TINY else Path(named))
    if not path.is_file():
        raise UserError(f"{folder} was drawn with {named}, which is not a file here: name it with --checkpoint.")
    tuned = None if lens is None else Lens.load(lens)
    with progress_bar() as progress:
        if server is None and comfyui is None:
            count = decode_raw(folder, path, TinyFlux.load(path).autoencoder.decode, lens=tuned, view=view, progress=progress)
        elif vae is None:
            raise UserError("--vae names the autoencoder in ComfyUI's models/vae that is to decode: give it.")
        else:
            with fit_server(server, comfyui) as address, ComfyClient(address) as client:
                there = server_decoder(client, vae)
                count = decode_raw(folder, path, there, latent_format(path), tuned, view, progress)
    typer.echo(f"{folder}: {count} predictions decoded")
