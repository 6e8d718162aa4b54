"""Choosing what goes, and cutting it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .terminal import Device, MovedCheckpoint, picture, progress_bar, say_written, spread, typed

if TYPE_CHECKING:
    from ..pruning.planning import ByBudget, Request
    from ..recording.recording import Recording

Repair = Annotated[
    str | None, typer.Option(help="none, bias or affine (needs rows); default: what goes with the plan's score.")
]


@dataclass(frozen=True)
class Budget:
    """What a model is to take: fields of `ByBudget`; None leaves them to it."""

    size: Annotated[float | None, typer.Option(help="Budget: GB of the pruned file (1 GB = 10^9 bytes).")] = None
    saved: Annotated[float | None, typer.Option(help="Budget: GB less than the dense model.")] = None
    share: Annotated[float | None, typer.Option(help="Budget: share of all parameters to cut, above 0 and below 1.")] = None
    neurons: Annotated[
        float | None, typer.Option(help="Budget: share of the MLP neurons to cut, above 0 and below 1, and nothing else.")
    ] = None
    touch: Annotated[
        str | None, typer.Option(help="Budget: what may be cut: both (default), neurons, or modulation (its rank).")
    ] = None
    precision: Annotated[
        str | None, typer.Option(help="Budget: what the file will be saved in: stored (default, as it is), bf16 or fp8.")
    ] = None
    multiple: Annotated[
        int | None,
        typer.Option(help="Budget: widths are multiples of this (default 64, in a small model 8), ranks of 1/8."),
    ] = None
    protect: Annotated[str | None, typer.Option(help="Budget: layers to leave whole, such as 'double-18 single-0'.")] = None

    def by_budget(self) -> ByBudget:
        """The request; its `check` tells what makes no sense."""
        from ..pruning.planning import ByBudget

        given = {option.name: getattr(self, option.name) for option in fields(Budget)}
        return ByBudget(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Cuts(Budget):
    """What goes: so many neurons of every MLP, those that fired too seldom, or as many as a budget says."""

    score: Annotated[
        str | None,
        typer.Option(help="Count: frequency, magnitude, fluctuation (default), or obs (needs rows; the score of a budget)."),
    ] = None
    img_cut: Annotated[int | None, typer.Option(help="Neurons to cut from every img MLP.")] = None
    txt_cut: Annotated[int | None, typer.Option(help="... every txt MLP.")] = None
    single_cut: Annotated[int | None, typer.Option(help="... every single block.")] = None
    double: Annotated[tuple[int, int] | None, typer.Option(help="Count, threshold: first and last double block.")] = None
    single: Annotated[tuple[int, int] | None, typer.Option(help="Count, threshold: first and last single block.")] = None
    img_threshold: Annotated[float | None, typer.Option(help="Cut img neurons that fired less often than this.")] = None
    txt_threshold: Annotated[float | None, typer.Option(help="... txt neurons.")] = None
    single_threshold: Annotated[float | None, typer.Option(help="... neurons of single blocks.")] = None
    on_rate: Annotated[bool, typer.Option("--on-rate", help="Thresholds are per token (0 to 1), not counts.")] = False

    def request(self) -> Request:
        """What is asked for; raises `UserError` where it is said in no way or two, or an option has no meaning in that way."""
        from ..pruning.planning import ByCount, ByThreshold

        ways: dict[str, dict[str, Any]] = {
            "by count": {"img": self.img_cut, "txt": self.txt_cut, "single": self.single_cut},
            "by threshold": {"img": self.img_threshold, "txt": self.txt_threshold, "single": self.single_threshold},
            "by budget": {name: getattr(self, name) for name in ("size", "saved", "share", "neurons")},
        }
        chosen = [way for way, values in ways.items() if any(value is not None for value in values.values())]
        if len(chosen) != 1:
            raise UserError(
                "What to cut is said in one way: by count (--img-cut, --txt-cut, --single-cut), by threshold (--img-threshold, "
                "...), or by a budget (--size, --saved, --share or --neurons)."
            )
        (way,) = chosen
        more: dict[str, tuple[Any, tuple[str, ...]]] = {
            "score": (self.score, ("by count",)),
            "double": (self.double, ("by count", "by threshold")),
            "single": (self.single, ("by count", "by threshold")),
            "on-rate": (self.on_rate or None, ("by threshold",)),
            **{name: (getattr(self, name), ("by budget",)) for name in ("touch", "precision", "multiple", "protect")},
        }
        for option, (value, ways_of_option) in more.items():
            if value is not None and way not in ways_of_option:
                raise UserError(f"--{option} has no meaning in a plan {way}: it belongs to one {' or '.join(ways_of_option)}.")
        given = {name: value for name, value in ways[way].items() if value is not None}
        if way == "by budget":
            return self.by_budget()
        given |= {"double": self.double, "single_blocks": self.single, **({"score": self.score} if self.score else {})}
        return ByCount(**given) if way == "by count" else ByThreshold(on="rate" if self.on_rate else "counts", **given)


@spread
def plan(
    recording: Annotated[Path, typer.Argument(help="Folder of a recording, as `record` makes it.")],
    checkpoint: Annotated[Path, typer.Option(help="The dense FLUX it was recorded on.")],
    cuts: Cuts,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Plan to write (default: plan_by_count.safetensors or such in the recording)."),
    ] = None,
    picture: Annotated[
        Path | None,
        picture("Draw the plan: kept and cut, or for a budget memory saved against error."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Choose which neurons to keep: by count, by threshold, or by a budget. Nothing is cut yet."""
    from ..files import check_replaces, check_writable, write_picture
    from ..pruning.dense import Dense
    from ..pruning.plan import FORMAT
    from ..pruning.planning import make_plan
    from ..recording.recording import Recording

    what, recorded = cuts.request(), Recording.open(recording)
    path = out or _default_plan(recorded, what)
    check_replaces(path, FORMAT)
    check_writable(path)
    with progress_bar() as progress:
        planned = make_plan(Dense.open(checkpoint), recorded, what, device, progress)
    planned.plan.save(path)
    if picture is not None:
        write_picture(picture, planned.figure())
    for line in (planned.plan.table(), *planned.notes, f"{path}: {typed('prune', path, '-o', 'pruned.safetensors')}"):
        typer.echo(line)


def _default_plan(recording: Recording, what: Request) -> Path:
    """Where a plan goes that was given no name; raises `UserError` where another plan, or something else, stands there."""
    from ..pruning.plan import PruningPlan
    from ..pruning.planning import settings_of

    settings = settings_of(what)
    path = recording.folder / f"plan_by_{settings['by']}.safetensors"
    if path.exists() and (found := PruningPlan.load(path)).settings != settings:
        raise UserError(f"{path} is another plan ({found.made}): give this one a name with -o, or remove that one.")
    return path


def prune(
    plan: Annotated[Path, typer.Argument(help="A plan, as `plan` makes it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Pruned checkpoint to write.")],
    repair: Repair = None,
    precision: Annotated[
        str | None, typer.Option(help="stored (as the dense file), bf16 or fp8; default: what the plan's size was counted in.")
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="With affine: also store what exact conversion of LoRAs needs.")] = False,
    checkpoint: MovedCheckpoint = None,
    recording: Annotated[Path | None, typer.Option(help="The recording, where it moved since the plan was made.")] = None,
    device: Device = "cpu",
) -> None:
    """Cut what a plan says, repair what is left, and write a smaller checkpoint that needs no other file."""
    from ..files import check_not_read, check_replaces, check_writable
    from ..pruning.checkpoint import save_pruned
    from ..pruning.dense import PRUNED_FORMAT
    from ..pruning.plan import PruningPlan
    from ..pruning.planning import open_dense, open_recording, require_device
    from ..pruning.precision import require_precision
    from ..pruning.repair import Repairs
    from ..pruning.scores import REPAIR_OF
    from ..pruning.surgery import Cut

    check_replaces(out, PRUNED_FORMAT)
    check_writable(out)
    require_device(device)
    loaded = PruningPlan.load(plan)
    saved_as = require_precision(precision or loaded.precision)
    method = repair or REPAIR_OF.get(loaded.score, "none")
    if fold and method != "affine":
        raise UserError(f"--fold stores what affine repair leaves, and the repair is {method}: leave it out.")
    dense = open_dense(loaded, checkpoint)
    check_not_read(out, [dense.path])
    recorded = None if method == "none" and not loaded.ranks else open_recording(loaded, recording)
    cut = Cut(dense, loaded, Repairs(dense, loaded, method, recorded, device))
    with progress_bar() as progress:
        save_pruned(out, cut, fold, progress, saved_as)
    say_written(out, Path(dense.path))
