"""A FLUX from one layout into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .terminal import progress_bar, table


def convert(
    file: Annotated[Path, typer.Argument(metavar="IN", help="A FLUX: .safetensors, .gguf, or a folder as diffusers has it.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="NAME.safetensors: ComfyUI's layout. NAME.gguf: GGUF. A folder: diffusers'."),
    ],
    orbax: Annotated[bool, typer.Option("--orbax", help="A folder as orbax has it, not as diffusers.")] = False,
    type: Annotated[
        Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "stored"], typer.Option(help="What weights become in GGUF.")
    ] = "Q8_0",
) -> None:
    """Convert a FLUX between ComfyUI's layout, diffusers' folders, GGUF and orbax; docs/convert.md tells what fits where."""
    from ..convert import convert as converting

    with progress_bar() as progress:
        done = converting.convert(file, out, "orbax" if orbax else "diffusers", type, progress)
    table(("", "tensors", "which"), [list(row) for row in done.rows])
    typer.echo(converting.describe(out))
