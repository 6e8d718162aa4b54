"""Graphs from files, inputs set by name, and one run for each prompt; running them is tested on real servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flux_poke.errors import WrongArguments
from flux_poke.headless.queue import marked, recording_names
from flux_poke.headless.runs import make_runs, parse_setting, prompt_places, read_graph
from flux_poke.headless.workflow import WORKFLOWS
from flux_poke.recording.queued import MARK, QueuedRun
from shipped import CANVAS

#: Workflows that draw different prompts on purpose, or ask for none.
DIFFERENT = {
    "prune_and_compare.json", "retrain_layers.json", "flux_timer_tiny.json", "klein_image_to_image_tiny.json",
    "find_and_poke.json",
}  # fmt: skip


@pytest.fixture
def tiny():
    return read_graph(WORKFLOWS / "try_it_tiny.json")


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_in_every_shipped_workflow_the_prompts_place_is_found_or_asked_for(path):
    graph = read_graph(path)
    if path.name in DIFFERENT:
        with pytest.raises(WrongArguments, match=r"draw different prompts: say where it goes with --set"):
            prompt_places(graph)
        return
    (place,) = prompt_places(graph)
    assert graph[place[0]]["class_type"] == "CLIPTextEncode"
    assert place[1] == "text"


def test_one_run_is_made_for_each_prompt_and_seeds_count_with_it(tiny):
    runs = make_runs(tiny, ["KSampler.steps=7", "5.batch_size=1"], ["a", "b", "c", "d"], start=1, count=2)
    assert [(run.number, run.prompt) for run in runs] == [(1, "b"), (2, "c")]
    assert [run.graph["3"]["inputs"]["text"] for run in runs] == ["b", "c"]
    assert [run.graph["6"]["inputs"]["seed"] for run in runs] == [24, 25]
    assert {(run.graph["6"]["inputs"]["steps"], run.graph["5"]["inputs"]["batch_size"]) for run in runs} == {(7, 1)}
    assert tiny["6"]["inputs"]["steps"] == 20, "the graph that came in stays"


def test_a_seed_that_is_set_stays_and_equal_prompts_are_runs_of_their_own(tiny):
    runs = make_runs(tiny, ["6.seed=5"], ["a", "a", "b"])
    assert {run.graph["6"]["inputs"]["seed"] for run in runs} == {5}
    assert len({run.key for run in runs}) == 3


def test_a_run_has_the_same_key_whatever_else_is_queued(tiny):
    texts = ["a", "b", "c", "d"]
    assert [run.key for run in make_runs(tiny, (), texts)][2] == make_runs(tiny, (), texts, start=2)[0].key
    assert len({run.key for run in make_runs(tiny, (), texts)}) == 4


def test_a_place_for_the_prompt_may_be_said(tiny):
    (run,) = make_runs(tiny, ["Prompt: a digit.text=a large {prompt}"], ["seven"])
    assert run.graph["3"]["inputs"]["text"] == "a large seven"


def test_without_prompts_there_is_one_run_or_as_many_seeds_as_asked_for(tiny):
    assert [run.graph["6"]["inputs"]["seed"] for run in make_runs(tiny)] == [23]
    assert [run.graph["6"]["inputs"]["seed"] for run in make_runs(tiny, count=3)] == [23, 24, 25]
    with pytest.raises(WrongArguments, match="2 runs would all draw the same"):
        make_runs(tiny, ["6.seed=1"], count=2)


@pytest.mark.parametrize(
    ("setting", "node", "value"),
    [
        ("KSampler.cfg=3", "6", 3.0),
        ("6.denoise=0.5", "6", 0.5),
        ("6.sampler_name=heun", "6", "heun"),
        ("Record Internals.ignore_padding=False", "2", False),
        ("FluxPokeRecordInternals.name=other=one", "2", "other=one"),
        ("4 times as large.scale_by=2", "10", 2.0),
        ("6.model=from elsewhere", "6", "from elsewhere"),
    ],
)
def test_an_input_is_set_by_id_title_or_class_to_a_value_of_its_type(tiny, setting, node, value):
    (found, _), given = parse_setting(tiny, setting)
    assert (found, given, type(given)) == (node, value, type(value))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("steps=8", "expected NODE.INPUT=VALUE"),
        ("6.steps", "expected NODE.INPUT=VALUE"),
        ("6.stepps=8", "6 has no such input. Its inputs: model, positive"),
        ("Sampler.steps=8", r"no node has the id or the title Sampler. Nodes: 1 \(Load Tiny FLUX\)"),
        ("6.steps=8.5", "expected a whole number, as 20 is in the workflow; found '8.5'"),
        ("6.steps=", "expected a whole number"),
        ("6.cfg=high", "expected a number"),
        ("2.ignore_padding=1", "expected true or false"),
    ],
)
def test_a_setting_that_fits_nothing_is_refused(tiny, setting, sentence):
    with pytest.raises(WrongArguments, match=sentence):
        parse_setting(tiny, setting)


def test_a_title_that_several_nodes_have_is_refused_with_their_ids(tiny):
    tiny["60"] = tiny["6"]
    with pytest.raises(WrongArguments, match="2 nodes are called KSampler; say which by its id: 6, 60"):
        parse_setting(tiny, "KSampler.steps=8")


@pytest.mark.parametrize(
    ("settings", "prompts", "start", "sentence"),
    [
        (["3.text={prompt}"], None, 0, "give --prompts"),
        ([], ["a", "b"], 2, "--start 2 is behind the last one"),
    ],
)
def test_prompts_that_are_missing_are_told_of(tiny, settings, prompts, start, sentence):
    with pytest.raises(WrongArguments, match=sentence):
        make_runs(tiny, settings, prompts, start)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is not there"),
        ("{", "is not JSON"),
        ("[]", "is not a workflow in API form"),
        ("{}", "is not a workflow in API form"),
        ('{"1": {"class_type": "A"}}', "is not a workflow in API form"),
        ('{"nodes": [], "links": []}', "is a workflow as the canvas keeps it"),
        (b"\xff\xfe{", "is not JSON"),
    ],
)
def test_a_file_that_is_no_graph_is_named_with_what_to_do(tmp_path, content, sentence):
    path = tmp_path / "graph.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WrongArguments, match=rf"graph\.json {sentence}"):
        read_graph(path)


def test_the_canvas_file_of_a_shipped_workflow_is_told_apart(tmp_path):
    with pytest.raises(WrongArguments, match=r"Export \(API\)"):
        read_graph(CANVAS["try_it_tiny"])


def test_a_graph_as_it_is_sent_is_taken_too(tiny, tmp_path):
    (tmp_path / "sent.json").write_text(json.dumps({"prompt": tiny, "client_id": "x"}))
    assert read_graph(Path(tmp_path / "sent.json")) == tiny


def test_nodes_that_count_are_told_which_run_it_is_and_others_are_not(tiny):
    run = QueuedRun("q-1", "attempt", ("earlier",))
    graph = marked(tiny, run)
    assert QueuedRun.from_json(graph["2"]["inputs"][MARK]) == run
    assert {node for node in graph if graph[node] != tiny[node]} == {"2"}


def test_recordings_are_known_by_name_also_through_a_link(tiny):
    tiny["20"] = {"class_type": "FluxPokeLoadRecording", "inputs": {"name": "earlier"}}
    tiny["21"] = {"class_type": "FluxPokeRecord", "inputs": {"name": "not asked", "recording": ["20", 0]}}
    assert recording_names(make_runs(tiny)) == ["tiny", "earlier"]
