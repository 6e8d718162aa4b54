"""What each writer does to a file that stands at its name: its own kind is replaced, any other stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux_poke.analysis.lens import Lens
from flux_poke.cli import app
from flux_poke.demo import run_demo
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block
from flux_poke.pruning.checkpoint import save_changed, save_pruned
from flux_poke.pruning.dense import Dense
from flux_poke.pruning.plan import PruningPlan
from flux_poke.pruning.surgery import Cut
from flux_poke.recording.internals import Internals
from flux_poke.recording.statistics import SiteInternals
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

Write = Callable[[Path], object]


@pytest.fixture
def writers(tensors, tmp_path) -> dict[str, Write]:
    """By the kind of file, what writes one."""
    save_file(tensors("flux1"), tmp_path / "dense.safetensors")
    dense = Dense.open(tmp_path / "dense.safetensors")
    widths = {site.name: site.width for site in dense.layout.sites}
    kept = {name: torch.arange(0, width, 2) for name, width in widths.items()}
    plan = PruningPlan("flux1", dense.fingerprint, kept, widths, "magnitude", "every other neuron")
    cut = Cut(dense, plan)
    sites = {name: SiteInternals(torch.zeros(w).long(), 1, *torch.ones(2, w).double()) for name, w in widths.items()}
    internals = Internals.new("flux1", dense.fingerprint, sites, steps=1)
    block = Block.named("double-0")
    lens = Lens("flux1", {block: torch.eye(4)}, {block: torch.zeros(4)}, {block: 0.1}, {block: 0.2}, rows=2, images=2)

    whole = {key.removeprefix("double_blocks.1."): cut[key] for key in cut if key.startswith("double_blocks.1.")}
    layers = tmp_path / "layers"
    layers.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in whole.items()}, layers / "1.safetensors")

    def replaced(path: Path) -> None:
        command = ["replace", str(layers), "--checkpoint", str(dense.source), "--out", str(path)]
        app(command, standalone_mode=False)

    def changed(path: Path) -> None:
        save_pruned(tmp_path / "pruned.safetensors", cut)
        save_changed(path, tmp_path / "pruned.safetensors", {}, {})

    return {
        "plan": plan.save,
        "pruned": lambda path: save_pruned(path, cut),
        "changed": changed,
        "internals": internals.save,
        "lens": lens.save,
        "replaced": replaced,
    }


@pytest.mark.parametrize("kind", ["plan", "pruned", "changed", "internals", "lens", "replaced"])
def test_a_writer_replaces_its_own_kind_of_file_and_no_other(kind, writers, tmp_path):
    path, write = tmp_path / "out.safetensors", writers[kind]
    write(path)
    with safe_open(path, "pt") as file:
        own = file.metadata()["format"]
    write(path)
    others = {"a model": lambda path: save_file({"x": torch.ones(3)}, path), **writers}
    for name, write_other in others.items():
        path.unlink()
        write_other(path)
        with safe_open(path, "pt") as file:
            there = (file.metadata() or {}).get("format")
        before = path.read_bytes()
        if there == own:
            write(path)
            continue
        assert name != kind
        with pytest.raises(UserError, match=r"out\.safetensors is something else and is not replaced"):
            write(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "inputs"),
    [
        ("plan internals --checkpoint dense --img-cut 9", ["internals", "dense"]),
        ("prune plan --checkpoint dense --recording internals", ["dense", "plan", "internals"]),
        ("replace layers --checkpoint dense", ["dense", "layers/1"]),
        ("lens fit internals", ["internals"]),
    ],
)
def test_a_command_never_writes_to_what_it_reads(command, inputs, writers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plan", "internals"):
        writers[name](tmp_path / name)
    (tmp_path / "dense").symlink_to("dense.safetensors")
    (tmp_path / "layers" / "1").symlink_to("1.safetensors")
    for name in inputs:
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match=f"{name} is something else and is not replaced"):
            app([*command.split(), "--out", name], standalone_mode=False)
        assert (tmp_path / name).read_bytes() == before


def test_a_comparison_is_not_drawn_over_what_was_compared(tmp_path):
    for name in ("dense.png", "pruned.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    before = (tmp_path / "pruned.png").read_bytes()
    for option in ("--picture", "--out"):
        with pytest.raises(UserError, match=r"pruned\.png is also what is read"):
            app(["compare", *map(str, (tmp_path / "dense.png", tmp_path / "pruned.png", option, tmp_path / "pruned.png"))],
                standalone_mode=False)  # fmt: skip
    assert (tmp_path / "pruned.png").read_bytes() == before


def test_a_demo_replaces_what_a_demo_recorded_and_no_other_recordings(writers, tmp_path, monkeypatch):
    monkeypatch.setattr("flux_poke.demo.RECORDED", 2)

    class Enough(Exception):
        pass

    def first_steps(what: str, done: float, total: float) -> None:
        if what.startswith("drawing others"):
            raise Enough

    def recorded() -> int:
        return Internals.load(tmp_path / "demo" / "internals.safetensors").runs

    writers["internals"](tmp_path / "mine" / "internals.safetensors")
    (tmp_path / "rows" / "hidden_states").mkdir(parents=True)
    for folder in ("mine", "rows"):
        with pytest.raises(UserError, match="was not made by a demo"):
            run_demo(tmp_path / folder)
    assert Internals.load(tmp_path / "mine" / "internals.safetensors").steps == 1
    assert (tmp_path / "rows" / "hidden_states").is_dir()
    for _ in range(2):  # the second time after an interrupt
        with pytest.raises(Enough):
            run_demo(tmp_path / "demo", progress=first_steps)
        assert recorded() == 1
