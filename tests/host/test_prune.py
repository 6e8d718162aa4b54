"""Planning, cutting, repairing, saving and loading on a real server, with the tiny FLUX."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_poke.errors import UserError
from flux_poke.flux.model import Flux
from flux_poke.headless.client import ComfyClient, Interrupted
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.plan import PruningPlan
from flux_poke.tiny.model import FOLDER, TinyFlux
from PIL import Image
from safetensors.torch import load_file, save_file

TINY = "tiny FLUX (ships with the pack)"
RECORDED = "pruned"
ALL_LAYERS = {"first_layer": 0, "last_layer": -1, "first_single": 0, "last_single": -1}
PROMPTS = ("a three", "the digit 8", "number five", "a handwritten one")


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def recording(name: str = RECORDED) -> dict:
    return {"recording": node("FluxPokeLoadRecording", name=name)}


def record(name: str = RECORDED, **options) -> dict:
    """The tiny FLUX, recorded."""
    given = {"name": name, "rows": 24, "steps": 10, "max_gb": 1.0, "probe_steps": 4}
    return {"tiny": node("FluxPokeLoadTinyFlux"), "record": node("FluxPokeRecord", model=["tiny", 0], **{**given, **options})}


def drawing(model: dict, seed: int = 1, prompt: str = PROMPTS[0], steps: int = 20, batch: int = 4) -> dict:
    """A graph that draws with what the nodes in `model` load; the last of them gives the MODEL."""
    source = list(model)[-1]
    return {
        **recording(),  # does nothing where nobody asks it
        "clip": node("FluxPokeLoadTinyFlux"),
        **model,
        "text": node("CLIPTextEncode", clip=["clip", 1], text=prompt),
        "none": node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=batch),
        "sample": node(
            "KSampler", model=[source, 0], positive=["text", 0], negative=["none", 0], latent_image=["empty", 0], seed=seed,
            steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["clip", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="flux_poke/pruned"),
    }  # fmt: skip


def pictures(client: ComfyClient, graph: dict) -> np.ndarray:
    files = client.run(graph).files("images", "save")
    return np.stack([np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in files])


@pytest.fixture(scope="module")
def recorded(server, host) -> Path:
    """Internals, rows and amplifications of the tiny FLUX, recorded on the server; output/flux_poke."""
    with ComfyClient(server.address) as client:
        for number, prompt in enumerate(PROMPTS):
            client.run(drawing(record(), seed=number, prompt=prompt, batch=8))
    return host.output / "flux_poke"


def by_count(score: str = "fluctuation", cut: int = 128, **options) -> dict:
    inputs = {"unet_name": TINY, "img_cut": cut, "txt_cut": cut, "single_cut": cut, "score": score, "save_as": "plan"}
    return node("FluxPokePlanByCount", **{"recording": ["recording", 0], **inputs, **ALL_LAYERS, **options})


def by_budget(amount: float = 0.25, **options) -> dict:
    inputs = {
        "unet_name": TINY,
        "budget": "share of the neurons",
        "amount": amount,
        "touch": "both",
        "precision": "stored",
        "protect": "",
    }
    return node("FluxPokePlanByBudget", **{"recording": ["recording", 0], **inputs, "save_as": "budget", **options})


def load(plan: str = "plan", repair: str = "affine", weight_dtype: str = "default") -> dict:
    return node("FluxPokeLoadPrunedFlux", plan=[plan, 0], repair=repair, weight_dtype=weight_dtype)


def save(name: str, source: str = "plan", repair: str = "affine", fold: bool = False, precision: str = "as planned") -> dict:
    return node(
        "FluxPokeSavePrunedFlux", plan_or_model=[source, 0], repair=repair, save_as=name, fold=fold, precision=precision
    )


def load_plan(file: str = "plan", **options) -> dict:
    return node("FluxPokeLoadPlan", file=file, **{"unet_name": "as in the plan", **options})


def dense() -> dict:
    return {"tiny": node("FluxPokeLoadTinyFlux")}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_every_kind_of_plan_draws_nearly_what_the_dense_model_draws(client: ComfyClient, recorded: Path):
    expected = pictures(client, drawing(dense()))
    threshold = node(
        "FluxPokePlanByThreshold", unet_name=TINY, img_threshold=0.2, txt_threshold=0.1, single_threshold=0.2, on="rate",
        save_as="threshold", recording=["recording", 0], **ALL_LAYERS,
    )  # fmt: skip
    cut_blindly = difference(expected, pictures(client, drawing({"plan": by_count("frequency"), "load": load(repair="none")})))
    for plan in (by_count("obs"), threshold, by_budget()):
        found = pictures(client, drawing({"plan": plan, "load": load()}))
        assert difference(expected, found) < cut_blindly / 3
    assert np.array_equal(expected, pictures(client, drawing(dense())))  # the dense graph beside it is as it was


def test_the_host_draws_what_the_reference_transformer_draws_with_the_same_cut(client: ComfyClient, recorded: Path):
    found = pictures(client, drawing({"plan": by_budget(), "save pruned": save("saved"), "load": load()}))
    pruned = Pruned.open(recorded.parents[1] / "models" / "diffusion_models" / "saved.safetensors")
    tiny = TinyFlux.load()
    tiny.flux = Flux.load(pruned.tensors, torch.float32)
    noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    images = tiny.autoencoder.decode(tiny.sample([PROMPTS[0]] * 4, noise)).permute(0, 2, 3, 1).numpy() * 255
    assert difference(found, images) < 1.0


def test_a_plan_that_was_saved_cuts_the_same_without_planning_again(client: ComfyClient, recorded: Path):
    planned = pictures(client, drawing({"plan": by_count(cut=100), "load": load(repair="none")}))
    read = {"plan": load_plan(), "load": load(repair="none")}
    assert np.array_equal(planned, pictures(client, drawing(read)))
    assert "load" not in client.run(drawing(read)).executed  # whereas a node that plans does so on every run
    with pytest.raises(UserError, match=r"There is no plan .*nowhere\.safetensors: make one"):
        client.run({"plan": load_plan("nowhere"), "show": node("PreviewAny", source=["plan", 1])})


def test_the_masked_count_says_how_many_neurons_go(client: ComfyClient, recorded: Path):
    graph = recording() | {"plan": by_count(cut=100, last_layer=0, last_single=1), "load": load(repair="bias")}
    graph["show"] = node("PreviewAny", source=["load", 1])
    assert client.run(graph).outputs["show"]["text"] == ["img100_txt100_single200"]
    plan = PruningPlan.load(recorded / "plan.safetensors")
    assert plan.cut == {"double-img-0": 100, "double-txt-0": 100, "single-0": 100, "single-1": 100}


def test_a_saved_model_draws_the_same_after_a_restart_with_nothing_else_at_hand(
    client: ComfyClient, host, recorded: Path, tmp_path: Path
):
    expected = pictures(client, drawing({"plan": by_budget(), "save pruned": save("alone"), "load": load()}))
    alone = {"load": node("FluxPokeLoadPrunedCheckpoint", unet_name="alone.safetensors", weight_dtype="default")}
    with host.start("--output-directory", str(tmp_path)) as other, ComfyClient(other.address) as fresh:
        assert np.array_equal(expected, pictures(fresh, drawing(alone)))


def test_a_name_with_a_folder_is_what_the_loader_calls_the_file(client: ComfyClient, recorded: Path):
    graph = recording() | {"plan": by_count(), "save": save("small/half", repair="none")}
    graph["show"] = node("PreviewAny", source=["save", 0])
    (name,) = client.run(graph).outputs["show"]["text"]
    assert name == os.path.join("small", "half.safetensors")
    client.run(drawing({"load": node("FluxPokeLoadPrunedCheckpoint", unet_name=name, weight_dtype="default")}, steps=1))


def test_a_plan_and_its_model_are_made_again_only_when_there_is_something_new(client: ComfyClient, host):
    """Recorded and drawn in one graph, with two samplers; then from the recording alone."""
    recorded = record("grows", probe_steps=1)

    def ran(graph: dict) -> set[str]:
        return {"plan", "load"} & set(client.run(graph).executed)

    def both(first: int, second: int, **options) -> dict:
        graph = drawing(recorded, seed=first, batch=8)
        graph["before"] = graph.pop("sample")
        del graph["decode"], graph["save"]
        plan = by_count("obs", **{"recording": ["record", 1], **options})
        return {**graph, **drawing({"plan": plan, "load": load()}, seed=second, steps=1)}

    for seed in range(3):
        client.run(drawing(recorded, seed=seed, prompt=PROMPTS[seed], batch=8))
    waits = {"after": ["before", 0]}
    assert ran(both(3, 1, **waits)) == {"plan", "load"}
    assert ran(both(3, 2, **waits)) == set()
    assert ran(both(4, 2, **waits)) == {"plan", "load"}
    assert ran(both(4, 3)) == {"plan", "load"}
    assert ran(both(4, 4)) == {"plan", "load"}, "without `after` it is not known whether more was recorded"

    def alone(seed: int) -> dict:
        return drawing({"plan": by_count("obs"), "load": load()}, seed=seed, steps=1) | recording("grows")

    assert ran(alone(1)) == {"plan", "load"}
    assert ran(alone(2)) == set()
    client.run(drawing(recorded, seed=9, batch=8))
    assert ran(alone(3)) == {"plan", "load"}


def test_cancel_stops_a_ranking_and_the_next_run_goes_on_from_there(client: ComfyClient, recorded: Path):
    copy = Path(shutil.copytree(recorded / RECORDED, recorded / "cancelled", ignore=shutil.ignore_patterns(".cache")))
    plan = recording("cancelled") | {"plan": by_count("obs")}
    prompt_id = client.queue(plan)

    def rankings() -> list[Path]:
        return list((copy / ".cache" / "rankings").rglob("*.safetensors"))

    def stop(node: str, step: float, _: float) -> None:
        if node == "plan" and step >= 2:
            client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, stop)
    times = {path: path.stat().st_mtime_ns for path in rankings()}
    assert 1 <= len(times) < 8
    client.run(plan)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(rankings()) == 8


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_fp8_weights_draw_nearly_the_same(client: ComfyClient, recorded: Path, weight_dtype: str):
    wide = pictures(client, drawing({"plan": by_budget(), "load": load()}))
    narrow = pictures(client, drawing({"plan": by_budget(), "load": load(weight_dtype=weight_dtype)}))
    assert 0 < difference(wide, narrow) < 60


@pytest.mark.parametrize(
    ("plan", "saved"),
    [(by_count("obs", 64), False), (by_budget(0.45, budget="share of all parameters"), False),
     (by_budget(0.45, budget="share of all parameters"), True)],
    ids=["by count", "with modulation", "with modulation, from a file"],
)  # fmt: skip
def test_a_lora_of_the_dense_model_acts_on_the_pruned_one(client: ComfyClient, host, recorded: Path, plan: dict, saved: bool):
    generator = torch.Generator().manual_seed(0)
    lora: dict[str, torch.Tensor] = {}
    modules = {"double_blocks.1.img_mlp.2": (128, 512), "single_blocks.0.linear1": (896, 128)}
    if plan["class_type"] == "FluxPokePlanByBudget":
        modules |= {"double_blocks.0.img_mod.lin": (768, 128), "single_blocks.1.modulation.lin": (384, 128)}
    for name, (outputs, inputs) in modules.items():
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator) * 0.2
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, inputs, generator=generator) * 0.2
    save_file(lora, host.base / "models" / "loras" / "style.safetensors")
    expected = pictures(client, drawing({**dense(), "lora": node(
        "LoraLoaderModelOnly", model=["tiny", 0], lora_name="style.safetensors", strength_model=1.0
    )}))  # fmt: skip
    loaded = {"plan": plan, "load": load()}
    plain = pictures(client, drawing(loaded))
    if saved:
        client.run(recording() | {"plan": plan, "save pruned": save("folded", fold=True)})
        loaded = {"load": node("FluxPokeLoadPrunedCheckpoint", unet_name="folded.safetensors", weight_dtype="default")}
    fitted = node("FluxPokeLoadPrunedLora", model=["load", 0], lora_name="style.safetensors", strength=1.0)
    graph = drawing({**loaded, "lora": fitted})
    result = client.run(graph)
    assert f"{len(modules)} converted" in result.texts["lora"]
    found = pictures(client, graph)
    assert difference(expected, plain) > 5
    assert difference(expected, found) < difference(expected, plain) / 2


def test_the_plan_shows_its_table_and_its_picture_before_anything_is_cut(client: ComfyClient, recorded: Path):
    result = client.run(recording() | {"plan": by_budget(0.5)})
    assert "predicted relative velocity error" in result.texts["plan"]
    (picture,) = result.files("images", "plan")
    assert Image.open(io.BytesIO(client.fetch(picture))).size[0] >= 600


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (by_count("obs", cut=512), "cut 0 to 511"),
        (by_count("obs", last_layer=7), "blocks are 0 to 1"),
        (by_budget(amount=0.999), "may go"),
        (by_budget(amount=1.0), "between 0 and 1, both excluded"),
        (by_budget(amount=0.0), "between 0 and 1, both excluded"),
        (by_budget(protect="double-18"), "no MLP called"),
        (by_count("obs", cut=0), "Nothing would be cut"),
    ],
    ids=["all neurons", "layers", "budget", "all", "none", "protect", "nothing"],
)
def test_what_cannot_be_planned_is_said_in_a_sentence_before_neurons_are_ranked(
    client: ComfyClient, recorded: Path, plan: dict, sentence: str
):
    bare = recorded / "unranked"
    shutil.copytree(recorded / RECORDED, bare, ignore=shutil.ignore_patterns(".cache"), dirs_exist_ok=True)
    with pytest.raises(UserError, match=sentence):
        client.run(recording("unranked") | {"plan": plan})
    assert not (bare / ".cache").exists()


def test_too_few_rows_say_how_many_are_needed(client: ComfyClient, recorded: Path):
    client.run(drawing(record("few", rows=2, steps=1, probe_steps=0)))
    with pytest.raises(UserError, match=r"holds 8 rows of single-0, too few .* at least 640 are needed"):
        client.run(recording("few") | {"plan": by_count("obs")})


def test_a_recording_without_rows_is_named_where_rows_are_needed(client: ComfyClient, recorded: Path):
    counted = {
        "tiny": node("FluxPokeLoadTinyFlux"),
        "count": node("FluxPokeRecordInternals", model=["tiny", 0], name="counted", ignore_padding=True, positive_only=False),
    }
    client.run(drawing(counted))
    with pytest.raises(UserError, match="counted"):
        client.run(recording("counted") | {"plan": by_count("obs")})


@pytest.fixture
def tuned(host) -> str:
    """Another model of the same shape, in models/diffusion_models."""
    tensors = {key: tensor * 1.01 for key, tensor in load_file(FOLDER / "flux.safetensors").items()}
    save_file(tensors, host.base / "models" / "diffusion_models" / "tuned.safetensors")
    return "tuned.safetensors"


def test_a_plan_for_another_model_is_refused(client: ComfyClient, recorded: Path, tuned: str):
    client.run(recording() | {"plan": by_count()})
    graph = {"plan": load_plan(unet_name=tuned), "load": load(repair="none")}
    graph["show"] = node("PreviewAny", source=["load", 1])
    with pytest.raises(UserError, match="plan was made for another model"):
        client.run(graph)
    with pytest.raises(UserError, match="recorded on another model"):
        client.run(recording() | {"plan": by_count(unet_name=tuned)})


def test_a_plan_is_loaded_where_its_files_are_now(client: ComfyClient, host, recorded: Path):
    models = host.base / "models" / "diffusion_models"
    shutil.copy(FOLDER / "flux.safetensors", models / "moves.safetensors")
    shutil.copytree(recorded / RECORDED, recorded / "moves")
    graph = recording("moves") | {"plan": by_count("obs", unet_name="moves.safetensors", save_as="moved plan")}
    expected = pictures(client, drawing(graph | {"load": load()}))
    (models / "moves.safetensors").rename(models / "moved.safetensors")
    (recorded / "moves").rename(recorded / "moved")
    alone = {"plan": load_plan("moved plan"), "load": load()}
    with pytest.raises(UserError, match=r"moves\.safetensors is not there"):
        client.run(drawing(alone))
    alone["plan"] = load_plan("moved plan", unet_name="moved.safetensors")
    with pytest.raises(UserError, match="moves is not there"):
        client.run(drawing(alone))
    alone = recording("moved") | alone
    alone["plan"] = load_plan("moved plan", unet_name="moved.safetensors", recording=["recording", 0])
    assert np.array_equal(expected, pictures(client, drawing(alone) | recording("moved")))


def test_loaders_show_a_fact_a_line(client: ComfyClient, recorded: Path):
    graph = drawing({"plan": by_count(), "save pruned": save("totals", repair="none"), "load": load(repair="bias")}, steps=1)
    result = client.run(graph)
    read = client.run(
        {
            "plan": load_plan(),
            "alone": node("FluxPokeLoadPrunedCheckpoint", unet_name="totals.safetensors", weight_dtype="default"),
            "show": node("PreviewAny", source=["alone", 1]),
            "text": node("PreviewAny", source=["plan", 1]),
        }
    )
    for text in (result.texts["load"], read.texts["plan"], read.texts["alone"]):
        assert re.fullmatch(r"by count, .*: 3,072 of 4,096 neurons kept \(75.0%\)", text.strip())
    said = result.texts["save pruned"].splitlines()
    assert re.fullmatch(r"totals.safetensors: 4.62 MB -> 4\.\d+ MB", said[0])
    assert said[1] == read.texts["alone"].strip()
    assert said[2].startswith("Opens in Flux Poke's Load Pruned Checkpoint")
    assert len(read.outputs["text"]["text"][0].splitlines()) == 8 + 2


def test_what_a_plan_predicted_stands_beside_what_was_measured_after_the_cut(client: ComfyClient, recorded: Path):
    """The measured error is that of a file's header, in a node that cut and in one that reads the file."""
    plan = by_budget(0.45, budget="share of all parameters", save_as="measured")
    graph = {"plan": plan, "load": load(), "save pruned": save("measured"), "show": node("PreviewAny", source=["load", 1])}
    bare = {"bare": load(repair="none"), "shown": node("PreviewAny", source=["bare", 1])}
    alone = {
        "alone": node("FluxPokeLoadPrunedCheckpoint", unet_name="measured.safetensors", weight_dtype="default"),
        "shown": node("PreviewAny", source=["alone", 1]),
    }
    texts = {**client.run(recording() | graph | bare).texts, **client.run(alone).texts}
    predicted = re.search(r"^predicted relative velocity error (\S+)$", texts["plan"], re.MULTILINE)
    assert predicted
    for name in ("load", "save pruned", "alone"):
        assert predicted[0] in texts[name].splitlines()
        measured = re.search(
            r"^measured relative velocity error (\S+), after the cut, by the rows of", texts[name], re.MULTILINE
        )
        assert measured
        assert 1 / 2 < float(measured[1]) / float(predicted[1]) < 2
    assert "The prediction is for affine repair: without it, the error is larger" in texts["bare"].splitlines()


def test_a_pruned_model_is_saved_as_it_is_with_its_lora_and_draws_the_same(client: ComfyClient, host, recorded: Path):
    lora = {}
    for name, outputs in {"double_blocks.1.img_mlp.0": 512, "double_blocks.1.img_mod.lin": 768}.items():
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(outputs, 4) * 0.2
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, 128) * 0.2
    save_file(lora, host.base / "models" / "loras" / "merged.safetensors")
    plan = by_budget(0.45, budget="share of all parameters")
    styled = {
        "plan": plan, "load": load(),
        "lora": node("FluxPokeLoadPrunedLora", model=["load", 0], lora_name="merged.safetensors", strength=1.0),
    }  # fmt: skip
    plain = pictures(client, drawing({"plan": plan, "load": load()}))
    expected = pictures(client, drawing(styled) | {"save model": save("merged", "lora")})
    assert difference(expected, plain) > 1
    alone = {"load": node("FluxPokeLoadPrunedCheckpoint", unet_name="merged.safetensors", weight_dtype="default")}
    assert difference(expected, pictures(client, drawing(alone))) < 0.1
    assert Pruned.open(host.base / "models" / "diffusion_models" / "merged.safetensors").plan.ranks


def test_a_model_that_is_not_pruned_is_not_saved(client: ComfyClient, recorded: Path):
    with pytest.raises(UserError, match="was not pruned by Flux Poke"):
        client.run(dense() | {"save": save("dense", "tiny")})


@pytest.mark.parametrize("kind", ["ModelSave", "CheckpointSave"])
def test_what_the_hosts_own_nodes_save_of_a_pruned_model_is_refused_with_what_to_do(client: ComfyClient, host, kind: str):
    graph = drawing({"plan": by_count(), "load": load(repair="none")}, steps=1)
    inputs = {"model": ["load", 0], "filename_prefix": kind}
    if kind == "CheckpointSave":
        inputs |= {"clip": ["clip", 1], "vae": ["clip", 2]}
    client.run(graph | {"keep": node(kind, **inputs)})
    (file,) = host.output.glob(f"{kind}_*.safetensors")
    shutil.copy(file, host.base / "models" / "diffusion_models" / f"{kind}.safetensors")
    alone = {"load": node("FluxPokeLoadPrunedCheckpoint", unet_name=f"{kind}.safetensors", weight_dtype="default")}
    with pytest.raises(UserError, match="Save Pruned FLUX"):
        client.run(drawing(alone))
    with pytest.raises(UserError, match="recorded on another model"):
        client.run(recording() | {"plan": by_count(unet_name=f"{kind}.safetensors")})


def test_a_model_that_is_no_flux_is_refused(client: ComfyClient, host, recorded: Path):
    save_file({"conv_in.weight": torch.zeros(4, 4)}, host.base / "models" / "diffusion_models" / "other.safetensors")
    with pytest.raises(UserError, match="not a FLUX checkpoint"):
        client.run(recording() | {"plan": by_count(unet_name="other.safetensors")})


def test_the_shipped_workflow_prunes_in_one_go(client: ComfyClient, host, workflow):
    result = client.run(workflow("prune_and_compare_tiny"))
    order = [result.executed.index(number) for number in ("6", "7", "8", "11", "14")]  # record, plan, load, draw, compare
    assert order == sorted(order)
    plan = PruningPlan.load(host.output / "flux_poke" / "prune_tiny_plan.safetensors")
    assert plan.neurons == (2048, 4096)
    assert plan.velocity_error is not None
    first, compared = result.texts["14"].splitlines()[:2]
    assert re.fullmatch(r"[\d.]+ -> [\d.]+ MB in memory, PSNR [\d.]+ dB, [\d.]+ -> [\d.]+ s a step", first)
    assert float(re.findall(r"PSNR ([\d.]+) dB", compared)[0]) > 30
