"""The neurons of a concept: found, looked at, joined and subtracted, and made into a plan or a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError
from .terminal import number, picture, progress_bar, seed, typed, whole

if TYPE_CHECKING:
    from ..poking.comparing import Way

Out = Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).")]
File = Annotated[Path, typer.Argument(help="A file of neurons, from `neurons find` or Find Neurons.")]
Files = Annotated[list[Path], typer.Argument(help="Files of neurons of one model.")]
Checkpoint = Annotated[Path, typer.Argument(help="The dense FLUX that they were found in (.safetensors).")]


def find(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX; with prompts, one of the tiny kind (.safetensors).")],
    with_it: Annotated[
        list[Path], typer.Option("--with", help="Prompts with the concept (.txt), or a recording; may be given more than once.")
    ],
    without: Annotated[
        list[Path], typer.Option("--without", help="Prompts without it (.txt), or a recording; may be given more than once.")
    ],
    out: Out,
    percent: Annotated[float, number(help="At most so many of all neurons, in percent.", least=0.0001, most=100)] = 2.0,
    streams: Annotated[Literal["all", "img", "txt", "single"], typer.Option(help="In which MLPs.")] = "all",
    spare: Annotated[
        float | None,
        number(
            help="How much more a change of others counts than one of the concept. Default: with prompts, what erases the "
            "concept at the least cost, measured on velocities; with recordings 10.",
            least=0,
            most=1000,
        ),
    ] = None,
    learned: Annotated[
        bool,
        typer.Option(
            "--learn",
            help="Of prompts: learn by gradients which neurons to turn, and how far each of them: erases what does not go "
            "otherwise. Takes minutes.",
        ),
    ] = False,
    images: Annotated[int | None, whole(help="Of prompts: pictures of each (4).", least=1, most=10_000)] = None,
    steps: Annotated[int | None, whole(help="Of prompts: Euler steps per picture (20).", least=2, most=10_000)] = None,
    seed: Annotated[int, seed("Of prompts: noise of the first picture; each takes the next.", most=2**62)] = 0,
    sigma_from: Annotated[float, number(help="Of prompts: only noise levels from here.", least=0, most=1)] = 0.0,
    sigma_to: Annotated[float, number(help="Of prompts: only noise levels up to here.", least=0, most=1)] = 1.0,
    picture: Annotated[Path | None, picture("Also draw them (.png, .pdf, .svg).")] = None,
) -> None:
    """Find the neurons of a concept: pictures with it against pictures without."""
    from ..files import check_replaces, write_picture
    from ..flux.layout import select_sites
    from ..poking.comparing import Drawings, find_in_prompts
    from ..poking.find import SPARE, Search
    from ..poking.find import find as search
    from ..poking.neurons import FORMAT
    from ..poking.picture import neurons_figure
    from ..poking.poke import Poke
    from ..poking.tune import HELD_OUT, Exam
    from ..prompts import read_prompts
    from ..pruning.dense import Dense
    from ..recording.recording import Recording
    from ..tiny.model import TinyFlux

    check_replaces(out, FORMAT)
    dense = Dense.open(checkpoint)
    texts = [path.suffix.lower() == ".txt" for path in (*with_it, *without)]
    if any(texts) and not all(texts):
        raise UserError("--with and --without are both prompts (.txt), or both recordings: one of each cannot be compared.")
    compared = f"{' and '.join(path.stem for path in with_it)} against {' and '.join(path.stem for path in without)}"
    sites = None if streams == "all" else select_sites(dense.layout, streams=(streams,))
    what = Search(share=percent / 100, sites=sites, spare=SPARE if spare is None else spare, seed=seed)
    sigmas, said = (sigma_from, sigma_to), ""
    if all(texts):
        if learned and spare is not None:
            raise UserError("--learn weighs the others itself: leave out --spare.")
        given = {name: value for name, value in (("images", images), ("steps", steps)) if value is not None}
        drawn, tiny = Drawings(sigmas=sigmas, **given), TinyFlux.load(checkpoint)
        asked, asked_else = ([text for path in paths for text in read_prompts(path)] for paths in (with_it, without))
        way: Way = "learn" if learned else "tune" if spare is None else "search"
        with progress_bar() as progress:
            found = find_in_prompts(dense, tiny, asked, asked_else, what, way, drawn, compared, progress)
            if way != "search":
                exam, poke = Exam.of(tiny, asked, asked_else, seed=HELD_OUT), [Poke(found, found.own_factor)]
                left, change = 100 * exam.pull(poke), 100 * exam.change(poke)
                pull = f"{left:.0f} % of the concept's pull is left"
                if left < 0:
                    pull = f"the concept's pull is turned round, {-left:.0f} % of it the other way"
                said = f"In new drawings, {pull}; others change by {change:.2g} %."
    else:
        if sigmas != (0.0, 1.0):
            raise UserError("--sigma-from and --sigma-to are for prompts: recordings hold all noise levels together.")
        if images or steps:
            raise UserError("--images and --steps are for prompts: recordings are drawn already.")
        if learned:
            raise UserError("--learn is for prompts (.txt), which it draws: recordings hold no velocities.")
        own, others = ([Recording.open(path).internals() for path in paths] for paths in (with_it, without))
        for internals in (*own, *others):
            internals.require_sums("finding neurons")
            internals.require(dense.fingerprint, {site.name: site.width for site in dense.layout.sites}, f"{checkpoint}")
        found = search(dense.tensors, dense.layout, own, others, what, compared)
    found.save(out)
    if picture:
        write_picture(picture, neurons_figure(found))
    typer.echo(found.table())
    if said:
        typer.echo(said)
    turned = f"{out}:{found.own_factor:g}"
    typer.echo(f"{out}: turn them down with {typed('draw', checkpoint, '--poke', turned, '--prompt', '...', '-o', 'drawings')}")


def show(
    file: File,
    count: Annotated[int, whole(help="How many neurons are named.", least=1)] = 20,
    picture: Annotated[Path | None, picture("Also draw them (.png, .pdf, .svg).")] = None,
) -> None:
    """Print which neurons a file holds, and how far they are from the others."""
    from ..files import write_picture
    from ..poking.neurons import Neurons
    from ..poking.picture import neurons_figure

    found = Neurons.load(file)
    typer.echo(found.table(count))
    if picture:
        write_picture(picture, neurons_figure(found))


def join(files: Files, out: Out) -> None:
    """Neurons of several files together."""
    from functools import reduce

    from ..files import check_replaces
    from ..poking.neurons import FORMAT, Neurons

    check_replaces(out, FORMAT)
    found = reduce(Neurons.join, map(Neurons.load, files))
    found.save(out)
    typer.echo(f"{out}: {found.totals()}")


def subtract(file: File, others: Files, out: Out) -> None:
    """Neurons of a file without those of others."""
    from functools import reduce

    from ..files import check_replaces
    from ..poking.neurons import FORMAT, Neurons

    check_replaces(out, FORMAT)
    found = reduce(Neurons.subtract, map(Neurons.load, others), Neurons.load(file))
    if not (found.sites or found.directions):
        raise UserError(f"Nothing is left of {file} without the others: nothing is written.")
    found.save(out)
    typer.echo(f"{out}: {found.totals()}")


def cut(file: File, checkpoint: Checkpoint, out: Out) -> None:
    """Make a pruning plan that cuts them."""
    from ..files import check_replaces
    from ..poking.neurons import Neurons
    from ..pruning.dense import Dense
    from ..pruning.plan import FORMAT

    check_replaces(out, FORMAT)
    plan = Neurons.load(file).plan(Dense.open(checkpoint))
    plan.save(out)
    typer.echo(f"{plan.table()}\n{out}: cut with {typed('prune', out, '--repair', 'none', '-o', 'pruned.safetensors')}")


def lora(
    file: File,
    checkpoint: Checkpoint,
    out: Out,
    factor: Annotated[
        float | None,
        number(
            help="0 = the mean of the others, -1 mirrored, 2 boosted. Default: the file's own, else -1.", least=-100, most=100
        ),
    ] = None,
    about: Annotated[
        Literal["mean", "zero"], typer.Option(help="Turned about the mean of the others, or scaled (zero; 0 cuts them).")
    ] = "mean",
) -> None:
    """Write a LoRA that turns them, for any ComfyUI, exact at strength 1."""
    from ..poking.export import save_lora
    from ..poking.neurons import Neurons
    from ..poking.poke import Poke
    from ..pruning.dense import Dense

    neurons, dense = Neurons.load(file), Dense.open(checkpoint)
    neurons.require(dense.fingerprint, f"{checkpoint}")
    if neurons.learned and about == "zero":
        raise UserError(
            "These neurons have weights for turning about the mean, which do not count about zero: leave out --about."
        )
    chosen = neurons.own_factor if factor is None else factor
    rank = save_lora(out, dense.tensors, dense.layout, [Poke(neurons, chosen, None if about == "mean" else 0.0)])
    typer.echo(f"{out}: rank {rank}, factor {chosen:g}; load it at strength 1")
