"""`flux-poke`: one thin function per command; the work is in the library."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from .errors import UserError

app = typer.Typer(
    help="Open up FLUX: record, see, cut, repair and retrain its MLP neurons.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
internals_app = typer.Typer(help="Look at and add up recordings.", no_args_is_help=True)
train_app = typer.Typer(help="Make models from scratch.", no_args_is_help=True)
app.add_typer(internals_app, name="internals")
app.add_typer(train_app, name="train")
lens_app = typer.Typer(help="The tuned lens on what blocks predict.", no_args_is_help=True)
app.add_typer(lens_app, name="lens")


def main() -> None:
    """The command line; an error of the user's is one sentence and exit status 1."""
    try:
        app(args_with_files(sys.argv[1:]))
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def args_with_files(arguments: list[str]) -> list[str]:
    """The arguments, with those in a file in place of `@file`: as on the command line, on any number of lines, # comments."""
    found: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            found.append(argument)
            continue
        try:
            found += shlex.split(Path(argument[1:]).read_text(encoding="utf-8"), comments=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{argument}: the arguments in {argument[1:]} cannot be read ({error}).") from error
    return found


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("flux_poke_demo"),
    seed: Annotated[int, typer.Option(help="Seed of the drawings.")] = 0,
) -> None:
    """Try the whole loop on a tiny FLUX that draws digits: no ComfyUI, no download, a minute on a CPU."""
    from .demo import run_demo

    with progress_bar() as update:
        summary = run_demo(out, seed, update)
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
        f"Next: flux-poke internals show {out / 'internals.safetensors'}\n"
        f"      flux-poke inspect {out / 'budget-obs-affine.safetensors'}"
    )


@app.command()
def record(
    checkpoint: Annotated[Path, typer.Argument(help="FLUX of the tiny kind (.safetensors), as `train tiny` makes.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adds to this file.")] = Path("internals.safetensors"),
    seed: Annotated[int, typer.Option(help="Seed of the first image; each image takes the next.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps per image.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 16,
    rows: Annotated[Optional[Path], typer.Option(help="Also sample rows of what the MLPs read into this folder.")] = None,  # noqa: UP045
    rows_per_step: Annotated[int, typer.Option(min=1, help="Rows per MLP, image and step.")] = 64,
    rows_steps: Annotated[Optional[int], typer.Option(min=1, help="Steps per image (default: 5 %, at least 1).")] = None,  # noqa: UP045
    max_gb: Annotated[float, typer.Option(help="What the rows may take; then all images' share is halved.")] = 20.0,
    hidden_states: Annotated[Optional[Path], typer.Option(help="Folder for what --what says.")] = None,  # noqa: UP045
    what: Annotated[
        Literal["rows", "blocks", "trajectories"],
        typer.Option(help="rows: as --rows. blocks, trajectories: for retraining; no internals are recorded then."),
    ] = "rows",
    blocks: Annotated[str, typer.Option(help='Blocks to keep states of, such as "double 0-3, single"; or all.')] = "all",
    states_steps: Annotated[Optional[int], typer.Option(min=1, help="Steps per image (default: 5 %, at least 1).")] = None,  # noqa: UP045
    storage: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of states and velocities.")] = "bfloat16",
) -> None:
    """Draw a file of prompts and add what every neuron did to an internals file, or keep what went through its blocks."""
    if hidden_states and what != "rows":
        return _record_states(
            checkpoint, prompts, hidden_states, what, blocks, states_steps, storage, max_gb, seed, steps, batch
        )
    rows = rows or hidden_states
    from .analysis.hidden_states import Limit
    from .analysis.record import RowsTo, record_prompts
    from .analysis.report import internals_title
    from .analysis.row_recording import RowChoice, estimated_bytes
    from .flux.checkpoint import Checkpoint
    from .prompts import read_prompts

    texts = read_prompts(prompts)
    to = None
    if rows:
        to = RowsTo(rows, RowChoice(rows_per_step, rows_steps, seed=seed), Limit(max_gb))
        layout = Checkpoint(checkpoint).layout
        size = estimated_bytes(layout.sites, layout.hidden, to.choice, steps, len(texts))
        typer.echo(f"{rows}: at most {size / 1e9:.2g} GB of rows")
    with progress_bar() as update:
        total = record_prompts(checkpoint, texts, out, seed=seed, steps=steps, batch=batch, progress=update, rows=to)
    typer.echo(f"{out}: {internals_title(total)}")


def _record_states(
    checkpoint: Path,
    prompts: Path,
    folder: Path,
    what: Literal["blocks", "trajectories"],
    blocks: str,
    kept_steps: int | None,
    storage: str,
    max_gb: float,
    seed: int,
    steps: int,
    batch: int,
) -> None:
    import torch

    from .analysis.blocks import choose_blocks
    from .analysis.hidden_states import Limit
    from .analysis.record import record_states
    from .analysis.state_recording import StateChoice, estimated_state_bytes, places_around
    from .flux.checkpoint import Checkpoint
    from .flux.tiny import LATENT_SIDE
    from .flux.tiny.words import PADDED
    from .prompts import read_prompts

    texts, layout = read_prompts(prompts), Checkpoint(checkpoint).layout
    choice = StateChoice(kept_steps, seed=seed, dtype=getattr(torch, storage))
    places = places_around(choose_blocks(blocks, layout), layout)
    calls = len(texts) * (kept_steps or max(1, round(0.05 * steps)))
    size = estimated_state_bytes(what, layout, places, choice, calls, (LATENT_SIDE // layout.patch) ** 2, PADDED)
    typer.echo(f"{folder}: about {size / 1e9:.2g} GB of {what}")
    with progress_bar() as update:
        store = record_states(
            checkpoint, texts, what, folder, blocks, choice, Limit(max_gb, "stop"), seed, steps, batch, update
        )
    kept = sum(len(shard.captures) for shard in store.manifest.shards if shard.kind == what)
    typer.echo(f"{folder}: {kept:,} model calls, {store.bytes(what) / 1e9:.2g} GB")


@app.command("download-prompts")
def download_prompts_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Text file to write, one prompt a line.")] = Path("prompts.txt"),
    contains: Annotated[str, typer.Option(help="Only prompts with this in them, such as '\"'.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0 = all.")] = 10_000,
    dataset: Annotated[Optional[list[str]], typer.Option(help="Only this one (default: both).")] = None,  # noqa: UP045
) -> None:
    """Fetch prompts that people gave to image models from two public datasets."""
    from .download_prompts import DATASETS, download_with_bar

    download_with_bar(out, dataset or [*DATASETS], contains, limit)


@internals_app.command("show")
def internals_show(
    file: Annotated[Path, typer.Argument(help="internals.safetensors")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    picture: Annotated[Optional[Path], typer.Option(help="Also draw it (.png, .pdf, .svg).")] = None,  # noqa: UP045 typer on 3.10
) -> None:
    """Print what was recorded, MLP by MLP."""
    from dataclasses import asdict

    from .analysis.internals import Internals
    from .analysis.report import internals_figure, internals_summaries, internals_table

    internals = Internals.load(file)
    if as_json:
        about = {key: getattr(internals, key) for key in ("family", "runs", "steps", "created", "updated")}
        typer.echo(json.dumps({**about, "sites": [asdict(site) for site in internals_summaries(internals)]}, indent=2))
    else:
        typer.echo(internals_table(internals))
    if picture:
        internals_figure(internals).savefig(picture, dpi=110)


@internals_app.command("merge")
def internals_merge(
    out: Annotated[Path, typer.Argument(help="File to write (replaced if it exists).")],
    files: Annotated[list[Path], typer.Argument(help="Recordings of one model.")],
) -> None:
    """Add up recordings of one model."""
    from .analysis.internals import Internals
    from .analysis.report import internals_title

    total = Internals.load(files[0])
    for file in files[1:]:
        total = total.merged(Internals.load(file), str(file))
    total.save(out)
    typer.echo(f"{out}: {internals_title(total)}")


@train_app.command("tiny")
def train_tiny_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the weights; called again, it goes on from there.")
    ] = Path("tiny"),
    config: Annotated[Optional[Path], typer.Option(help="YAML like flux/tiny/config.yaml.")] = None,  # noqa: UP045
) -> None:
    """Make the tiny FLUX from scratch: autoencoder, transformer and word encoder, under 20 minutes on 2 cores."""
    from .flux.tiny.training import read_config, train_tiny

    with progress_bar() as update:
        train_tiny(out, read_config(config), lambda part, step, steps, loss: update(f"{part}: loss {loss:.4f}", step / steps))


@app.command()
def animate(
    folder: Annotated[Path, typer.Argument(help="A generation's folder, or one with decoded/step_*/double_block_*.jpg.")],
    out: Annotated[Optional[Path], typer.Option("--out", "-o", help="File to write; default: DIR/blocks.FORMAT.")] = None,  # noqa: UP045
    format_: Annotated[Literal["gif", "mp4", "webp"], typer.Option("--format")] = "gif",
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 2.0,
    block_type: Annotated[Optional[Literal["double", "single"]], typer.Option(help="Default: both.")] = None,  # noqa: UP045
    max_blocks: Annotated[Optional[int], typer.Option(min=1, help="At most so many blocks of each type.")] = None,  # noqa: UP045
    font_size: Annotated[int, typer.Option(min=0, help="Of the captions; 0 leaves them out.")] = 24,
    order: Annotated[
        Literal["step", "block"], typer.Option(help="Step by step, or one block through all steps, then the next.")
    ] = "step",
) -> None:
    """Make a GIF, MP4 or WebP of decoded block previews."""
    from .analysis.animation import captioned_frames, choose_frames, write_animation
    from .analysis.generation import find_previews

    chosen = choose_frames(find_previews(folder), order, block_type, max_blocks)
    path = out or folder / f"blocks.{format_}"
    with progress_bar() as update:
        frames = captioned_frames(chosen, font_size, lambda done, of, _: update(f"frame {done} of {of}", done / of))
        write_animation(path, frames, fps)
    typer.echo(f"{path}: {len(chosen)} frames")


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="An image, a folder of images, or a .latent: the dense model's.")],
    variants: Annotated[list[Path], typer.Argument(help="What to compare with it, of the same size.")],
    picture: Annotated[Optional[Path], typer.Option(help="Draw them side by side.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--out", "-o", help="Write the table (.csv or .json).")] = None,  # noqa: UP045
) -> None:
    """Relative MSE, PSNR and SSIM of images or latents against a reference."""
    from .analysis import metrics

    goal = metrics.read_images(reference)
    images = [metrics.read_images(variant) for variant in variants]
    rows = [metrics.compare(image, goal, str(variant)) for image, variant in zip(images, variants, strict=True)]
    typer.echo(metrics.comparison_table(rows))
    if out:
        metrics.write_comparisons(out, rows)
    if picture:
        named = [replace(row, name=variant.name) for row, variant in zip(rows, variants, strict=True)]
        metrics.side_by_side(named, images, goal, reference.name).save(picture)


@lens_app.command("fit")
def lens_fit(
    rows: Annotated[Path, typer.Argument(help="Folder with lens rows (Record Hidden States, what = lens rows).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("lens.safetensors"),
    picture: Annotated[Optional[Path], typer.Option(help="Also draw how replaceable each block is.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Fit the affine map from each block's tokens to the last block's."""
    from .analysis.contributions import lens_figure
    from .analysis.lens import LensRows, fit_lens

    with progress_bar() as update:
        lens = fit_lens(LensRows(rows), device=device, progress=lambda done, of: update(f"block {done} of {of}", done / of))
    lens.save(out)
    found = [[block.title, lens.raw_errors[block], lens.errors[block]] for block in sorted(lens.errors)]
    table(("block", "error_without", "error_with_lens"), found)
    if picture:
        lens_figure(lens).savefig(picture, dpi=110)
    typer.echo(f"{out}: fitted on {lens.rows:,} tokens of {lens.images:,} images; errors are on images it was not fitted on")


@app.command()
def capture(
    prompt: Annotated[Optional[list[str]], typer.Option(help="What to draw; may be given more than once.")] = None,  # noqa: UP045
    prompts: Annotated[Optional[Path], typer.Option(help="Text file, one prompt per line.")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help="flux-schnell, flux-dev, flux-dev-krea, tiny, or a file's name.")] = "flux-schnell",
    width: Annotated[Optional[int], typer.Option(help="Pixels, a multiple of 16; default: the workflow's.")] = None,  # noqa: UP045
    height: Annotated[Optional[int], typer.Option(help="Pixels, a multiple of 16; default: the workflow's.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Of the first image, the next take the next; default: random.")] = None,  # noqa: UP045
    num_steps: Annotated[Optional[int], typer.Option(min=1, help="Default: 4 for schnell, 20 for tiny, else 50.")] = None,  # noqa: UP045
    guidance: Annotated[float, typer.Option(help="Distilled guidance, where the model takes one.")] = 2.5,
    output_dir: Annotated[Path, typer.Option(help="One folder per image goes in here.")] = Path("output"),
    decode_intermediates: Annotated[bool, typer.Option(help="Write previews as pictures, or their latents.")] = True,
    add_sampling_metadata: Annotated[bool, typer.Option(help="Write how it was drawn into EXIF and PNG text.")] = True,
    server: Annotated[Optional[str], typer.Option(help="host:port of a ComfyUI that runs.")] = None,  # noqa: UP045
    comfyui: Annotated[Optional[Path], typer.Option(help="Folder of a ComfyUI to start, and stop afterwards.")] = None,  # noqa: UP045
    offload: Annotated[bool, typer.Option(help="Start it in its low-memory mode.")] = False,
    multi_gpu: Annotated[bool, typer.Option(help="Start one for each GPU and spread the prompts over them.")] = False,
) -> None:
    """Draw prompts on ComfyUI, with what every block predicted at every step."""
    from .headless.capture import CaptureRequest, capture_everywhere, capture_servers
    from .prompts import read_prompts

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise UserError("There is nothing to draw: give --prompt or --prompts.")
    requests = [
        CaptureRequest(
            text, model, width, height, None if seed is None else seed + number, num_steps, guidance,
            decode_intermediates, add_sampling_metadata,
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip
    with progress_bar() as update:
        update("waiting for ComfyUI", 0.0)
        with capture_servers(server, comfyui, offload, multi_gpu) as servers:
            found = capture_everywhere(servers, requests, output_dir, update)
    for one in found:
        typer.echo(f"{one.generation_id}  {one.folder}  {one.request.prompt}")


@app.command()
def plan(
    internals: Annotated[Path, typer.Argument(help="internals.safetensors")],
    checkpoint: Annotated[Path, typer.Option(help="The dense FLUX it was recorded on.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan to write.")] = Path("plan.safetensors"),
    score: Annotated[str, typer.Option(help="frequency, magnitude, fluctuation, or obs (needs --rows).")] = "fluctuation",
    rows: Annotated[Optional[Path], typer.Option(help="Folder that `record --rows` filled.")] = None,  # noqa: UP045
    img_cut: Annotated[int, typer.Option(help="Neurons to cut from every img MLP.")] = 0,
    txt_cut: Annotated[int, typer.Option(help="… every txt MLP.")] = 0,
    single_cut: Annotated[int, typer.Option(help="… every single block.")] = 0,
    double: Annotated[Optional[tuple[int, int]], typer.Option(help="First and last double block.")] = None,  # noqa: UP045
    single: Annotated[Optional[tuple[int, int]], typer.Option(help="First and last single block.")] = None,  # noqa: UP045
    img_threshold: Annotated[float, typer.Option(help="Cut img neurons that fired less often than this.")] = 0.0,
    txt_threshold: Annotated[float, typer.Option(help="… txt neurons.")] = 0.0,
    single_threshold: Annotated[float, typer.Option(help="… neurons of single blocks.")] = 0.0,
    on_rate: Annotated[bool, typer.Option(help="Thresholds are per token (0 to 1), not counts.")] = False,
    share: Annotated[Optional[float], typer.Option(help="Budget: share of all neurons to cut, 0 to 1.")] = None,  # noqa: UP045
    gigabytes: Annotated[Optional[float], typer.Option(help="Budget: GB to save at 16 bits.")] = None,  # noqa: UP045
    multiple: Annotated[int, typer.Option(help="Budget: widths are multiples of this.")] = 64,
    protect: Annotated[str, typer.Option(help="Budget: layers to leave whole, such as 'double-18 single-0'.")] = "",
    picture: Annotated[Optional[Path], typer.Option(help="Budget: draw memory saved against predicted error.")] = None,  # noqa: UP045
) -> None:
    """Choose which neurons to keep: by count, by threshold, or by a budget. Nothing is cut yet."""
    from .analysis.hidden_states import HiddenStates
    from .analysis.internals import Internals
    from .pruning.budget import BudgetCurve, by_budget, protected_sites
    from .pruning.dense import Dense
    from .pruning.plan import by_count, by_threshold
    from .pruning.scores import rank

    dense, recorded = Dense.open(checkpoint), Internals.load(internals)
    store = HiddenStates.open(rows) if rows else None
    if img_threshold or txt_threshold or single_threshold:
        on: Literal["counts", "rate"] = "rate" if on_rate else "counts"
        made = by_threshold(dense, recorded, img_threshold, txt_threshold, single_threshold, on, double, single)
    else:
        with progress_bar() as update:
            rankings = rank(score, dense, recorded, store, progress=lambda name, n, of: update(f"ranking {name}", n / of))
        if share is None and gigabytes is None:
            made = by_count(dense, rankings, score, img_cut, txt_cut, single_cut, double, single)
        else:
            protected = protected_sites(dense.layout, protect)
            curve = BudgetCurve.of(dense.layout, rankings, store.amplification if store else None, multiple, protected)
            made = by_budget(dense, rankings, curve, score, share, gigabytes)
            if picture:
                curve.figure(made).savefig(picture, dpi=110)
    made.save(out)
    typer.echo(f"{made.table()}\n{out}: flux-poke prune {checkpoint} --plan {out}")


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX (.safetensors).")],
    plan: Annotated[Path, typer.Option(help="plan.safetensors")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Pruned checkpoint to write.")],
    repair: Annotated[str, typer.Option(help="none, bias (needs --internals) or affine (needs --rows).")] = "none",
    internals: Annotated[Optional[Path], typer.Option(help="internals.safetensors")] = None,  # noqa: UP045
    rows: Annotated[Optional[Path], typer.Option(help="Folder that `record --rows` filled.")] = None,  # noqa: UP045
    fold: Annotated[bool, typer.Option(help="Also store what exact conversion of LoRAs needs after affine repair.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
) -> None:
    """Cut what a plan says, repair what is left, and write a smaller checkpoint that needs no other file."""
    from .analysis.hidden_states import HiddenStates
    from .analysis.internals import Internals
    from .pruning.checkpoint import inspect, save_pruned
    from .pruning.dense import Dense
    from .pruning.plan import PruningPlan
    from .pruning.repair import Repairs
    from .pruning.surgery import Cut

    dense, loaded = Dense.open(checkpoint), PruningPlan.load(plan)
    recorded = Internals.load(internals) if internals else None
    store = HiddenStates.open(rows) if rows else None
    repairs = Repairs(dense, loaded, repair, recorded, store, plan.with_suffix(".repairs"), fold, device)
    with progress_bar() as update:
        repairs.compute(lambda name, n, of: update(f"repairing {name}", 0.8 * n / of))
        save_pruned(out, Cut(dense, loaded, repairs), fold, lambda key, n, of: update(f"writing {out}", 0.8 + 0.2 * n / of))
    typer.echo(f"{inspect(out)}\n{out}: {out.stat().st_size / 1e6:,.1f} MB, from {checkpoint.stat().st_size / 1e6:,.1f}")


@app.command()
def retrain(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX (.safetensors).")],
    plan: Annotated[Path, typer.Option(help="plan.safetensors")],
    hidden_states: Annotated[
        Path, typer.Option(help="Folder that `record --hidden-states` filled, or the original flux-poke.")
    ],
    layers: Annotated[str, typer.Option(help="0-18, or 0,3,7 (single blocks count on), or 'double 3, single'.")] = "all",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the layers.")] = Path("retrained_layers"),
    method: Annotated[
        Literal["closed form", "gradient", "both", "distill"],
        typer.Option(help="distill: all layers at once, on trajectories."),
    ] = "both",
    on: Annotated[Literal["auto", "blocks", "rows"], typer.Option(help="What of the folder to train on.")] = "auto",
    steps: Annotated[Optional[int], typer.Option(help="Gradient steps (default: 32; distill 200).")] = None,  # noqa: UP045
    learning_rate: Annotated[float, typer.Option(help="Highest one; it rises first and falls to zero.")] = 5e-4,
    batch: Annotated[Optional[int], typer.Option(help="Images at steps, of one batch (default: 8; distill 32).")] = None,  # noqa: UP045
    eval_every: Annotated[Optional[int], typer.Option(help="Steps between looks at held-out images (16; distill 50).")] = None,  # noqa: UP045
    patience: Annotated[int, typer.Option(help="Looks without progress before it stops.")] = 4,
    eval_share: Annotated[float, typer.Option(help="Share of the images to judge by.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split and the batches.")] = 0,
    thickness: Annotated[int, typer.Option(help="Consecutive blocks trained together.")] = 1,
    sequential: Annotated[bool, typer.Option(help="Train on what the retrained layers before give.")] = False,
    save_dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, float8_e4m3fn or float8_e5m2.")] = "bfloat16",
    just_evaluate: Annotated[bool, typer.Option(help="Only measure; write nothing.")] = False,
    mixed_precision: Annotated[bool, typer.Option(help="Products in bfloat16.")] = False,
    optimizer: Annotated[Literal["adamw", "adafactor"], typer.Option(help="adafactor takes less memory.")] = "adamw",
    recompute: Annotated[bool, typer.Option(help="distill: gradient checkpointing, slower in less memory.")] = False,
    tensorboard: Annotated[Optional[Path], typer.Option(help="Folder for event files.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
) -> None:
    """Train what a plan leaves of the layers against what the dense model did. @arguments.txt reads options from a file."""
    from .analysis.hidden_states import HiddenStates
    from .pruning.dense import Dense
    from .pruning.plan import PruningPlan
    from .retrain.distill import distill_layers
    from .retrain.files import draw_stats
    from .retrain.layers import open_data, retrain_layers
    from .retrain.options import Options, Progress
    from .retrain.stats import stats_table

    whole = method == "distill"
    options = Options(
        method="both" if method == "distill" else method, steps=steps or (200 if whole else 32), learning_rate=learning_rate,
        batch=batch or (32 if whole else 8), eval_every=eval_every or (50 if whole else 16),
        patience=patience, eval_share=eval_share, seed=seed,
        thickness=thickness, sequential=sequential, save_dtype=save_dtype, just_evaluate=just_evaluate,  # type: ignore[arg-type]
        mixed_precision=mixed_precision, device=device, optimizer=optimizer, recompute=recompute, tensorboard=tensorboard,
    )  # fmt: skip
    dense, loaded = Dense.open(checkpoint), PruningPlan.load(plan)
    with progress_bar() as update:

        def report(progress: Progress) -> None:
            done = (progress.layers_done + progress.step / progress.steps) / progress.layers
            update(f"{progress.layer}: held-out loss {progress.held_out_loss:.3g}", done)

        if whole:
            stats = distill_layers(dense, loaded, HiddenStates.open(hidden_states), out, options, report)
        else:
            stats = retrain_layers(dense, loaded, open_data(hidden_states, on), layers, out, options, report)
    typer.echo(stats_table(stats))
    if not just_evaluate:
        picture = draw_stats(out)
        typer.echo(
            f"{out}: {len(stats)} layers, {picture}\nflux-poke replace {checkpoint} --layers-dir {out} -o OUT.safetensors"
        )


@app.command("replace")
def replace_command(
    checkpoint: Annotated[Path, typer.Argument(help="The dense FLUX (.safetensors).")],
    layers_dir: Annotated[Path, typer.Option(help="Folder that `retrain` filled, or the original flux-poke.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint to write.")],
    first: Annotated[Optional[int], typer.Option(help="First layer to replace (default: 0).")] = None,  # noqa: UP045
    last: Annotated[Optional[int], typer.Option(help="Last one (default: the last in the folder).")] = None,  # noqa: UP045
) -> None:
    """Write a checkpoint with retrained layers in place of the dense ones; it needs no other file."""
    from .pruning.checkpoint import save_pruned
    from .pruning.dense import Dense
    from .retrain.replaced import Replaced, RetrainedLayers

    dense = Dense.open(checkpoint)
    layers = RetrainedLayers.open(layers_dir, dense, first, last)
    replaced = Replaced(dense, layers)
    with progress_bar() as update:
        save_pruned(out, replaced, progress=lambda key, n, of: update(f"writing {out}", n / of))
    if layers.missing:
        typer.echo(layers.describe_missing(dense.layout))
    typer.echo(f"{out}: {out.stat().st_size / 1e6:,.1f} MB, neurons cut: {replaced.plan.masked_count}")


@app.command("inspect")
def inspect_command(file: Annotated[Path, typer.Argument(help="A FLUX checkpoint, dense or pruned.")]) -> None:
    """Print what a checkpoint is: family, widths, what was cut, how well it was repaired."""
    from .pruning.checkpoint import inspect

    typer.echo(inspect(file))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on the terminal (nothing where there is none), told what is being done and how far it is, 0..1."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda doing, done: bar.update(task, description=doing, completed=done)


def table(columns: tuple[str, ...], rows: list[list[object]]) -> None:
    """Prints a table; numbers short."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    first, *others = (column.replace("_", " ") for column in columns)
    printed = Table(Column(first, no_wrap=True), *others, box=SIMPLE)
    for row in rows:
        printed.add_row(*(_short(value) for value in row))
    Console().print(printed)


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
