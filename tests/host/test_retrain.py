"""Recording block states, retraining, and running with replaced layers on a real server, with the tiny FLUX."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.headless.client import ComfyClient, Interrupted
from flux_poke.pruning.checkpoint import save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.recording.block_states import BlockStates
from flux_poke.recording.recording import Recording
from flux_poke.recording.trajectories import Trajectories
from flux_poke.retrain.blocks import Chain
from flux_poke.retrain.replaced import Replaced, RetrainedLayers
from flux_poke.tiny.model import FOLDER, TinyFlux
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY = "tiny FLUX (ships with the pack)"
ALL_LAYERS = {"first_layer": 0, "last_layer": -1, "first_single": 0, "last_single": -1}
PROMPTS = ("a three", "the digit 8", "number five", "a handwritten one")


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def drawing(model: dict, seed: int = 1, prompt: str = PROMPTS[0], batch: int = 4) -> dict:
    """A graph that draws with what the nodes in `model` load; the last of them gives the MODEL."""
    return {
        "clip": node("FluxPokeLoadTinyFlux"),
        **model,
        "text": node("CLIPTextEncode", clip=["clip", 1], text=prompt),
        "none": node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=batch),
        "sample": node(
            "KSampler", model=[list(model)[-1], 0], positive=["text", 0], negative=["none", 0], latent_image=["empty", 0],
            seed=seed, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["clip", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="flux_poke/retrained"),
    }  # fmt: skip


def pictures(client: ComfyClient, graph: dict) -> np.ndarray:
    files = client.run(graph).files("images", "save")
    return np.stack([np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in files])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def states(kind: str, source: str, name: str = "states", **options) -> dict:
    """Block states or trajectories of the model that node `source` gives."""
    given = {"name": name, "steps": 6, "max_gb": 1.0, "sigma_from": 0.0, "sigma_to": 1.0, "sample_seed": 0}
    if kind == "BlockStates":
        given["blocks"] = "all"
    return node(f"FluxPokeRecord{kind}", model=[source, 0], **{**given, **options})


def load_recording(name: str = "states") -> dict:
    return {"recording": node("FluxPokeLoadRecording", name=name)}


def plan() -> dict:
    inputs = {"unet_name": TINY, "img_cut": 256, "txt_cut": 256, "single_cut": 256, "score": "frequency", "save_as": "half"}
    return node("FluxPokePlanByCount", recording=["recording", 0], **inputs, **ALL_LAYERS)


def retrain(folder: str = "layers", name: str = "states", **options) -> dict:
    given = {
        "plan": ["plan", 0], "layers": "all", "method": "both", "train_on": "auto", "thickness": 1, "steps": 40,
        "learning_rate": 5e-4, "batch": 8, "save_dtype": "float32", "train_seed": 0, "mixed_precision": False, "folder": folder,
    }  # fmt: skip
    return {**load_recording(name), "plan": plan(), "retrain": node("FluxPokeRetrainLayers", **{**given, **options})}


def replaced(folder: str | list = "layers", last: int = -1, **options) -> dict:
    inputs = {"unet_name": TINY, "weight_dtype": "default", "folder": folder, "first_layer": 0, "last_layer": last}
    return {"replaced": node("FluxPokeLoadReplacedFlux", **{**inputs, **options})}


@pytest.fixture(scope="module")
def recorded(server, host) -> Path:
    """Internals, block states and trajectories of the tiny FLUX in the recording `states`; output/flux_poke."""
    model = {
        "tiny": node("FluxPokeLoadTinyFlux"),
        "count": node("FluxPokeRecordInternals", model=["tiny", 0], name="states", ignore_padding=True, positive_only=False),
        "blocks": states("BlockStates", "count", "", recording=["count", 1]),
        "velocities": states("Trajectories", "blocks", "", recording=["blocks", 1]),
    }
    with ComfyClient(server.address) as client:
        for number, prompt in enumerate(PROMPTS):
            client.run(drawing(model, seed=number, prompt=prompt, batch=8))
    return host.output / "flux_poke"


def test_recorded_states_are_what_the_hosts_blocks_read_and_gave(recorded):
    states = BlockStates.open(recorded / "states" / "hidden_states")
    assert states.indices == list(range(7))
    assert len(states) == 4 * 8 * 6
    assert len(states.image.unique()) == 32
    checkpoint = TinyFlux.load().flux.state_dict()
    for block in range(6):
        img, txt = Chain.load(checkpoint, range(block, block + 1))(states.batch(states.groups[0][:8], block))
        right_img, right_txt = states.tokens(states.groups[0][:8], block + 1)
        assert (img - right_img).norm() < 0.01 * right_img.norm()
        assert (txt - right_txt).norm() < 0.01 * right_txt.norm()


def test_recorded_steps_know_what_was_drawn(recorded):
    shards = Recording.open(recorded / "states").states().manifest.shards
    prompts = {capture.image: capture.prompt for shard in shards if shard.kind == "blocks" for capture in shard.captures}
    assert [prompts[image] for image in sorted(prompts)] == [prompt for prompt in PROMPTS for _ in range(8)]


def test_recorded_velocities_are_the_models(recorded):
    samples = Trajectories.open(Recording.open(recorded / "states").states())
    point = samples.batch(samples.groups[0][::8])
    found = point.run(TinyFlux.load().flux)
    assert (found - point.velocity).norm() < 0.02 * point.velocity.norm()


def test_layers_are_retrained_and_run_after_a_restart(recorded, host, server):
    with ComfyClient(server.address) as client:
        dense = pictures(client, drawing({"tiny": node("FluxPokeLoadTinyFlux")}))
        client.run(retrain())
        assert sorted(path.name for path in (recorded / "layers").glob("*.safetensors")) == [
            f"{n}.safetensors" for n in range(6)
        ]
        assert np.array_equal(pictures(client, drawing({"tiny": node("FluxPokeLoadTinyFlux")})), dense)
    with host.start() as again, ComfyClient(again.address) as client:
        found = pictures(client, drawing(replaced()))
    cut_only = {
        **load_recording(),
        "plan": plan(),
        "cut": node("FluxPokeLoadPrunedFlux", plan=["plan", 0], repair="none", weight_dtype="default"),
    }
    with ComfyClient(server.address) as client:
        cut = pictures(client, drawing(cut_only))
        assert np.array_equal(pictures(client, drawing({"tiny": node("FluxPokeLoadTinyFlux")})), dense)
    assert 0 < difference(found, dense) < 0.5 * difference(cut, dense)


def test_a_checkpoint_made_of_the_layers_loads_alone_and_draws_the_same(recorded, server, host):
    with ComfyClient(server.address) as client:
        client.run(retrain("eight_bits", method="closed form", save_dtype="float8_e4m3fn"))
        dense = Dense.open(FOLDER / "flux.safetensors")
        layers = RetrainedLayers.open(recorded / "eight_bits", dense)
        save_pruned(host.base / "models" / "diffusion_models" / "replaced.safetensors", Replaced(dense, layers))
        alone = {"alone": node("FluxPokeLoadPrunedCheckpoint", unet_name="replaced.safetensors", weight_dtype="default")}
        assert np.array_equal(pictures(client, drawing(alone)), pictures(client, drawing(replaced("eight_bits"))))


def test_distilled_layers_run_too(recorded, server):
    with ComfyClient(server.address) as client:
        client.run(retrain("distilled", method="distill", steps=10, batch=16))
        pictures(client, drawing(replaced("distilled")))
    assert len(load_file(recorded / "distilled" / "0.safetensors")) == 10


def test_layers_are_only_measured_and_what_needs_their_folder_does_not_run(recorded, server):
    graph = retrain("unwritten", layers="0-1", just_evaluate=True)
    with ComfyClient(server.address) as client:
        found = client.run(drawing(graph | replaced(["retrain", 0], plan=["plan", 0], unet_name="as in the plan")))
    assert "double-0" in found.texts["retrain"]
    assert not found.files("images", "save")
    assert not (recorded / "unwritten").exists()


def test_in_sequential_training_a_layer_learns_from_the_retrained_one_before_it(recorded, server):
    with ComfyClient(server.address) as client:
        for folder, sequential in (("each", False), ("in_turn", True)):
            client.run(retrain(folder, layers="0-1", method="closed form", sequential=sequential))
    first, second = ([load_file(recorded / folder / f"{n}.safetensors") for folder in ("each", "in_turn")] for n in (0, 1))
    assert all(torch.equal(first[0][key], first[1][key]) for key in first[0])
    assert not torch.equal(second[0]["img_mlp.2.weight"], second[1]["img_mlp.2.weight"])


def rows_and_trajectories(name: str, **choice: int) -> dict:
    """The tiny FLUX with recorders of both on it, the last of which is "velocities"."""
    return {
        "tiny": node("FluxPokeLoadTinyFlux"),
        "rows": node("FluxPokeRecord", model=["tiny", 0], name=name, max_gb=1.0, **choice),
        "velocities": states("Trajectories", "rows", "", recording=["rows", 1]),
    }


def test_a_plan_that_truncates_modulation_too_is_retrained_and_drawn_as_the_reference_draws_it(recorded, server):
    model = rows_and_trajectories("fitted", rows=24, steps=10, probe_steps=4)
    budget = {
        "unet_name": TINY, "budget": "share of all parameters", "amount": 0.45, "touch": "both", "precision": "stored",
        "protect": "", "save_as": "fitted",
    }  # fmt: skip
    graph = retrain("fitted_layers", "fitted", method="distill", steps=10, batch=16)
    graph["plan"] = node("FluxPokePlanByBudget", recording=["recording", 0], **budget)
    loaded = graph | replaced(["retrain", 0], plan=["plan", 0], unet_name="as in the plan")
    with ComfyClient(server.address) as client:
        for seed, prompt in enumerate(PROMPTS):
            client.run(drawing(model, seed=seed, prompt=prompt, batch=8))
        found = client.run(drawing(loaded, seed=5))
        drawn = np.stack([np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in found.files("images", "save")])
    dense_file = Dense.open(FOLDER / "flux.safetensors")
    with safe_open(recorded / "fitted_layers" / "0.safetensors", "pt") as file:
        assert "FluxPokeRetrainLayers" in file.metadata()["prompt"]
    tensors = Replaced(dense_file, RetrainedLayers.open(recorded / "fitted_layers", dense_file))
    assert set(tensors.plan.ranks) == {site.name for site in tensors.dense.layout.sites}
    assert f"{len(tensors.plan.ranks)} modulation layers truncated" in found.texts["replaced"]

    def reference(flux: Flux) -> np.ndarray:
        tiny = replace(TinyFlux.load(), flux=flux)
        noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(5))
        images = tiny.autoencoder.decode(tiny.sample([PROMPTS[0]] * 4, noise))
        return (255 * images.clamp(0, 1)).permute(0, 2, 3, 1).detach().numpy()

    expected = reference(Flux.load({key: tensors[key].float() for key in tensors}))
    dense = reference(TinyFlux.load().flux)
    assert difference(drawn, expected) < 1
    assert difference(drawn, expected) < 0.3 * difference(drawn, dense)


def test_cancel_is_heard_while_distillation_works_out_the_repair_it_starts_from(recorded, server):
    model = rows_and_trajectories("whole", rows=16, steps=6, probe_steps=0)
    repairs = recorded / "whole" / ".cache" / "repairs"
    with ComfyClient(server.address) as client:
        for seed in range(2):
            client.run(drawing(model, seed=seed, batch=8))
        graph = retrain("unmade", "whole", method="distill", steps=10, batch=16)
        prompt_id = client.queue(graph)

        def stop(number: str, step: float, steps: float) -> None:
            if number == "retrain" and step > 0 and list(repairs.rglob("*.safetensors")):
                client.interrupt(prompt_id)

        with pytest.raises(Interrupted):
            client.wait(prompt_id, stop)
    assert 1 <= len(list(repairs.rglob("*.safetensors"))) < 8
    assert not (recorded / "unmade").exists()


def test_cancel_is_heard_within_the_closed_form(recorded, server):
    with ComfyClient(server.address) as client:
        prompt_id = client.queue(retrain("uncounted", method="closed form"))
        seen: list[tuple[float, float]] = []

        def stop(number: str, step: float, steps: float) -> None:
            if number == "retrain" and 0 < step < steps:
                seen.append((step, steps))
                client.interrupt(prompt_id)

        with pytest.raises(Interrupted):
            client.wait(prompt_id, stop)
    assert seen
    assert len(list((recorded / "uncounted").glob("?.safetensors"))) < 6


def test_what_did_not_change_is_not_trained_again_and_what_was_deleted_is(recorded, server):
    shutil.copytree(recorded / "states", recorded / "kept")
    graph = retrain("kept_layers", "kept", method="closed form", layers="0-1")
    graph |= replaced(["retrain", 0], plan=["plan", 0], unet_name="as in the plan")
    first = recorded / "kept_layers" / "0.safetensors"
    with ComfyClient(server.address) as client:

        def ran(seed: int) -> set[str]:
            return {"plan", "retrain", "replaced"} & set(client.run(drawing(graph, seed=seed)).executed)

        assert ran(1) == {"plan", "retrain", "replaced"}
        assert ran(2) == set()
        first.unlink()
        assert ran(3) == {"retrain", "replaced"}
        assert first.exists()
        assert ran(4) == {"retrain", "replaced"}, "the file is there again, which is another state than it was found in"
        assert ran(5) == set()
        more = {"more": states("BlockStates", "tiny", "kept")}
        client.run(drawing({"tiny": node("FluxPokeLoadTinyFlux"), **more}, seed=9))
        made = first.stat().st_mtime_ns
        assert ran(6) == {"plan", "retrain", "replaced"}
        assert first.stat().st_mtime_ns > made


def test_layers_of_another_plan_are_not_written_over_and_every_plan_has_a_folder_of_its_own(recorded, server):
    quarter = {**plan()["inputs"], "img_cut": 128, "save_as": "quarter"}
    with ComfyClient(server.address) as client:
        client.run(retrain("taken", method="closed form", layers="0-1"))
        before = {path.name: path.read_bytes() for path in (recorded / "taken").glob("*.safetensors")}
        other = retrain("taken", method="closed form", layers="0-1") | {"plan": node("FluxPokePlanByCount", **quarter)}
        with pytest.raises(UserError, match="taken"):
            client.run(other)
        assert {path.name: path.read_bytes() for path in (recorded / "taken").glob("*.safetensors")} == before

        own = retrain("", method="closed form", layers="0-1") | {"plan": node("FluxPokePlanByCount", **quarter)}
        own["show"] = node("PreviewAny", source=["retrain", 0])
        (name,) = client.run(own).outputs["show"]["text"]
        assert re.fullmatch(r"retrained_layers/[0-9a-f]{8}", name)
        graph = {"plan": node("FluxPokeLoadPlan", file="quarter", unet_name="as in the plan")}
        graph |= replaced("", plan=["plan", 0], unet_name="as in the plan")
        assert "2 layers replaced" in client.run(drawing(graph)).texts["replaced"]
        with pytest.raises(UserError, match="Connect the plan that they belong to, or choose both"):
            client.run(drawing(replaced("")))


def test_cancel_keeps_finished_layers_and_leaves_the_host_in_order(recorded, server):
    def cancel_later():
        deadline = time.monotonic() + 120
        while not (recorded / "cancelled_layers" / "0.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with ComfyClient(server.address) as other:
            other.interrupt()

    waiting = threading.Thread(target=cancel_later)
    waiting.start()
    with ComfyClient(server.address) as client:
        before = pictures(client, drawing({"tiny": node("FluxPokeLoadTinyFlux")}))
        with pytest.raises(Interrupted):
            client.run(retrain("cancelled_layers", method="gradient", steps=20_000))
        waiting.join()
        kept = [path.name for path in (recorded / "cancelled_layers").glob("*.safetensors") if not path.name.startswith(".")]
        assert "5.safetensors" not in kept
        assert np.array_equal(pictures(client, drawing({"tiny": node("FluxPokeLoadTinyFlux")})), before)


def test_another_models_layers_are_refused_with_a_sentence(recorded, server, host):
    tensors = {key: tensor + 0.01 for key, tensor in load_file(FOLDER / "flux.safetensors").items()}
    save_file(tensors, host.base / "models" / "diffusion_models" / "other.safetensors")
    graph = drawing(replaced())
    graph["replaced"]["inputs"]["unet_name"] = "other.safetensors"
    with ComfyClient(server.address) as client, pytest.raises(UserError, match="another model"):
        client.run(graph)


def test_one_workflow_retrains_in_one_go_and_another_runs_with_its_layers(server, workflow):
    with ComfyClient(server.address) as client:
        result = client.run(workflow("retrain_layers_tiny"))
        record, plan, train, replace, draw, compare = "7", "8", "9", "10", "14", "19"
        order = [result.executed.index(number) for number in (record, plan, train, replace, draw, compare)]
        assert order == sorted(order)
        retrained, cut_only = (float(value) for value in re.findall(r"PSNR ([\d.]+) dB ·", result.texts[compare]))
        assert retrained > cut_only + 3
        again = client.run(workflow("run_with_replaced_layers_tiny"))
        assert again.outputs["13"]["text"] == ["img512_txt512_single1024"]
        assert f"PSNR {retrained:.2f} dB" in again.texts["10"]
        assert len(again.files("images", "12")) == 4


def test_all_in_one_runs_what_is_chosen_and_nothing_else(server, host, workflow):
    """Each choice draws what the nodes behind it draw by themselves."""
    # under names of its own, since the browser may have made a plan under the workflow's
    graph = json.loads(json.dumps(workflow("flux_poke_all_in_one_tiny")).replace("all_in_one_tiny", "chosen_tiny"))
    numbers = {entry["class_type"]: number for number, entry in graph.items()}
    choice = graph[numbers["FluxPokeChooseModel"]]["inputs"]
    with ComfyClient(server.address) as client:

        def draw(use: str) -> tuple[set[str], np.ndarray]:
            choice["use"] = use
            result = client.run(graph)
            files = result.files("images", numbers["SaveImage"])
            drawn = np.stack([np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in files])
            return {graph[number]["class_type"] for number in result.executed}, drawn

        others = {"FluxPokeRecord", "FluxPokeLoadPrunedFlux", "FluxPokeLoadReplacedFlux"}
        for use in ("pruned", "replaced"):
            with pytest.raises(UserError, match="There is no plan"):
                draw(use)
        ran, normal = draw("normal")
        assert not ran & others
        ran, analysed = draw("analysis")
        assert ran & others == {"FluxPokeRecord"}
        assert np.array_equal(analysed, normal)

        plan = host.output / "flux_poke" / "chosen_tiny_plan.safetensors"
        assert not plan.exists()  # the switches are off
        for title, needed in (("Plan?", set()), ("Retrain?", {"FluxPokeLoadPlan"})):
            (switch,) = (entry["inputs"] for entry in graph.values() if entry["_meta"]["title"] == title)
            switch["on"] = True
            ran, _ = draw("normal")
            assert ran & {*others, "FluxPokeLoadPlan"} == needed  # Record has run
            assert plan.exists()
            switch["on"] = False
        ran, pruned = draw("pruned")
        assert ran & others == {"FluxPokeLoadPrunedFlux"}
        ran, replaced_layers = draw("replaced")
        assert ran & others == {"FluxPokeLoadReplacedFlux"}
        assert 0 < difference(pruned, normal) < 10
        assert 0 < difference(replaced_layers, normal) < 10
        assert not np.array_equal(pruned, replaced_layers)

        del choice["pruned"]
        with pytest.raises(UserError, match="Nothing is connected to 'pruned'"):
            draw("pruned")
