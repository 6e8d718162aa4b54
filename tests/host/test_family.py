"""Every FLUX through the whole loop on a real server: random weights of its shapes, in the graph that its users draw with.

What each test finds is a column of the README's table, whose rows are `family.MEMBERS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_poke.analysis.generation import find_previews
from flux_poke.headless.client import ComfyClient, Result
from flux_poke.pruning.checkpoint import Pruned
from flux_poke.pruning.plan import PruningPlan
from flux_poke.recording.recording import Recording
from PIL import Image
from safetensors.torch import load, load_file, save_file
from small_family import MEMBERS, Graph, Member, node
from torch import Tensor

BATCH, STEPS = 3, 6
#: Of the README's table, each one's test in the order of this file.
COLUMNS = ("record", "plan", "cut", "repair", "load, save, load again", "previews")


@dataclass(frozen=True)
class Loop:
    """What came of one FLUX: its files, and the latents that were drawn with each of its models."""

    member: Member
    path: Path
    output: Path
    result: Result
    latents: dict[str, Tensor]

    @property
    def recording(self) -> Recording:
        return Recording.open(self.output / self.member.id)

    @property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.output / f"{self.member.id}.safetensors")

    def pruned(self, name: str) -> Path:
        return self.path.with_name(f"{self.member.id}-{name}.safetensors")

    def error(self, name: str) -> float:
        """How far the latents of a model are from the dense one's, relative to these."""
        dense = self.latents["dense"]
        return ((self.latents[name] - dense).square().sum() / dense.square().sum()).item()


def loop(member: Member) -> Graph:
    """Record, plan, cut, repair, load, save, load again, preview: one graph, as a user connects it."""
    file, drawn = f"{member.id}.safetensors", member.before(BATCH)
    nodes = {
        **drawn.nodes,
        "dense": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "record": node(
            "FluxPokeRecord", model=["dense", 0], name=member.id, rows=72, steps=STEPS, max_gb=1.0, probe_steps=1
        ),
        **member.sampled("recorded", ["record", 0], drawn, 1, STEPS),
        "plan": node(
            "FluxPokePlanByBudget", recording=["record", 1], after=["recorded", 0], unet_name=file,
            budget="share of the neurons", amount=0.5, touch="neurons", precision="stored", protect="", save_as=member.id,
        ),
        "cut": node("FluxPokeLoadPrunedFlux", plan=["plan", 0], repair="none", weight_dtype="default"),
        "repaired": node("FluxPokeLoadPrunedFlux", plan=["plan", 0], repair="affine", weight_dtype="default"),
        "save": node(
            "FluxPokeSavePrunedFlux", plan_or_model=["plan", 0], repair="affine", save_as=f"{member.id}-saved", fold=False,
            precision="as planned",
        ),
        "loaded": node("FluxPokeLoadPrunedCheckpoint", unet_name=["save", 0], weight_dtype="default"),
        "save again": node(
            "FluxPokeSavePrunedFlux", plan_or_model=["loaded", 0], repair="affine", save_as=f"{member.id}-again", fold=False,
            precision="as planned",
        ),
        "again": node("FluxPokeLoadPrunedCheckpoint", unet_name=["save again", 0], weight_dtype="default"),
        "tap": node("FluxPokeTapBlocks", model=["again", 0], blocks="all", at_steps="0, 5", lens="", memory_gb=1.0),
    }  # fmt: skip
    for name, model in (("dense", "dense"), ("cut", "cut"), ("repaired", "repaired"), ("loaded", "loaded"), ("again", "tap")):
        nodes |= member.sampled(f"draw-{name}", [model, 0], drawn, 7, STEPS)
        nodes[f"latents-{name}"] = node("SaveLatent", samples=[f"draw-{name}", 0], filename_prefix=f"family/{member.id}-{name}")
    nodes["decode"] = node(
        "FluxPokeDecodeBlockPreviews", block_taps=["tap", 1], vae=member.vae, after=["draw-again", 0], view="x0",
        captions=False, decode=True, metadata=True, largest=64,
    )  # fmt: skip
    return nodes


@pytest.fixture(scope="session")
def family(host, server) -> Callable[[Member], Loop]:
    """The loop of a FLUX, gone through when it is first asked for."""
    models, done = host.base / "models" / "diffusion_models", {}

    def run(member: Member) -> Loop:
        if member.name not in done:
            path = models / f"{member.id}.safetensors"
            member.save(path)
            with ComfyClient(server.address) as client:
                result = client.run(loop(member))
                latents = {
                    name: load(client.fetch(result.files("latents", f"latents-{name}")[0]))["latent_tensor"]
                    for name in ("dense", "cut", "repaired", "loaded", "again")
                }
            done[member.name] = Loop(member, path, host.output / "flux_poke", result, latents)
        return done[member.name]

    return run


every_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)


@every_member
def test_record_counts_the_tokens_of_pictures_and_words_and_no_others(family, member: Member):
    """Reference pictures and what texts are padded with are left out."""
    found = family(member).recording
    assert found.kinds == {"internals", "rows", "amplification"}
    internals, store = found.internals(), found.states()
    calls = BATCH * STEPS
    tokens = {"img": member.image_tokens, "txt": member.words, "single": member.image_tokens + member.words}
    assert {name: site.tokens for name, site in internals.sites.items()} == {
        site.name: calls * tokens[site.stream] * (1 if member.cfg == 1 else 2) for site in member.layout.sites
    }
    assert all(0.05 < site.rate.mean() < 0.95 for site in internals.sites.values())
    for site in member.layout.sites:
        assert store.count(site.name) == calls * min(72, tokens[site.stream])


@every_member
def test_plan_keeps_half_of_the_neurons(family, member: Member):
    plan = family(member).plan
    assert plan.neurons == (member.layout.neurons // 2, member.layout.neurons)
    assert plan.family == member.layout.family


@every_member
def test_cut_draws_what_the_dense_model_draws_whose_cut_neurons_are_zero(family, client, member: Member):
    found = family(member)
    tensors = load_file(found.path)
    for site in member.layout.sites:
        kept = torch.zeros(site.width, dtype=torch.bool).index_fill(0, found.plan.kept[site.name].long(), True)
        tensors[f"{site.down}.weight"][:, site.down_column :] *= kept
    save_file(tensors, found.pruned("zeros"))
    drawn = member.before(BATCH)
    nodes = {**drawn.nodes, "zeros": node("UNETLoader", unet_name=found.pruned("zeros").name, weight_dtype="default")}
    nodes |= member.sampled("draw", ["zeros", 0], drawn, 7, STEPS)
    nodes["save"] = node("SaveLatent", samples=["draw", 0], filename_prefix=f"family/{member.id}-zeros")
    zeros = load(client.fetch(client.run(nodes).files("latents", "save")[0]))["latent_tensor"]
    assert found.error("cut") > 1e-3
    torch.testing.assert_close(found.latents["cut"], zeros, rtol=1e-3, atol=1e-3)


@every_member
def test_repair_comes_nearer_to_what_the_dense_model_draws(family, member: Member):
    found = family(member)
    assert found.error("repaired") < 0.7 * found.error("cut")


@every_member
def test_what_is_loaded_and_saved_twice_draws_the_same_to_the_bit(family, member: Member):
    found = family(member)
    for name in ("loaded", "again"):
        assert torch.equal(found.latents["repaired"], found.latents[name])
    first, second = (Pruned.open(found.pruned(name)) for name in ("saved", "again"))
    assert first.layout.neurons == second.layout.neurons == member.layout.neurons // 2
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())


@every_member
def test_previews_end_at_the_picture_that_was_drawn(family, member: Member):
    found = family(member)
    folders = [found.output / file["subfolder"].removeprefix("flux_poke/") for file in found.result.files("images", "decode")]
    assert len({*folders}) == BATCH
    for folder in folders:
        previews = dict(find_previews(folder))
        assert len(previews) == 2 * (member.layout.depth + member.layout.depth_single)
        final = pixels(folder / "img_0.jpg")
        distances = [np.abs(pixels(path) - final).mean() for path in previews.values()]
        assert distances[-1] < 1 < distances[0]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.float32)


def test_the_readme_shows_a_row_for_every_model_and_a_column_for_every_test():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("|")]
    start = rows.index(["model", *COLUMNS])
    table = list(itertools.takewhile(lambda row: len(row) == len(COLUMNS) + 1, rows[start + 2 :]))
    assert [row[0] for row in table[: len(MEMBERS)]] == [member.name for member in MEMBERS]
    tests = [name for name, value in globals().items() if name.startswith("test_") and hasattr(value, "pytestmark")]
    assert len(tests) == len(COLUMNS)
    assert {cell for row in table[: len(MEMBERS)] for cell in row[1:]} == {"yes"}
