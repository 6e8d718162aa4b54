"""The same work on many machines, on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .recordings import What
from .terminal import number, progress_bar, seed, spread, typed, whole

if TYPE_CHECKING:
    from ..cluster.connect import Needs
    from ..cluster.tasks import Done


@dataclass(frozen=True)
class Cluster:
    """Which machines, and what a worker takes of them."""

    address: Annotated[
        str, typer.Option(help="Ray cluster: local (this machine alone), auto, ray://host:10001 or host:6379.")
    ] = "local"
    workers: Annotated[int | None, whole(help="At most so many (default: as many as there is room for).", least=1)] = None
    cpus_per_worker: Annotated[float, number(help="Processor cores of each.", least=0.01, most=1024)] = 1.0
    gpus_per_worker: Annotated[float, number(help="GPUs of each; .5 lets two share one.", least=0.0, most=64)] = 0.0
    memory_gb: Annotated[
        float | None, number(help="Main memory that each needs (default: by the work).", least=0.01, most=10_000)
    ] = None

    def needs(self, estimated: float = 0.0) -> Needs:
        """Of one worker, whose work takes about so many bytes."""
        from ..cluster.connect import Needs

        memory = estimated if self.memory_gb is None else self.memory_gb * 1e9
        return Needs(self.cpus_per_worker, self.gpus_per_worker, int(memory))

    @contextmanager
    def connected(self) -> Iterator[None]:
        from ..cluster.connect import connected

        with connected(self.address):
            yield


@spread
def record(
    source: Annotated[
        Path,
        typer.Argument(help="A workflow in API form (.json) for ComfyUI, or a FLUX of the tiny kind (.safetensors)."),
    ],
    prompts: Annotated[str, typer.Option(help="Text file, one prompt per line; or hf:DATASET#COLUMN.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder that all machines reach, or a URL (s3://, gcs://, ...).")],
    cluster: Cluster,
    what: What,
    comfyui: Annotated[
        Path | None, typer.Option(help="Folder of ComfyUI on every machine; each worker starts one of its own.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NODE.INPUT=VALUE in the workflow; may be given again.")
    ] = None,
    count: Annotated[int | None, whole(help="Only so many of the prompts.", least=1)] = None,
    patience: Annotated[
        float, number(help="Seconds without progress after which a worker is ended and replaced.", least=1, most=10**6)
    ] = 600.0,
    seed: Annotated[int, seed("Seed of the first image; each image takes the next.", most=2**62)] = 0,
) -> None:
    """Record a file of prompts on all machines of a cluster: the same as on one, however often workers are lost."""
    from ..cluster.prompts import prompts_from
    from ..cluster.record import ComfyJob, Job, TinyJob
    from ..cluster.record import record as record_there
    from ..cluster.shared import Shared
    from ..files import size_text
    from ..headless.runs import read_graph
    from ..tiny.model import TinyFlux

    texts = prompts_from(prompts, count)
    job: Job
    if source.suffix == ".json":
        if comfyui is None:
            raise UserError("A workflow runs on ComfyUI: give the folder in which every machine has it with --comfyui.")
        if replace(what, batch=What.batch) != What() or seed:
            raise UserError(
                "What a workflow records, and its steps and seeds, are in it: of the options that say so, leave out all but "
                "--batch, and change the workflow with --set."
            )
        job = ComfyJob(read_graph(source), comfyui, set_ or (), what.batch, patience=patience)
    elif comfyui is not None or set_:
        raise UserError(f"--comfyui and --set are for workflows (.json), and {source} is none: leave them out.")
    else:
        wanted = what.wanted(seed)
        for kind, size in wanted.estimated_bytes(TinyFlux.load(source), what.steps, len(texts)).items():
            if wanted.limit is not None and size > wanted.limit.bytes:
                raise UserError(
                    f"{len(texts):,} prompts take up to {size_text(size)} of {kind}, and {size_text(wanted.limit.bytes)} are "
                    "allowed: keep fewer rows or steps, or raise --max-gb (on a cluster, nothing is thinned out afterwards)."
                )
        job = TinyJob(source, wanted, what.steps, what.batch, seed)
    job.pieces(texts), Shared(out)  # what cannot be done is said before a cluster is begun
    with cluster.connected(), progress_bar() as progress:
        longest = 6 * patience * (what.batch if comfyui else 1)
        recorded = record_there(
            job, texts, out, cluster.needs(), cluster.workers, longest, progress, lambda line: typer.echo(line, err=True)
        )
    tell(recorded, "pieces", typed("internals", "show", out), f"{out}: ", "piece")


def tell(done: Done, what: str, then: str, where: str = "", each: str = "task") -> None:
    """What was done, and what to do next; raises `UserError` where some of it failed."""
    there = f" ({done.before} of them were there)" if done.before else ""
    lost = f"; {done.lost} times a worker was lost and its {each} done again" if done.lost else ""
    typer.echo(f"{where}{done.total - len(done.failed)} of {done.total} {what}{there}{lost}")
    if done.failed:
        first, why = next(iter(done.failed.items()))
        raise UserError(
            f"{len(done.failed)} of {done.total} {what} failed, first {first}: {why} The same command tries them again."
        )
    typer.echo(then)
