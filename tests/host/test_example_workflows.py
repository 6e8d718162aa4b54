"""Workflows whose nodes are tested elsewhere, run as they ship on the server, under names of their own."""

from __future__ import annotations

import re

import pytest
from flux_poke.errors import UserError
from flux_poke.pruning.checkpoint import Pruned


def test_what_rarely_fired_in_a_recording_is_cut_saved_and_loaded(client, host, workflow):
    record, cut = workflow("try_it_tiny"), workflow("cut_by_threshold_tiny")
    record["2"]["inputs"]["name"] = cut["2"]["inputs"]["name"] = "rarely_fires"
    cut["4"]["inputs"]["save_as"] = "rarely-fires.safetensors"
    client.run(record)
    result = client.run(cut)
    saved = Pruned.open(host.base / "models" / "diffusion_models" / "rarely-fires.safetensors")
    (kept,) = re.findall(r"([\d,]+) of 4,096 neurons kept", result.texts["5"])
    assert sum(len(indices) for indices in saved.plan.kept.values()) == int(kept.replace(",", "")) < 4096
    assert float(re.findall(r"PSNR ([\d.]+) dB", result.texts["13"])[0]) > 25


def test_a_queue_takes_one_prompt_after_the_other_and_ends_by_itself(client, workflow):
    graph = workflow("record_many_prompts_tiny")
    for number, name in (("2", "limit_example"), ("4", "many_example"), ("6", "counter_example")):
        graph[number]["inputs"]["name"] = name
    graph["2"]["inputs"]["runs"] = 2
    runs = [client.run(graph).texts for _ in range(2)]
    assert [texts["7"].split(":")[0] for texts in runs] == ["0", "1"]
    assert [texts["2"] for texts in runs] == ["run 1 of 2", "run 2 of 2"]
    assert "many_example: 2 runs" in runs[1]["4"]
    with pytest.raises(UserError, match="2 runs are done"):
        client.run(graph)
