"""Animations, decoded again: how many frames, in which order."""

from __future__ import annotations

import math
import re

import av
import numpy as np
import pytest
from flux_poke.analysis.animation import captioned_frames, choose_frames, write_animation
from flux_poke.analysis.generation import find_previews
from flux_poke.analysis.taps import Tap
from flux_poke.errors import UserError
from flux_poke.flux.blocks import Block
from PIL import Image, ImageSequence

STEPS = (0, 2, 10)
BLOCKS = (*(Block("double", index) for index in range(12)), *(Block("single", index) for index in range(3)))


def grey_of(tap: Tap) -> int:
    """Each tap has a grey of its own, at least 4 apart."""
    place = STEPS.index(tap.step) * 15 + tap.block.index + (12 if tap.block.kind == "single" else 0)
    return 20 + 5 * place


@pytest.fixture
def folder(tmp_path):
    """As the first tools for this laid it out: decoded/step_{s}/double_block_{i}.jpg."""
    for step in STEPS:
        for block in BLOCKS:
            path = tmp_path / "decoded" / f"step_{step}" / f"{block.kind}_block_{block.index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 24), (grey_of(Tap(step, block)),) * 3).save(path)
    (tmp_path / "decoded" / "step_0" / "notes.txt").write_text("not a preview")
    return tmp_path


def frames_of(path) -> list[Image.Image]:
    if path.suffix == ".mp4":
        with av.open(str(path)) as file:
            return [frame.to_image() for frame in file.decode(video=0)]
    with Image.open(path) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def greys(frames) -> list[float]:
    """Mean of each frame without its caption."""
    return [float(np.asarray(frame)[: frame.height // 2].mean()) for frame in frames]


@pytest.mark.parametrize("root", ["", "decoded"])
def test_previews_are_found_in_numeric_order(folder, root):
    taps = [tap for tap, _ in find_previews(folder / root)]
    assert taps == [Tap(step, block) for step in STEPS for block in BLOCKS]


@pytest.mark.parametrize("ending", ["gif", "webp", "mp4"])
@pytest.mark.parametrize("order", ["step", "block"])
def test_an_animation_decodes_to_its_frames_in_order(folder, ending, order):
    chosen = choose_frames(find_previews(folder), order)
    path = folder / f"blocks.{ending}"
    write_animation(path, captioned_frames(chosen), fps=4)
    expected = [grey_of(tap) for tap, _ in chosen]
    assert len(expected) == 45
    assert (expected == sorted(expected)) == (order == "step")
    np.testing.assert_allclose(greys(frames_of(path)), expected, atol=2)


def test_block_order_follows_one_block_through_all_steps(folder):
    chosen = choose_frames(find_previews(folder), "block", "double", 2)
    assert [(tap.block.index, tap.step) for tap, _ in chosen] == [(0, 0), (0, 2), (0, 10), (1, 0), (1, 2), (1, 10)]


def test_max_blocks_counts_each_kind_on_its_own(folder):
    chosen = choose_frames(find_previews(folder), max_blocks=2)
    names = [tap.block.name for tap, _ in chosen if tap.step == 0]
    assert names == ["double-0", "double-1", "single-0", "single-1"]


@pytest.mark.parametrize(("fps", "ending"), [(2, "mp4"), (0.5, "mp4"), (2, "gif"), (0.5, "webp")])
def test_frames_last_as_long_as_was_asked(folder, fps, ending):
    path = folder / f"blocks.{ending}"
    write_animation(path, captioned_frames(choose_frames(find_previews(folder), max_blocks=1)), fps)
    if ending == "mp4":
        with av.open(str(path)) as file:
            assert file.streams.video[0].average_rate == fps
    else:
        with Image.open(path) as image:
            durations = []
            for frame in ImageSequence.Iterator(image):
                frame.load()
                durations.append(frame.info["duration"])
        assert durations == [1000 / fps] * 6


def test_captions_say_step_and_block_below_the_image(folder):
    plain = next(captioned_frames(find_previews(folder), font_size=0))
    captioned = next(captioned_frames(find_previews(folder), font_size=16))
    assert plain.size == (32, 24)
    assert captioned.width % 32 == 0
    image_height = 24 * captioned.width // 32
    strip = np.asarray(captioned)[image_height:]
    assert (strip > 200).sum() > 100  # letters
    assert not (strip[:, :3] > 200).any()  # that fit
    assert not (strip[:, -3:] > 200).any()


def test_odd_sizes_become_even_in_mp4(tmp_path):
    frames = [Image.new("RGB", (33, 17), (level, 0, 0)) for level in (0, 100, 200)]
    write_animation(tmp_path / "odd.mp4", iter(frames))
    assert [frame.size for frame in frames_of(tmp_path / "odd.mp4")] == [(34, 18)] * 3


def test_films_carry_the_graph_that_made_them(folder):
    graph = {"workflow": '{"nodes": []}', "prompt": '{"1": {}}'}
    for ending in (".mp4", ".webp"):
        path = folder / f"blocks{ending}"
        write_animation(path, captioned_frames(find_previews(folder)), graph=graph)
        if ending == ".mp4":
            with av.open(str(path)) as file:
                assert {key: file.metadata[key] for key in graph} == graph
        else:
            with Image.open(path) as image:
                assert {*image.getexif().values()} == {f"{key}:{value}" for key, value in graph.items()}


@pytest.mark.parametrize(
    ("name", "fps", "match"),
    [
        ("a.avi", 2, "ends in .avi"),
        *(("a.gif", fps, f"from 0.01 to 100.0; found {fps}") for fps in (0, -1, math.nan, math.inf, 1e20)),
    ],
)
def test_other_endings_and_rates_are_refused(tmp_path, name, fps, match):
    with pytest.raises(UserError, match=re.escape(match)):
        write_animation(tmp_path / name, [Image.new("RGB", (8, 8))], fps)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_no_frames_and_a_kind_that_is_not_there_are_refused(folder, tmp_path_factory):
    with pytest.raises(UserError, match="holds no block previews"):
        find_previews(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="no frames"):
        write_animation(folder / "a.gif", [])
    doubles = [preview for preview in find_previews(folder) if preview[0].block.kind == "double"]
    with pytest.raises(UserError, match="asked for single blocks, found double"):
        choose_frames(doubles, kind="single")


def test_a_damaged_frame_is_named_and_leaves_no_animation(folder):
    (folder / "decoded" / "step_2" / "double_block_3.jpg").write_bytes(b"\xff\xd8 cut short")
    with pytest.raises(UserError, match=r"step_2.double_block_3\.jpg cannot be read"):
        write_animation(folder / "a.mp4", captioned_frames(find_previews(folder)))
    assert [path.name for path in folder.iterdir()] == ["decoded"]
