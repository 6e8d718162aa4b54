"""`flux-poke fit` on the tiny FLUX: the whole loop, its size, what is drawn, how it is stopped and what is refused."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.flux.sampling import FluxTimer
from flux_poke.headless.fit import FitRequest, filled
from flux_poke.progress import whole
from flux_poke.prompts import MEASURED, split_prompts
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.planning import ByBudget
from flux_poke.recording.calibration import asked_images, batches, drawn_name, missing_images
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import FOLDER, TinyFlux
from flux_poke.tiny.words import digit_prompts
from safetensors.torch import load_file, save_file

CHECKPOINT = FOLDER / "flux.safetensors"
TEXTS = [text for digit in range(10) for text in digit_prompts(digit)[:3]]
#: Two batches; enough rows for every MLP.
FEW = ("--count", 20, "--steps", 6)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    return file


@pytest.fixture(scope="module")
def fit(run, prompts):
    return lambda folder, *options: run("fit", CHECKPOINT, "--prompts", prompts, *FEW, "--recording", folder / "made", *options)


@pytest.fixture(scope="module")
def fitted(fit, tmp_path_factory) -> tuple[Path, str]:
    """A folder with a recording and a fit of 2.5 MB, and what was told."""
    folder = tmp_path_factory.mktemp("fit")
    return folder, fit(folder, "--size", 0.0025, "-o", folder / "fitted.safetensors")


def states(folder: Path) -> str:
    return Recording.at(folder / "made").digest("internals", "rows", "amplification")


def shards(folder: Path) -> dict[str, str]:
    """What is in every file of rows."""
    found = {}
    for path in (folder / "made" / "hidden_states").glob("rows-*.safetensors"):
        tensors = sorted(load_file(path).items())
        content = [name.encode() + tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors]
        found[path.name] = hashlib.sha256(b"".join(content)).hexdigest()
    return found


def test_the_file_has_the_size_asked_for_and_the_error_that_is_told(fitted):
    folder, told = fitted
    file = folder / "fitted.safetensors"
    assert file.stat().st_size == pytest.approx(2.5e6, rel=0.01)
    last = " ".join(told.split(f"{file}: ")[-1].split())
    (found,) = re.findall(
        r"a file of 2.5 MB asked for, 2\.\d+ MB in place of 4\.\d+ MB; relative error of the velocity ([\d.]+) predicted, "
        r"([\d.]+) measured, of final latents ([\d.]+), on (\d+) prompts that were not recorded$",
        last,
    )
    predicted, measured, latents, others = found
    tiny, (recorded, held_out) = TinyFlux.load(), split_prompts(TEXTS)
    assert int(others) == len(held_out) == 6
    assert not {*held_out} & {*recorded}
    pruned, sigmas = Flux.load(Pruned.open(file).tensors, torch.float32), FluxTimer(6).sigmas()
    context, vector = tiny.words(held_out)
    noise = tiny.noise(6, 10**9)
    x, (away, energy) = noise, torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            dense, other = (model(x, now.expand(6), context, vector).double() for model in (tiny.flux, pruned))
            away, energy = away + (other - dense).square().sum(), energy + dense.square().sum()
            x = x + (after - now) * dense.float()
    changed = TinyFlux(pruned, tiny.words, tiny.autoencoder).sample(held_out, noise, sigmas)
    assert float(measured) == pytest.approx((away / energy).item(), rel=0.01)
    assert float(latents) == pytest.approx(((changed - x).square().sum() / x.square().sum()).item(), rel=0.01)
    assert 0.5 < float(predicted) / float(measured) < 2


def test_what_it_takes_is_told_first_and_is_what_is_then_there(fitted):
    folder, told = fitted
    first = told.splitlines()[0]
    ((images, calls, rows),) = re.findall(r"(\d+) images of 6 steps: (\d+) model calls; (\d+) rows a step", first)
    assert (int(images), int(calls)) == (20, 120)
    recorded = Recording.open(folder / "made").states()
    assert recorded.image_count("rows") == 20
    assert recorded.count("double-img-0") == 120 * min(int(rows), 16)


def test_another_size_draws_nothing_and_more_images_draw_what_is_new(fit, fitted, tmp_path):
    folder, _ = fitted
    before = states(folder)
    told = fit(folder, "--size", 0.003, "-o", tmp_path / "larger.safetensors")
    assert "20 of 20 images are in" in told
    assert "nothing is drawn to record" in told
    assert states(folder) == before
    assert (tmp_path / "larger.safetensors").stat().st_size == pytest.approx(3e6, rel=0.01)
    told = fit(folder, "--share", 0.4, "-o", tmp_path / "share.safetensors", "--count", 22)
    assert "20 of 22 images are in" in told
    assert "2 images of 6 steps" in told
    assert "40% of all parameters asked for" in told
    assert Recording.open(folder / "made").states().image_count("rows") == 22


def test_stopped_and_gone_on_with_is_as_never_stopped(fit, fitted, prompts, tmp_path):
    given = ("--prompts", prompts, *FEW, "--recording", tmp_path / "made", "-o", tmp_path / "fitted.safetensors")
    command = [sys.executable, "-m", "flux_poke.cli", "fit", CHECKPOINT, *given, "--size", 0.0025]
    words, pipe = [str(word) for word in command], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        end = time.monotonic() + 200
        while not (tmp_path / "made" / "internals.safetensors").exists() and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = " ".join(process.communicate(timeout=60)[0].split())
    assert process.returncode == 1
    assert "Stopped. Images that were recorded are kept: the same command goes on from there." in said
    assert "Traceback" not in said
    assert not (tmp_path / "fitted.safetensors").exists()
    assert Recording.at(tmp_path / "made").states().image_count("rows") == 16
    told = fit(tmp_path, "--size", 0.0025, "-o", tmp_path / "fitted.safetensors")
    assert "16 of 20 images are in" in told
    one, other = (load_file(folder / "fitted.safetensors") for folder in (fitted[0], tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert shards(tmp_path).items() <= shards(fitted[0]).items()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one of the four; found none"),
        (("--size", 0.0025, "--share", 0.5), "found size and share"),
        (("--size", 5), "whole model takes 4.62 MB, and a file of 5 GB is asked for"),
        (("--size", 0.0001), r"4\.\d+ MB are to be saved, but no more than [\d.]+ MB may go"),
        (("--share", 0.99), r"parameters are to be saved, but no more than [\d,]+ parameters may go"),
        (("--size", "nan"), "found nan"),
        (("--share", 0.5, "--touch", "attention"), "both, neurons or modulation"),
        (("--share", 0.5, "--protect", "double-9"), "double-img-9"),
        (("--share", 0.5, "--device", "cuda:99"), "device cuda:99 cannot be used"),
        (("--share", 0.5, "--count", 2, "--steps", 2), "ask for at least"),
        (("--share", 0.5, "--server", "127.0.0.1:1"), "No ComfyUI answers"),
        (("--share", 0.5, "--server", "127.0.0.1:1", "--device", "cuda"), "leave it out"),
        (("--share", 0.5, "--server", "127.0.0.1:1", "--multiple", 8), "leave --multiple out"),
        (("--share", 1.5, "--server", "127.0.0.1:1"), "between 0 and 1"),
        (("--share", 0.5, "--server", "127.0.0.1:1", "--comfyui", "."), "not both"),
        (("--share", 0.5, "--comfyui", FOLDER), "holds no ComfyUI"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_drawn(fit, tmp_path, options, said):
    out = Path("out.safetensors") if {"--server", "--comfyui"} & {*options} else tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=said):
        fit(tmp_path, *options, "-o", out)
    assert not list(tmp_path.iterdir())


def test_the_smallest_size_that_is_not_refused_is_reached(fit, fitted, tmp_path):
    dense, folder = Dense.open(CHECKPOINT), fitted[0]
    least, most = 0.0001, 0.0025
    while most - least > 1e-6:
        size = (least + most) / 2
        try:
            ByBudget(size=size).check(dense)
        except UserError:
            least = size
        else:
            most = size
    fit(folder, "--size", 1.01 * most, "-o", tmp_path / "smallest.safetensors")
    assert (tmp_path / "smallest.safetensors").stat().st_size == pytest.approx(1.01e9 * most, rel=0.01)


def test_other_files_other_models_and_too_few_prompts_are_refused(run, fit, fitted, prompts, tensors, tmp_path):
    for text in ("one\n", "one\none\ntwo\n"):
        (tmp_path / "few.txt").write_text(text)
        with pytest.raises(UserError, match="at least 3 are needed"):
            run("fit", CHECKPOINT, "--prompts", tmp_path / "few.txt", "--share", 0.5, "-o", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="is something else and is not replaced"):
        fit(tmp_path, "--share", 0.5, "-o", CHECKPOINT)
    with pytest.raises(UserError, match="is pruned already"):
        run("fit", fitted[0] / "fitted.safetensors", "--prompts", prompts, "--share", 0.5, "-o", tmp_path / "out.safetensors")
    save_file(tensors(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"run in ComfyUI: .*--comfyui FOLDER or --server HOST:PORT"):
        run("fit", tmp_path / "other.safetensors", "--prompts", prompts, "--share", 0.5, "-o", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "other_recording").exists()


def test_prompts_are_split_by_what_they_say_and_never_on_both_sides():
    recorded, measured = split_prompts(TEXTS)
    assert sorted([*recorded, *measured]) == sorted({*TEXTS})
    assert split_prompts([*reversed(TEXTS), *TEXTS]) == (recorded, measured)
    assert len(split_prompts([f"prompt {number}" for number in range(500)])[1]) == MEASURED
    more = split_prompts([*TEXTS, "one more", "and another"])[0]
    assert [text for text in more if text in recorded][:15] == recorded[:15]


def test_images_drawn_together_are_known_again_whatever_is_asked_for_beside_them(fitted):
    recording, (texts, _) = Recording.open(fitted[0] / "made"), split_prompts(TEXTS)
    settings = "8x8 latents, 6 steps"
    assert missing_images(recording, asked_images(texts, 20, 0, settings)) == []
    assert missing_images(recording, asked_images(texts, 16, 0, settings)) == []
    for images in (asked_images(texts, 20, 1, settings), asked_images(texts, 20, 0, "8x8 latents, 7 steps")):
        assert missing_images(recording, images) == images
    images = asked_images(texts, 24, 0, settings)
    assert [[image.seed for image in some] for some in batches([*images[:3], *images[8:]], 10)] == [
        [0, 1, 2],
        [*range(8, 18)],
        [*range(18, 24)],
    ]
    assert drawn_name(images[:1]) == images[0].name


def test_ctrl_c_waits_for_work_that_is_done_whole():
    done = []

    def work() -> None:
        with whole():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest")
        done.append("what follows")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_workflow_is_filled_with_model_prompts_and_budget():
    what = ByBudget(saved=8, touch="modulation", precision="bf16", protect="single-0")
    request = FitRequest("flux-dev", TEXTS, what, "small/flux.safetensors", count=50, steps=12, seed=7)
    graph = {node["class_type"]: node["inputs"] for node in filled(request, ["flux1-dev-fp8.safetensors"]).graph.values()}
    assert graph["UNETLoader"]["unet_name"] == graph["FluxPokePlanByBudget"]["unet_name"] == "flux1-dev-fp8.safetensors"
    recorded, measured = split_prompts(TEXTS)
    calibrate = graph["FluxPokeCalibrate"]
    assert calibrate["own_prompts"].splitlines() == recorded
    assert (calibrate["number"], calibrate["steps"], calibrate["first_seed"]) == (50, 12, 7)
    assert calibrate["name"] == "flux1-dev-fp8_recording"
    assert graph["CLIPTextEncode"]["text"] in measured
    plan = graph["FluxPokePlanByBudget"]
    assert (plan["budget"], plan["amount"], plan["touch"]) == ("GB to save", 8, "modulation")
    assert (plan["precision"], plan["protect"]) == ("bf16", "single-0")
    assert (plan["save_as"], graph["FluxPokeSavePrunedFlux"]["save_as"]) == ("flux.plan.safetensors", "small/flux.safetensors")
    assert graph["FluxPokeLoadPrunedCheckpoint"]["unet_name"] == ["6", 0]


@pytest.mark.parametrize("name", ["/models/flux.safetensors", "../flux.safetensors", "C:\\flux.safetensors", "flux"])
def test_a_name_that_comfyui_would_not_take_is_refused_before_it_is_asked(name):
    with pytest.raises(UserError, match="expected a name such as"):
        FitRequest("flux-dev", TEXTS, ByBudget(size=10), name)
