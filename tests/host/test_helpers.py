"""The small helper nodes on a real server, and counts that begin anew under one name."""

from __future__ import annotations

import random

import pytest
from flux_poke.errors import UserError
from flux_poke.headless.client import ComfyClient
from flux_poke.prompts import RANDOM, pick, read_prompts
from flux_poke.recording.internals import Internals


def shown(client: ComfyClient, kind: str, **given) -> str:
    """What the node says."""
    graph = {"1": {"class_type": kind, "inputs": given}, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    return client.run(graph).texts["1"]


def test_random_int_is_within_its_range_and_the_same_for_a_seed(client: ComfyClient):
    found = [int(shown(client, "FluxPokeRandomInt", least=3, most=5, seed=seed)) for seed in range(8)]
    assert found == [random.Random(seed).randint(3, 5) for seed in range(8)]
    assert {*found} == {3, 4, 5}
    with pytest.raises(UserError, match="least is 6 and most is 5"):
        shown(client, "FluxPokeRandomInt", least=6, most=5, seed=0)


def test_random_size_gives_width_and_height_of_one_in_the_list(client: ComfyClient):
    given = {"sizes": "512x768, 2048x2048", "megapixels": 1.0, "seed": 4}
    assert shown(client, "FluxPokeRandomSize", **given) == "512 x 768"


def test_prompts_takes_the_same_line_for_a_seed_and_others_for_others(client: ComfyClient):
    def prompt(seed: int) -> str:
        given = {"file": "prompts.txt", "index": -1, "regex": "", "seed": seed}
        graph = {"1": {"class_type": "FluxPokePrompts", "inputs": given}}
        graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
        return client.run(graph).outputs["2"]["text"][0]

    found = [prompt(seed) for seed in range(6)]
    assert found == [pick(read_prompts(), RANDOM, seed)[0] for seed in range(6)]
    assert len({*found}) > 2
    assert prompt(3) == found[3]


def test_queue_limit_lets_so_many_runs_through_drops_the_rest_and_begins_anew(client: ComfyClient):
    def graph(number: int) -> dict:
        limit = {"value": ["1", 0], "runs": 2, "name": "tested"}
        return {
            "1": {"class_type": "FluxPokeRandomInt", "inputs": {"least": 0, "most": 9, "seed": number}},
            "2": {"class_type": "FluxPokeQueueLimit", "inputs": limit},
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
        }

    queued = [client.queue(graph(number)) for number in range(5)]
    assert client.wait(queued[0]).texts["2"] == "run 1 of 2"
    assert client.wait(queued[1]).outputs["3"]["text"] == [str(random.Random(1).randint(0, 9))]
    with pytest.raises(UserError, match="2 runs are done, and the rest of the queue is dropped"):
        client.wait(queued[2])
    assert not client.history(queued[3])
    assert not client.history(queued[4])
    assert client.run(graph(7)).texts["2"] == "run 1 of 2"


def test_without_append_the_counts_of_a_run_take_the_place_of_those_before(client: ComfyClient, host, workflow):
    def record(seed: int, append: bool) -> Internals:
        graph = workflow("try_it_tiny")
        graph["2"]["inputs"] |= {"name": "anew", "append": append}
        graph["5"]["inputs"]["batch_size"] = 1
        graph["6"]["inputs"] |= {"seed": seed, "steps": 2}
        client.run(graph)
        return Internals.load(host.recorded("anew"))

    one = record(1, True)
    assert record(2, True).runs == 2
    assert record(3, False).runs == 1
    assert record(4, True).runs == 2
    again = record(1, False)
    assert all((again.sites[name].fires == site.fires).all() for name, site in one.sites.items())
