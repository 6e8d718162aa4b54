"""Recording what neurons and blocks do, and the recordings themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError
from .terminal import picture, progress_bar, seed, spread, whole

if TYPE_CHECKING:
    from ..recording.drawing import Wanted
    from ..recording.manifest import Kind
    from ..recording.recording import Recording

KINDS: tuple[Kind | Literal["internals", "atlas"], ...] = ("internals", "atlas", "rows", "lens", "blocks", "trajectories")
#: What is recorded of every step, in a file of one size.
ALWAYS = {"internals", "atlas"}


@dataclass(frozen=True)
class What:
    """What to record, and how much of it."""

    what: Annotated[
        str,
        typer.Option(
            help="What to record, with commas: internals (how often neurons fire), atlas (where each is strongest), rows (what "
            "MLPs read, for plans and repair), lens (tokens after every block), blocks (all that enters and leaves them) and "
            "trajectories (velocities)."
        ),
    ] = "internals"
    steps: Annotated[int, whole(help="Euler steps per image.", least=1, most=10_000)] = 20
    batch: Annotated[int, whole(help="Images drawn at once.", least=1, most=10_000)] = 16
    keep_steps: Annotated[
        int | None, whole(help="Not for internals and atlas: steps per image to keep (default: 5 %, at least 1).", least=1)
    ] = None
    rows_per_step: Annotated[int | None, whole(help="For rows and lens: tokens per image and step (default: 64).", least=1)] = (
        None
    )
    blocks: Annotated[str | None, typer.Option(help='For blocks: which ones, such as "double 0-3, single" (default: all).')] = (
        None
    )
    storage: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="For blocks and trajectories: precision (default: bfloat16)."),
    ] = None
    max_gb: Annotated[
        float | None,
        typer.Option(
            help="Not for internals and atlas: GB that each kind may take (default: 64); then rows are thinned, others end."
        ),
    ] = None

    @property
    def kinds(self) -> set[str]:
        """Raises `UserError` where something else is named."""
        kinds = {kind.strip() for kind in self.what.split(",")}
        if not kinds <= {*KINDS}:
            raise UserError(f"--what {self.what}: expected some of {', '.join(KINDS)}, with commas in between.")
        return kinds

    def wanted(self, seed: int) -> Wanted:
        """As `record` takes it; raises `UserError` where an option does not go with what is recorded."""
        import torch

        from ..recording.drawing import Wanted
        from ..recording.manifest import Limit
        from ..recording.rows import RowChoice
        from ..recording.states import StateChoice

        kinds = self.kinds
        for option, given, applies in (
            ("--keep-steps", self.keep_steps, {*KINDS} - ALWAYS),
            ("--max-gb", self.max_gb, {*KINDS} - ALWAYS),
            ("--rows-per-step", self.rows_per_step, {"rows", "lens"}),
            ("--blocks", self.blocks, {"blocks"}),
            ("--storage", self.storage, {"blocks", "trajectories"}),
        ):
            if given is not None and not kinds & applies:
                those = ", ".join(kind for kind in KINDS if kind in applies)
                raise UserError(f"{option} is for {those}: leave it out, or add one of them to --what.")
        rows = RowChoice(self.rows_per_step or 64, self.keep_steps, seed=seed)
        states = StateChoice(self.keep_steps, seed=seed, dtype=getattr(torch, self.storage or "bfloat16"))
        choices: dict[str, Any] = {"rows": rows, "lens": rows, "blocks": states, "trajectories": states}
        return Wanted(
            "internals" in kinds,
            "atlas" in kinds,
            blocks_of_states=self.blocks or "all",
            limit=Limit(64.0 if self.max_gb is None else self.max_gb),
            **{kind: choice for kind, choice in choices.items() if kind in kinds},
        )


@spread
def record(
    checkpoint: Annotated[Path, typer.Argument(help="FLUX of the tiny kind (.safetensors), as `train` makes.")],
    recording: Annotated[Path, typer.Argument(help="Folder to record to: a new one, or a recording of this model.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    what: What,
    seed: Annotated[int, seed("Seed of the first image; each image takes the next.", most=2**62)] = 0,
    append: Annotated[
        bool, typer.Option("--append/--no-append", help="Internals: add to the counts that are there, or take their place.")
    ] = True,
) -> None:
    """Draw a file of prompts once and record what the model does on the way."""
    from ..prompts import read_prompts
    from ..recording.drawing import record as draw
    from ..recording.recording import Recording
    from ..tiny.model import TinyFlux

    wanted = what.wanted(seed)
    if not (append or wanted.internals):
        raise UserError("--no-append is for internals: leave it out, or add them to --what.")
    texts, to = read_prompts(prompts), Recording.at(recording)
    for kind, size in wanted.estimated_bytes(TinyFlux.load(checkpoint), what.steps, len(texts)).items():
        typer.echo(f"{recording}: at most {size / 1e9:.2g} GB of {kind}")
    with progress_bar() as progress:
        notes = draw(checkpoint, texts, to, wanted, seed, what.steps, what.batch, progress, append)
    for note in notes:
        typer.echo(note)
    _say(to, [kind for kind in KINDS if kind in what.kinds])


def _say(recording: Recording, kinds: Iterable[Kind | Literal["internals", "atlas"]]) -> None:
    """What the recording holds of these kinds by now."""
    from ..analysis.report import internals_title

    for kind in kinds:
        if kind == "internals":
            if recording.internals_file.is_file():
                typer.echo(f"{recording.internals_file}: {internals_title(recording.internals())}")
            continue
        if kind == "atlas":
            if recording.atlas_file.is_file():
                typer.echo(f"{recording.atlas_file}: {len(recording.atlas().images)} images")
            continue
        states = recording.states()
        size = states.bytes(kind) / 1e9
        typer.echo(f"{recording.states_folder}: {kind} of {states.image_count(kind)} images, {size:.2g} GB")


def download_prompts(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, one prompt per line.")] = Path(
        "downloaded_prompts.txt"
    ),
    contains: Annotated[str, typer.Option(help="Only prompts with this in them, such as '\"'.")] = "",
    limit: Annotated[int, whole(help="At most so many; 0 = all.", least=0, most=2**62)] = 10_000,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this one (default: both).")] = None,
) -> None:
    """Fetch prompts that people gave to image models from two public datasets."""
    from ..download_prompts import DATASETS, download_in_terminal

    with progress_bar() as progress:
        download_in_terminal(out, dataset or [*DATASETS], contains, limit, progress=progress)


def show(
    recording: Annotated[Path, typer.Argument(help="Folder of a recording, or an internals file.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    picture: Annotated[Path | None, picture("Also draw it (.png, .pdf, .svg).")] = None,
) -> None:
    """Print what was recorded of every MLP."""
    from dataclasses import asdict

    from ..analysis.report import internals_figure, internals_summaries, internals_table
    from ..files import write_picture
    from ..recording.recording import Recording

    internals = Recording.open(recording).internals()
    if as_json:
        about = {key: getattr(internals, key) for key in ("family", "runs", "steps", "created", "updated")}
        typer.echo(json.dumps({**about, "sites": [asdict(site) for site in internals_summaries(internals)]}, indent=2))
    else:
        typer.echo(internals_table(internals))
    if picture:
        write_picture(picture, internals_figure(internals))


def merge(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings of one model: folders, or internals files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder or .safetensors file to write: new, or one of those.")],
) -> None:
    """Add up the internals of recordings of one model."""
    from ..analysis.report import internals_title
    from ..recording.queued import merge_files
    from ..recording.recording import Recording

    files = []
    for recording in map(Recording.open, recordings):
        recording.require_internals()
        files.append(recording.internals_file)
    file = out if out.suffix == ".safetensors" else Recording.at(out).internals_file
    typer.echo(f"{file}: {internals_title(merge_files(file, files))}")
