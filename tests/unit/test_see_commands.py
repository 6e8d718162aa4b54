"""`flux-poke animate`, `compare` and `lens fit` on real files."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from flux_poke.analysis.lens import Lens
from flux_poke.cli import app
from flux_poke.errors import UserError
from flux_poke.flux.fingerprint import Fingerprint
from flux_poke.recording.store import HiddenStates
from flux_poke.tiny.model import TinyFlux
from PIL import Image, ImageSequence
from typer.testing import CliRunner


def test_animate_takes_the_first_blocks_of_the_type_through_all_steps(run, tmp_path):
    for step in (0, 1, 10):
        for index in (0, 2, 10):
            path = tmp_path / "decoded" / f"step_{step}" / f"double_block_{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (20 * step + 5 * index,) * 3).save(path)
    output = run(
        "animate", tmp_path, "--block-type", "double", "--max-blocks", 2, "--order", "block", "--font-size", 0, "--fps", 4
    )
    assert "6 frames" in output
    with Image.open(tmp_path / "blocks.gif") as image:
        levels = [np.asarray(frame.convert("L")).mean() for frame in ImageSequence.Iterator(image)]
    np.testing.assert_allclose(levels, [20 * step + 5 * index for index in (0, 2) for step in (0, 1, 10)], atol=3)


def test_animate_refuses_a_folder_without_previews(run, tmp_path):
    with pytest.raises(UserError, match="holds no block previews"):
        run("animate", tmp_path)


def test_compare_writes_a_row_for_each_variant_and_draws_one(run, tmp_path):
    for name, level in (("dense", 100), ("half", 110), ("quarter", 130)):
        Image.new("RGB", (32, 24), (level,) * 3).save(tmp_path / f"{name}.png")
    dense, half, quarter = (tmp_path / f"{name}.png" for name in ("dense", "half", "quarter"))
    table = run("compare", dense, half, quarter, "--out", tmp_path / "rows.csv")
    assert len(table.splitlines()) == 3
    with open(tmp_path / "rows.csv", newline="") as file:
        errors = [float(row["relative_mse"]) for row in csv.DictReader(file)]
    assert errors == pytest.approx([0.01, 0.09])
    run("compare", dense, half, quarter, "--picture", tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 5 * 256


def test_compare_refuses_what_it_cannot_write_before_it_reads(run, tmp_path):
    (tmp_path / "manifest.json").write_text('{"shards": []}')
    (tmp_path / "list.json").write_text('[{"name": "mine"}]')
    (tmp_path / "theirs.csv").write_text("a,b\n1,2\n")
    (tmp_path / "notes.png").write_text("notes")
    missing = tmp_path / "missing.png"
    for option, name, said in (
        ("--picture", "x.svg", "ending in one of .png, .jpg, .webp"),
        ("--picture", "notes.png", "something else than its ending says"),
        ("--out", "manifest.json", "is not a table of comparisons"),
        ("--out", "list.json", "is not a table of comparisons"),
        ("--out", "theirs.csv", "is not a table of comparisons"),
        ("--out", "x.txt", "written as .csv or .json"),
    ):
        there = tmp_path / name
        before = there.read_bytes() if there.exists() else None
        with pytest.raises(UserError, match=said):
            run("compare", missing, missing, option, there)
        assert (there.read_bytes() if there.exists() else None) == before


@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_a_table_replaces_a_table(run, tmp_path, name):
    Image.new("RGB", (16, 16), (90,) * 3).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16), (99,) * 3).save(tmp_path / "b.png")
    for variant in ("a.png", "b.png", "a.png"):
        run("compare", tmp_path / "a.png", tmp_path / variant, "--out", tmp_path / name)
    assert "b.png" not in (tmp_path / name).read_text()


def test_animate_refuses_to_replace_what_is_no_animation(run, tmp_path):
    (tmp_path / "blocks.gif").write_text("notes")
    with pytest.raises(UserError, match="something else than its ending says"):
        run("animate", tmp_path)
    with pytest.raises(UserError, match=r"ends in \.avi"):
        run("animate", tmp_path, "-o", tmp_path / "a.avi")
    for fps in ("nan", "inf", "0", "1e20"):
        assert CliRunner().invoke(app, ["animate", str(tmp_path), "--fps", fps]).exit_code == 2
    assert (tmp_path / "blocks.gif").read_text() == "notes"


def test_lens_fit_writes_the_lens_and_its_picture(run, tmp_path):
    h = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    rows = {"double-0": h, "single-0": 2 * h + 1, "image": torch.arange(12).repeat_interleave(10), "sigma": torch.ones(120)}
    fingerprint = Fingerprint.of_tensors(TinyFlux.load().flux.state_dict())
    HiddenStates.for_model(tmp_path / "rows" / "hidden_states", "flux1", fingerprint).append("lens", rows)
    output = run("lens", "fit", tmp_path / "rows", "--out", tmp_path / "lens.safetensors", "--picture", tmp_path / "lens.png")
    assert "120 tokens of 12 images" in output
    (error,) = Lens.load(tmp_path / "lens.safetensors").errors.values()
    assert error < 1e-4
    assert Image.open(tmp_path / "lens.png").format == "PNG"
