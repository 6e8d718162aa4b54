"""`flux-poke demo`: the whole loop on a tiny FLUX that ships, without ComfyUI.

    summary = run_demo(Path("flux_poke_demo"), seed=0, family="flux1")

Records it, cuts half of its MLP neurons in several ways, and in FLUX.1 half of all its parameters (`fitted`: neurons and ranks
of modulation layers, which FLUX.2's blocks have none of), and measures every variant against the dense model. Prompts and seeds
of the drawings that are measured are not those that were recorded. All that is made lies in one folder: internals, rows, plans,
pruned checkpoints, pictures and `summary.json`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .analysis.exam import Exam as Drawings
from .analysis.exam import Nearness
from .analysis.report import internals_figure
from .errors import UserError
from .files import check_text, write_picture, write_text
from .flux.layout import Family
from .progress import Progress, part, renamed, silent
from .pruning.checkpoint import save_changed, save_pruned
from .pruning.dense import Dense
from .pruning.plan import PruningPlan
from .pruning.planning import ByBudget, ByCount, Planned, Request, make_plan
from .pruning.refit import RepairReport
from .pruning.repair import Repairs
from .pruning.surgery import Cut
from .recording.drawing import Wanted, record
from .recording.recording import Recording
from .recording.rows import RowChoice
from .recording.trajectories import Trajectories, trajectory
from .retrain.distill import distill
from .tiny.data import digit_accuracy
from .tiny.model import SHIPPED, STEPS, TinyFlux
from .tiny.words import digit_prompts

SUMMARY = "summary.json"

RECORDED, MEASURED, TAUGHT = 200, 100, 60


@dataclass(frozen=True)
class Variant:
    """One model of the summary, measured against the dense one; `psnr` is in dB, None where the images are equal."""

    name: str
    score: str
    repair: str
    neurons_kept: int
    neurons: int
    parameters: int
    bytes: int
    velocity_error: float
    latent_error: float
    psnr: float | None
    digit_accuracy: float
    seconds: float


def run_demo(out: Path, seed: int = 0, progress: Progress = silent, family: Family = "flux1") -> dict:
    """Runs it, writes everything to `out`, which is a recording then, and returns what `summary.json` holds.

    Raises `UserError` where `out` holds a recording, or files of such names, that no demo made.
    """
    started = time.perf_counter()
    _make_room(out)
    checkpoint, recording = SHIPPED[family] / "flux.safetensors", Recording.at(out)
    dense = Dense.open(checkpoint)
    variants: list[Variant] = []

    def write_summary() -> dict:
        summary = {
            "family": dense.layout.family,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 2),
            "variants": [asdict(variant) for variant in variants],
        }
        write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    write_summary()  # tells the next demo, also after an interrupt, whose folder this is
    prompts = [digit_prompt(number, 0) for number in range(RECORDED)]
    wanted = Wanted(internals=True, rows=RowChoice(rows=24, steps=8, seed=seed))
    record(checkpoint, prompts, recording, wanted, 10_000 + 1_000 * seed, STEPS, 40, part(progress, 0, 100, 20))
    write_picture(out / "internals.png", internals_figure(recording.internals()))

    progress("drawing others to measure on", 20, 100)
    exam = Exam(TinyFlux.load(checkpoint), [digit_prompt(number, 1) for number in range(MEASURED)], seed)
    variants.append(exam.measured("dense", dense.tensors, PruningPlan.keeping_all(dense), "none", checkpoint.stat().st_size))

    half = dense.layout.sites[0].width // 2
    requests: dict[str, tuple[Request, str]] = {
        "frequency-none": (ByCount(half, half, half, "frequency"), "none"),
        "fluctuation-bias": (ByCount(half, half, half, "fluctuation"), "bias"),
        "obs-affine": (ByCount(half, half, half, "obs"), "affine"),
        "budget-obs-affine": (ByBudget(neurons=0.5, multiple=32), "affine"),
    }
    if dense.layout.modulated:
        requests["fitted"] = ByBudget(share=0.5, multiple=4), "affine"
    made: dict[str, tuple[Planned, Cut]] = {}
    for number, (name, (what, repair)) in enumerate(requests.items()):
        half_of = "all parameters" if name == "fitted" else "the neurons"
        within = renamed(part(progress, 30 + 10 * number, 100, 10), f"cutting half of {half_of}: {name}")
        within("", 0, 1)
        begun = time.perf_counter()
        planned = make_plan(dense, recording, what, progress=part(within, 0, 3))
        planned.plan.save(out / f"{name}.plan.safetensors")
        repairs = Repairs(dense, planned.plan, repair, recording)
        repairs.compute(part(within, 1, 3))
        cut = Cut(dense, planned.plan, repairs)
        made[name] = planned, cut
        file = out / f"{name}.safetensors"
        save_pruned(file, cut)
        variants.append(exam.measured(name, cut, planned.plan, repair, file.stat().st_size, time.perf_counter() - begun))
    write_picture(out / "budget.png", made[[*made][-1]][0].figure())

    progress("retraining all kept neurons against the dense model", 82, 100)
    planned, cut = made["budget-obs-affine"]
    begun = time.perf_counter()
    texts = exam.tiny.words(prompts[:TAUGHT])
    taught, _ = trajectory(exam.tiny.flux, exam.tiny.noise(TAUGHT, 30_000 + 1_000 * seed), exam.tiny.sigmas(), *texts)
    distilled = distill(cut, Trajectories.of(taught))
    file = out / "retrained.safetensors"
    measured = RepairReport("retrained", before=distilled.start.relative, after=distilled.final.relative)
    report = dict.fromkeys(planned.plan.kept, measured)
    save_changed(file, out / "budget-obs-affine.safetensors", distilled.tensors, report)
    tensors = {**cut, **distilled.tensors}
    spent = time.perf_counter() - begun
    variants.append(exam.measured("retrained", tensors, planned.plan, "affine", file.stat().st_size, spent))
    write_picture(out / "variants.png", variants_figure(variants, exam))
    progress("done", 1, 1)
    return write_summary()


def _make_room(out: Path) -> None:
    """Removes what an earlier demo recorded in `out`, which would be added to; a recording that no demo made is refused."""
    recording = Recording.at(out)
    check_text(out / SUMMARY, "the summary of a demo", lambda text: "variants" in json.loads(text))
    for found in (recording.internals_file, recording.states_folder, recording.cache):
        if found.exists() and not (out / SUMMARY).exists():
            raise UserError(f"{found} was not made by a demo, which would replace it: choose another folder with --out.")
    recording.internals_file.unlink(missing_ok=True)
    for folder in (recording.states_folder, recording.cache):
        shutil.rmtree(folder, ignore_errors=True)


class Exam(Drawings):
    """Drawings of the dense model that no recording saw, and how near a changed model comes to them."""

    def __init__(self, tiny: TinyFlux, prompts: list[str], seed: int):
        """`prompts` are for the digits 0 to 9, over and over."""
        super().__init__(tiny, prompts, tiny.noise(len(prompts), 500_000 + 1_000 * seed))
        self.digits = [number % 10 for number in range(len(prompts))]

    def measured(
        self, name: str, tensors: Mapping[str, Tensor], plan: PruningPlan, repair: str, size: int, seconds: float = 0.0
    ) -> Variant:
        """How the model with these tensors does."""
        kept, neurons = plan.neurons
        near = Nearness() if name == "dense" else self.compared(name, tensors)
        return Variant(
            name=name,
            score=plan.score,
            repair=repair,
            neurons_kept=kept,
            neurons=neurons,
            parameters=sum(tensors[key].numel() for key in tensors),
            bytes=size,
            velocity_error=near.velocity_error,
            latent_error=near.latent_error,
            psnr=near.psnr,
            digit_accuracy=digit_accuracy(self.images[name], self.digits),
            seconds=round(seconds, 2),
        )


def digit_prompt(number: int, half: int) -> str:
    """A prompt for the digit `number` % 10. Both halves use every template, words and numerals, but never the same prompt."""
    template = number // 10 % 13
    return digit_prompts(number % 10)[2 * template + (template + half) % 2]


def variants_figure(variants: list[Variant], exam: Exam) -> Figure:
    """The same ten drawings by every variant, one row each, with what was measured beside them."""
    figure = Figure(figsize=(11, 0.85 * len(variants) + 0.2), layout="constrained", facecolor="white")
    rows = figure.subplots(len(variants), 2, width_ratios=(10, 5), squeeze=False)
    for variant, (picture, text) in zip(variants, rows, strict=True):
        picture.imshow(np.concatenate(list(exam.images[variant.name][:10].permute(0, 2, 3, 1).numpy()), axis=1))
        facts = f"{variant.parameters / 1e6:.2f} M parameters, {variant.digit_accuracy:.1%} read right"
        if variant.psnr is not None:
            facts += f"\nvelocity error {variant.velocity_error:.4f}, {variant.psnr:.1f} dB"
        text.text(0, 0.5, f"{variant.name}\n{facts}", va="center", fontsize=10)
        picture.axis("off")
        text.axis("off")
    return figure
