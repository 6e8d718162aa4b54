"""A workflow on ComfyUI without a browser: one prompt or a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError, WrongArguments
from .terminal import progress_bars, whole


def queue(
    workflow: Annotated[Path, typer.Argument(help="A workflow in API form (Workflow menu, Export (API)).")],
    server: Annotated[list[str] | None, typer.Option(help="host:port or URL of a ComfyUI that runs; several share.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NODE.INPUT=VALUE, by the node's title or id; {prompt} in it is each prompt. May be given again."
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line: one run for each.")] = None,
    start: Annotated[int, whole(help="Number of the first one, counted from 0; seeds count with it.", least=0)] = 0,
    count: Annotated[int | None, whole(help="Runs (default: all prompts from there on, or 1).", least=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to bring to what the runs save.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the queue in --out, without what is done.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Put the runs into the servers' queues, and leave.")] = False,
) -> None:
    """Run a workflow on one ComfyUI or several: set inputs, draw a file of prompts, bring back what is saved.

    Exit status: 0 all done, 1 some not (named), 2 wrong arguments, 3 no server answers.
    """
    from ..headless.asking import Unreachable
    from ..headless.runs import make_runs, read_graph
    from ..prompts import read_prompts

    if resume and out is None:
        raise WrongArguments("--resume goes on with the queue in a folder: give it with --out.")
    if no_wait and out is not None:
        raise WrongArguments("--no-wait does not see how runs end, so it brings nothing to --out: leave out one of the two.")
    graph = read_graph(workflow)
    try:
        texts = None if prompts is None else read_prompts(prompts)
    except UserError as error:
        raise WrongArguments(f"{error}") from error
    runs = make_runs(graph, set_ or (), texts, start, count)

    from ..headless.queue import Queue, send  # which takes its time
    from ..headless.server import DEFAULT_SERVER

    servers = server or [DEFAULT_SERVER]
    if no_wait:
        for run, address, prompt_id in send(servers, runs):
            typer.echo(f"{prompt_id}  {address}  {run.name}")
        return
    with progress_bars() as bar:
        queued = Queue(servers, runs, out, resume, typer.echo, bar)
        outcome = queued.draw()
    for name, total in queued.recordings().items():
        typer.echo(f"{(out or Path()) / name}: {total.runs:,} runs, {total.steps:,} model calls")
    said = f"{len(outcome.done)} of {len(runs)} runs done"
    if not outcome.failed and not outcome.left:
        typer.echo(f"{said}{f', in {out}' if out else ''}.")
        return
    for run, why in outcome.failed.items():
        typer.echo(f"Run {run.name} failed: {why}", err=True)
    again = "the same command with --resume goes on" if out else "give --out, and --resume goes on where it stopped"
    left = f", {len(outcome.failed)} failed" if outcome.failed else ""
    left += f", {len(outcome.left)} left (first: run {outcome.left[0].name})" if outcome.left else ""
    if outcome.stopped:
        raise UserError(f"Stopped, and what ran was interrupted: {said}{left}; {again}.")
    if outcome.left:
        raise Unreachable(f"{said}{left}; {again}. {outcome.why}")
    raise UserError(f"{said}{left}; {again}.")
