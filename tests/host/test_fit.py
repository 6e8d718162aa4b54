"""A FLUX of the size asked for from one graph, on a real server with the tiny FLUX; and Calibrate, which it begins with."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient, Interrupted, Result
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import FOLDER, TinyFlux
from PIL import Image
from safetensors.torch import load_file, save_file

PROMPTS = ("a three", "the digit 8", "number five", "a handwritten one", "zero")
#: Images of the host tests, fewer than the workflow's.
FEW = 12
#: Numbers of the nodes of fit_flux_tiny.
CALIBRATE, PLAN, SAVE, LOAD, DECODE_FITTED, COMPARE = "2", "3", "4", "5", "12", "13"


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def fit(workflow):
    """The shipped graph with few images and a recording of its own, which also saves what the fitted model draws."""

    def make(name: str, number: int = FEW, **calibrate) -> dict:
        graph = workflow("fit_flux_tiny")
        graph[CALIBRATE]["inputs"] |= {"name": name, "number": number, **calibrate}
        graph[SAVE]["inputs"]["save_as"] = name
        graph["save"] = node("SaveImage", images=[DECODE_FITTED, 0], filename_prefix="flux_poke/fitted")
        return graph

    return make


@pytest.fixture
def calibrate(fit):
    """Load and Calibrate alone."""

    def make(name: str, number: int = FEW, **options) -> dict:
        graph = {key: value for key, value in fit(name, number, **options).items() if key in ("1", CALIBRATE)}
        return {**graph, "after": node("FluxPokeInternalsReport", recording=[CALIBRATE, 0])}

    return make


def pictures(client: ComfyClient, result: Result) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in result.files("images", "save")])


def recording(host, name: str) -> Recording:
    return Recording.open(host.output / "flux_poke" / name)


def written(found: Recording) -> dict[Path, int]:
    """All files of a recording, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in found.folder.rglob("*.safetensors")}


def images(host, name: str) -> int:
    return recording(host, name).states().image_count("rows")


def test_one_run_makes_a_file_of_the_size_asked_for_that_draws_the_same_after_a_restart(client, host, fit, tmp_path):
    result = client.run(fit("fitted"))
    order = [result.executed.index(number) for number in (CALIBRATE, PLAN, SAVE, LOAD, COMPARE)]
    assert order == sorted(order)
    file = host.base / "models" / "diffusion_models" / "fitted.safetensors"
    asked = fit("fitted")[PLAN]["inputs"]["amount"] * 1e9
    assert abs(file.stat().st_size - asked) < 0.01 * asked
    plan = Pruned.open(file).plan
    assert plan.ranks
    assert plan.neurons[0] < plan.neurons[1]
    assert float(re.findall(r"PSNR ([\d.]+) dB", result.texts[COMPARE])[0]) > 28

    graph = fit("fitted")
    graph[LOAD]["inputs"]["unet_name"] = "fitted.safetensors"
    for number in (CALIBRATE, PLAN, SAVE, COMPARE):
        del graph[number]
    with host.start("--output-directory", str(tmp_path)) as other, ComfyClient(other.address) as fresh:
        assert np.array_equal(pictures(client, result), pictures(fresh, fresh.run(graph)))


def test_a_second_run_does_nothing_and_another_size_draws_nothing(client, host, fit):
    client.run(fit("again"))
    before = written(recording(host, "again"))
    assert client.run(fit("again")).executed == ()
    smaller = fit("again")
    smaller[PLAN]["inputs"]["amount"] = 0.0028
    assert CALIBRATE not in client.run(smaller).executed
    after = written(recording(host, "again"))
    assert {path: after[path] for path in before if ".cache" not in path.parts} == {
        path: time for path, time in before.items() if ".cache" not in path.parts
    }


def test_after_a_restart_what_is_there_is_not_drawn_again(client, host, calibrate):
    client.run(calibrate("restarted"))
    before = written(recording(host, "restarted"))
    with host.start() as other, ComfyClient(other.address) as fresh:
        assert fresh.run(calibrate("restarted")).texts[CALIBRATE] == f"All {FEW} images are in restarted: nothing is drawn."
    assert written(recording(host, "restarted")) == before


def test_more_images_add_to_those_that_are_there(client, host, calibrate):
    client.run(calibrate("grows on"))
    before, measured = written(recording(host, "grows on")), recording(host, "grows on").states().amplification
    text = client.run(calibrate("grows on", FEW + 3)).texts[CALIBRATE]
    assert "3 images drawn" in text
    assert images(host, "grows on") == FEW + 3
    after = written(recording(host, "grows on"))
    assert len(after) == len(before) + 3
    assert sum(before[path] == after[path] for path in before) == len(before) - 1  # all but the internals
    assert recording(host, "grows on").states().amplification == measured
    assert "12 images drawn" in client.run(calibrate("grows on", first_seed=1000)).texts[CALIBRATE]


def test_it_says_what_it_takes_and_leaves_all_that_a_plan_needs(client, host, calibrate):
    result = client.run(calibrate("told"))
    assert re.search(r"12 images drawn in \d+ s \(predicted after the first step: \d+ s\)", result.texts[CALIBRATE])
    found = recording(host, "told")
    assert found.kinds == {"internals", "rows", "amplification"}
    store, layout = found.states(), TinyFlux.load().flux.layout
    for site in layout.sites:  # 8 words an image, all of which are taken
        assert store.count(site.name) >= (FEW * 20 * 8 if site.stream == "txt" else 5 * site.regressors) >= site.regressors
    assert store.count("vector_in") == FEW * 20
    levels = {key: len(measured) for key, measured in store.manifest.amplification.items()}
    assert {levels[f"{site.name}{kind}"] for site in layout.sites for kind in ("", ".removed", ".modulation")} == {5}
    assert (found.internals().runs, found.internals().steps) == (FEW, FEW * 20)


def test_it_counts_what_samplers_with_the_same_prompts_and_seeds_count(client, host, calibrate):
    client.run(calibrate("drawn here", 5, own_prompts="\n".join(PROMPTS), first_seed=40))
    for number, prompt in enumerate(PROMPTS):
        client.run(
            {
                "1": node("FluxPokeLoadTinyFlux"),
                "2": node(
                    "FluxPokeRecordInternals", model=["1", 0], name="drawn there", ignore_padding=True, positive_only=False
                ),
                "3": node("CLIPTextEncode", clip=["1", 1], text=prompt),
                "4": node("ConditioningZeroOut", conditioning=["3", 0]),
                "5": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
                "6": node(
                    "KSampler", model=["2", 0], positive=["3", 0], negative=["4", 0], latent_image=["5", 0], seed=40 + number,
                    steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                ),
                "7": node("PreviewAny", source=["6", 0]),
            }
        )  # fmt: skip
    here, there = (Internals.load(host.recorded(name)).sites for name in ("drawn here", "drawn there"))
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].tokens == there[name].tokens
        assert torch.equal(here[name].fires, there[name].fires)


def test_cancel_keeps_the_images_that_are_finished_and_the_next_run_goes_on(client, host, calibrate):
    graph = calibrate("cancelled fit", 200)
    prompt_id = client.queue(graph)

    def stop(number: str, step: float, _: float) -> None:
        if number == CALIBRATE and step >= 250:  # 125 of them are probes
            client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, stop)
    found = recording(host, "cancelled fit")
    kept = images(host, "cancelled fit")
    assert 5 <= kept < 30
    assert found.internals().runs == kept
    assert found.states().count("vector_in") == kept * 20  # nothing of the image that was under way
    before = written(found)
    text = client.run(calibrate("cancelled fit", kept + 2)).texts[CALIBRATE]
    assert "2 images drawn" in text
    assert images(host, "cancelled fit") == kept + 2
    after = written(found)
    assert all(after[path] == before[path] for path in before if "rows-" in path.name)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"own_prompts": "a three"}, "at least 2 different prompts"),
        ({"number": 2, "steps": 2}, r"ask for at least \d+ prompts"),
        ({"max_gb": 0.001}, r"take [\d.]+ MB on disk, and 0.99 MB"),
        ({"file": "missing.txt"}, "missing.txt"),
        ({"name": "../outside"}, "is not a name inside"),
    ],
    ids=["one prompt", "few rows", "little disk", "no file", "outside"],
)
def test_what_cannot_be_calibrated_is_said_before_anything_is_drawn(client, host, calibrate, changed: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        client.run(calibrate(**{"name": "refused", **changed}))
    assert not (host.output / "flux_poke" / "refused").exists()


def of_file(graph: dict, name: str) -> dict:
    """The graph with the model of a file in the place of the tiny FLUX."""
    graph["file"] = node("UNETLoader", unet_name=name, weight_dtype="default")
    graph[CALIBRATE]["inputs"]["model"] = ["file", 0]
    return graph


@pytest.mark.parametrize("kept", ["internals.safetensors", "hidden_states"])
def test_another_models_recording_is_refused_and_left_as_it_is(client, host, calibrate, kept: str):
    tuned = {key: tensor * 1.01 for key, tensor in load_file(FOLDER / "flux.safetensors").items()}
    save_file(tuned, host.base / "models" / "diffusion_models" / "other fit.safetensors")
    client.run(of_file(calibrate(f"other {kept}", 4), "other fit.safetensors"))
    found = recording(host, f"other {kept}")
    if kept == "hidden_states":
        found.internals_file.unlink()
    else:
        shutil.rmtree(found.states_folder)
    before = written(found)
    with pytest.raises(UserError, match="another model"):
        client.run(calibrate(f"other {kept}", 8))
    assert before
    assert written(found) == before


def test_a_text_encoder_of_another_model_is_named(client, host, calibrate):
    tensors = load_file(FOLDER / "flux.safetensors")
    tensors["txt_in.weight"] = torch.randn(128, 32)
    save_file(tensors, host.base / "models" / "diffusion_models" / "narrow.safetensors")
    graph = of_file(calibrate("narrow"), "narrow.safetensors")
    with pytest.raises(UserError, match="gives texts of 64 channels, and the model reads 32"):
        client.run(graph)
