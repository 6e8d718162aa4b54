"""Recording on a real server: what it counts, what it leaves alone, and what it says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
import requests
import torch
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.headless.client import ComfyClient, Interrupted, Result
from flux_poke.recording.internals import Internals
from flux_poke.recording.recording import Recording
from flux_poke.tiny.model import TinyFlux
from PIL import Image

PROMPT = "a handwritten three"


@pytest.fixture
def recording(workflow):
    """The shipped graph, with a recording of its own."""

    def make(name: str, seed: int = 1, **sampler) -> dict:
        graph = workflow("try_it_tiny")
        graph["2"]["inputs"]["name"] = name
        graph["6"]["inputs"] |= {"seed": seed, **sampler}
        return graph

    return make


@pytest.fixture
def without_recording(recording):
    """The same graph with the sampler on the loaded model itself."""

    def make(seed: int, **sampler) -> dict:
        graph = recording("unused", seed, **sampler)
        graph["6"]["inputs"]["model"] = ["1", 0]
        del graph["2"], graph["9"]
        return graph

    return make


def pictures(client: ComfyClient, result: Result) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(client.fetch(file)))) for file in result.files("images", "8")]


def counted_by_hand(seeds: tuple[int, ...], batch: int = 4, steps: int = 20) -> dict[str, torch.Tensor]:
    """Activations above 0 in the runs of these seeds, from the reference transformer, one neuron at a time."""
    tiny = TinyFlux.load()
    counts: dict[str, torch.Tensor] = {}

    def count(name: str, skip: int):
        def hook(module, inputs):
            fired = (inputs[0][..., skip:] > 0).sum((0, 1))
            counts[name] = counts.get(name, 0) + fired

        return hook

    down = {f"double-{stream}-{k}": f"double_blocks.{k}.{stream}_mlp.2" for k in range(2) for stream in ("img", "txt")}
    down |= {f"single-{k}": f"single_blocks.{k}.linear2" for k in range(4)}
    for name, module in down.items():
        tiny.flux.get_submodule(module).register_forward_pre_hook(count(name, 128 if "single" in name else 0))
    context, vector = tiny.words([PROMPT] * batch)
    for seed in seeds:
        x = torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            sigma = torch.full((batch,), 1 - step / steps)
            with torch.no_grad():
                x = x - tiny.flux(x, sigma, context, vector) / steps
    return counts


def test_two_runs_count_what_an_independent_computation_counts(client: ComfyClient, host, recording):
    path = host.recorded("counts")
    client.run(recording("counts", seed=1))
    once = Internals.load(path)
    client.run(recording("counts", seed=2))
    twice = Internals.load(path)

    assert (once.runs, once.steps, twice.runs, twice.steps) == (1, 20, 2, 40)
    expected = counted_by_hand(seeds=(1, 2))
    assert twice.sites.keys() == expected.keys()
    activations = differing = 0
    for name, site in twice.sites.items():
        assert site.tokens == 2 * once.sites[name].tokens
        activations += site.tokens * len(site.fires)
        differing += int((site.fires - expected[name]).abs().sum())
    assert activations == 2 * 20 * 4 * 512 * (2 * 16 + 2 * 8 + 4 * 24)
    assert differing <= activations / 100_000
    assert any(site.fires.any() for site in once.sites.values())


def test_a_recording_knows_its_model_and_its_graph(client: ComfyClient, host, recording):
    client.run(recording("known"), extra={"extra_pnginfo": {"workflow": {"nodes": []}}})
    internals = Internals.load(host.recorded("known"))
    tiny = TinyFlux.load(dtype=torch.float32)
    assert internals.family == "flux1"
    assert internals.fingerprint is not None
    assert internals.fingerprint.matches(Fingerprint.of_tensors(tiny.flux.state_dict()))
    assert json.loads(internals.workflow["prompt"])["2"]["class_type"] == "FluxPokeRecordInternals"
    assert json.loads(internals.workflow["workflow"]) == {"nodes": []}


def test_pictures_are_the_same_with_and_without_recording(client: ComfyClient, recording, without_recording):
    recorded = pictures(client, client.run(recording("same", seed=7)))
    plain = pictures(client, client.run(without_recording(seed=7)))
    assert len(recorded) == len(plain) == 4
    for a, b in zip(recorded, plain, strict=True):
        assert np.array_equal(a, b)
    assert np.std(plain[0]) > 20  # something is drawn


def test_an_interrupted_run_adds_nothing_and_leaves_a_model_that_samples(
    client: ComfyClient, host, recording, without_recording
):
    path = host.recorded("interrupted")
    before = pictures(client, client.run(recording("interrupted", seed=3)))
    content = path.read_bytes()

    prompt_id = client.queue(recording("interrupted", seed=4, steps=3000))
    steps: list[float] = []

    def stop(node: str, step: float, _: float) -> None:
        if node == "6" and step >= 5 and not steps:
            steps.append(step)
            client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, stop)
    assert steps
    assert steps[0] < 3000
    assert path.read_bytes() == content
    after = pictures(client, client.run(without_recording(seed=3)))
    assert np.array_equal(before[0], after[0])
    client.run(recording("interrupted", seed=5))
    assert Internals.load(path).runs == 2


def test_only_the_positive_rows_count_on_request(client: ComfyClient, host, recording):
    both, positive = recording("both", cfg=2.0), recording("positive", cfg=2.0)
    positive["2"]["inputs"]["positive_only"] = True
    client.run(both)
    client.run(positive)
    all_rows = Internals.load(host.recorded("both")).sites["double-img-0"]
    half = Internals.load(host.recorded("positive")).sites["double-img-0"]
    assert all_rows.tokens == 2 * half.tokens == 2 * 20 * 4 * 16
    assert 0 < half.fires.sum() < all_rows.fires.sum()


def test_the_report_is_drawn_after_the_sampler_and_shows_the_table(client: ComfyClient, recording):
    graph = recording("reported")
    graph["20"] = {"class_type": "PreviewAny", "inputs": {"source": ["9", 1]}}
    result = client.run(graph)
    assert result.executed.index("9") > result.executed.index("6")
    assert "1 run," in result.texts["9"]
    assert "double-txt-1" in result.outputs["20"]["text"][0]
    (picture,) = result.files("images", "9")
    assert Image.open(io.BytesIO(client.fetch(picture))).size[0] > 800


def test_clip_works_with_fluxs_own_text_node(client: ComfyClient, without_recording):
    graph = without_recording(seed=7)
    plain = pictures(client, client.run(graph))
    graph["3"] = {
        "class_type": "CLIPTextEncodeFlux",
        "inputs": {"clip": ["1", 1], "clip_l": PROMPT, "t5xxl": PROMPT, "guidance": 3.5},
    }
    assert np.array_equal(pictures(client, client.run(graph))[0], plain[0])
    graph["3"]["inputs"]["t5xxl"] = "an (eight:1.1)"
    assert not np.array_equal(pictures(client, client.run(graph))[0], plain[0])


def spoil(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("damaged", lambda content: b"\xff" * 100, "cannot be read as safetensors"),
        ("truncated", spoil, "cannot be read as safetensors"),
        ("empty", lambda content: b"", "cannot be read as safetensors"),
    ],
)
def test_a_file_that_cannot_be_added_to_is_named_before_sampling(
    client: ComfyClient, host, name: str, make: Callable[[bytes], bytes], sentence: str, recording
):
    client.run(recording("whole"))
    path = host.recorded(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make(host.recorded("whole").read_bytes()))
    content = path.read_bytes()
    with pytest.raises(UserError, match=sentence) as error:
        client.run(recording(name))
    assert name in str(error.value)
    assert "FluxPokeRecordInternals" in str(error.value)
    assert path.read_bytes() == content


def test_a_read_only_file_is_left_as_it_is(client: ComfyClient, host, recording):
    client.run(recording("locked"))
    path = host.recorded("locked")
    path.chmod(0o444)
    content = path.read_bytes()
    with pytest.raises(UserError, match="read-only"):
        client.run(recording("locked", seed=2))
    assert path.read_bytes() == content


def test_another_models_recording_is_refused(client: ComfyClient, host, recording):
    client.run(recording("mine"))
    path = host.recorded("mine")
    internals = Internals.load(path)
    tuned = {key: tensor * 1.01 for key, tensor in TinyFlux.load().flux.state_dict().items()}
    other = Internals.new("flux1", Fingerprint.of_tensors(tuned), internals.sites, steps=20)
    other.save(path)
    content = path.read_bytes()
    with pytest.raises(UserError, match="another model"):
        client.run(recording("mine", seed=2))
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "name",
    ["../outside", "/tmp/outside", "a/../../outside", "", "..", ".hidden", "nul\0", "li\nne", "x" * 300, "a/" * 600 + "a"],
    ids=["up", "absolute", "in and up", "empty", "dots", "hidden", "NUL", "newline", "long", "deep"],
)
def test_a_name_that_is_not_one_in_the_output_folder_is_refused(client: ComfyClient, name: str, recording):
    with pytest.raises(UserError, match=r"is not a name inside|found NUL"):
        client.run(recording(name))


def test_a_report_of_what_is_not_recorded_yet_says_what_to_do(client: ComfyClient, recording):
    graph = recording("not yet")
    del graph["9"]["inputs"]["after"], graph["6"], graph["7"], graph["8"], graph["10"]
    with pytest.raises(UserError, match=r"Nothing is recorded in 'not yet' yet.* or Record Internals for plans by count"):
        client.run(graph)


def test_a_recording_that_is_there_is_in_the_list_and_goes_on_from_its_node(client: ComfyClient, server, host, recording):
    client.run(recording("portraits/one"))
    listed = requests.get(f"http://{server.address}/object_info/FluxPokeLoadRecording", timeout=60).json()
    options = listed["FluxPokeLoadRecording"]["input"]["required"]["name"]
    assert "portraits/one" in (options[1]["options"] if options[0] == "COMBO" else options[0])
    graph = recording("unused", seed=2)
    graph["20"] = {"class_type": "FluxPokeLoadRecording", "inputs": {"name": "portraits/one"}}
    graph["2"]["inputs"]["recording"] = ["20", 0]
    assert "portraits/one: 2 runs, 40 model calls" in client.run(graph).texts["2"]
    assert not host.recorded("unused").exists()


@pytest.mark.parametrize("second", ["FluxPokeRecordInternals", "FluxPokeRecord"])
def test_two_nodes_that_would_count_every_run_twice_are_refused(client: ComfyClient, recording, second: str):
    graph = recording("twice")
    inputs = {"model": ["2", 0], "recording": ["2", 1], "name": "", "ignore_padding": True, "positive_only": False}
    if second == "FluxPokeRecord":
        inputs = {"model": ["2", 0], "name": "twice", "rows": 8, "steps": 0, "max_gb": 1.0, "probe_steps": 0}
    graph["20"] = {"class_type": second, "inputs": inputs}
    graph["6"]["inputs"]["model"] = ["20", 0]
    with pytest.raises(UserError, match=r"recorded to twice already \(internals\), and every run would count twice"):
        client.run(graph)


def test_one_node_records_all_that_pruning_needs_in_one_run(client: ComfyClient, host, recording):
    graph = recording("whole run")
    graph["2"] = {
        "class_type": "FluxPokeRecord",
        "inputs": {"model": ["1", 0], "name": "whole run", "rows": 8, "steps": 2, "max_gb": 1.0, "probe_steps": 1},
    }
    result = client.run(graph)
    assert Recording.open(host.recorded("whole run").parent).kinds == {"internals", "rows", "amplification"}
    lines = result.texts["2"].splitlines()
    assert lines[0] == "whole run: 1 run, 20 model calls"
    assert lines[1].startswith("4 images, ")
    assert lines[2] == "64 of 640 rows recorded of each MLP"


def test_where_no_step_lies_in_the_range_that_is_said(client: ComfyClient, recording):
    graph = recording("between")
    graph["2"] = {
        "class_type": "FluxPokeRecord",
        "inputs": {
            "model": ["1", 0], "name": "between", "rows": 8, "steps": 2, "max_gb": 1.0, "probe_steps": 0, "options": ["20", 0],
        },
    }  # fmt: skip
    graph["20"] = {
        "class_type": "FluxPokeRecordOptions",
        "inputs": {
            "streams": "all", "sigma_from": 0.001, "sigma_to": 0.002, "when_full": "thin", "ignore_padding": True,
            "positive_only": False, "sample_seed": 0,
        },
    }  # fmt: skip
    assert "No step of this run has a noise level from 0.001 to 0.002" in client.run(graph).texts["2"]


def test_prompts_and_counter_go_on_from_run_to_run(client: ComfyClient, host):
    (host.base / "input" / "mine.txt").write_text("red one\n\nblue two\nred three\n")
    graph: dict[str, dict] = {
        "1": {"class_type": "FluxPokePrompts", "inputs": {"file": "mine.txt", "index": 3, "regex": "red"}},
        "2": {"class_type": "FluxPokeCounter", "inputs": {"name": "mine", "max": 2, "restart": False}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    results = [client.run(graph) for _ in range(3)]
    assert results[0].outputs["3"]["text"] == ["red three"]
    assert [result.outputs["4"]["text"] for result in results] == [["0"], ["1"], ["0"]]
    graph["1"]["inputs"]["regex"] = "green"
    with pytest.raises(UserError, match="matches the regular expression 'green'"):
        client.run(graph)
