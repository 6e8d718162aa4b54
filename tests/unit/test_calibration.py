"""What a calibration takes: rows for a plan out of the images asked for, on the disk that there is."""

from __future__ import annotations

import re

import pytest
from flux_poke.errors import UserError
from flux_poke.flux.layout import Layout
from flux_poke.recording.calibration import BEST, Effort, LevelsToProbe, asked_images, choose_effort

FLUX1 = Layout.of("flux1", 3072, 19, 38, guidance=True)
#: Tokens of a 1024x1024 image; FLUX.1's text is padded to 256, that of FLUX.2 counts without its padding.
TOKENS = {"img": 4096, "txt": 256, "single": 4352}


def effort(images: int = 60, missing: int | None = None, layout: Layout = FLUX1, **changed) -> Effort:
    given = {"steps": 20, "tokens": TOKENS, "have": {}, "room": 1e12}
    return choose_effort(layout, images, images if missing is None else missing, **{**given, **changed})


def reached(found: Effort, layout: Layout = FLUX1) -> list[float]:
    return [found.counts[site.name] / site.regressors for site in layout.sites]


def test_sixty_images_of_flux_give_every_site_five_rows_for_each_value_it_reads():
    found = effort()
    assert found.rows == 64
    assert min(reached(found)) >= BEST
    # x of all sites, and attention of single blocks, in bf16; sigma, image and step of each row; and one pooled text a step
    assert found.bytes == 1200 * (64 * (38 * (2 * 3072 + 12) + 38 * (4 * 3072 + 12)) + 2 * 768 + 12)
    assert "60 images of 20 steps: 1,200 model calls; 64 rows a step, 53.86 GB" in str(found)


def test_where_an_image_has_few_words_text_sites_get_all_of_them_and_others_what_is_best():
    klein = Layout.of("flux2", 3072, 5, 20, context=7680)
    found = effort(layout=klein, tokens={"img": 4096, "txt": 20, "single": 4116})
    for site in klein.sites:
        enough = 60 * 20 * 20 if site.stream == "txt" else BEST * site.regressors
        assert found.counts[site.name] >= enough >= site.regressors
    assert found.scarcest.stream == "txt"


def test_four_steps_take_all_the_words_there_are():
    found = effort(steps=4)
    assert found.counts["double-txt-0"] == 60 * 4 * 256 == BEST * 12_288
    assert min(reached(found)) >= BEST


@pytest.mark.parametrize(("images", "steps", "words"), [(2, 4, 256), (2, 20, 256), (3, 4, 30), (10, 2, 100)])
def test_too_few_prompts_are_told_how_many_would_do(images: int, steps: int, words: int):
    tokens = {"img": 4096, "txt": words, "single": 4096 + words}
    with pytest.raises(UserError, match="ask for at least") as error:
        effort(images, steps=steps, tokens=tokens)
    enough = int(re.search(r"at least (\d+) prompts", str(error.value))[1])  # type: ignore[index]
    assert enough > images
    assert min(reached(effort(enough, steps=steps, tokens=tokens))) >= 1
    with pytest.raises(UserError):
        effort(enough - 1, steps=steps, tokens=tokens)


def test_less_disk_gives_fewer_rows_down_to_what_a_plan_needs():
    found = effort(room=20e9)
    assert 15e9 < found.bytes <= 20e9
    assert found.rows < effort().rows
    assert min(reached(found)) >= 1
    with pytest.raises(UserError, match=r"take ([\d.]+) GB on disk, and 5 GB are left") as error:
        effort(room=5e9)
    needed = float(re.search(r"take ([\d.]+) GB", str(error.value))[1])  # type: ignore[index]
    assert min(reached(effort(room=needed * 1.01e9))) >= 1


def test_rows_that_are_there_count():
    there = {site.name: BEST * site.regressors for site in FLUX1.sites}
    found = effort(80, missing=20, have=there)
    assert found.calls == 20 * 20
    assert found.rows == 48  # as if all of the 80 were drawn at once
    assert found.counts["single-0"] == there["single-0"] + 20 * 20 * 48


def test_a_small_model_gives_more_than_it_needs_where_that_takes_no_space():
    tiny = Layout.of("flux1", 128, 2, 4, context=64, vector=64)
    found = effort(layout=tiny, tokens={"img": 16, "txt": 8, "single": 24})
    assert min(reached(found, tiny)) > 2 * BEST
    assert found.bytes <= 5e7


def test_more_images_begin_with_the_same_ones():
    few, many = asked_images(["a", "b", "c"], 4, 7, "20 steps"), asked_images(["a", "b", "c"], 9, 7, "20 steps")
    assert many[:4] == few
    assert [(image.prompt, image.seed) for image in few] == [("a", 7), ("b", 8), ("c", 9), ("a", 10)]
    assert len({image.name for image in many}) == 9
    assert not {image.name for image in many} & {image.name for image in asked_images(["a", "b", "c"], 9, 7, "10 steps")}


@pytest.mark.parametrize(("prompts", "count"), [(["a"], 60), (["a", "a"], 60), (["a", "b"], 1)])
def test_one_prompt_is_too_few(prompts: list[str], count: int):
    with pytest.raises(UserError, match="at least 2 different prompts"):
        asked_images(prompts, count, 0, "")


SIGMAS = [1 - step / 20 for step in range(21)]


@pytest.mark.parametrize(("images", "expected"), [(60, [[0], [6], [12], [18], [19], [], []]), (2, [[0, 6, 12], [18, 19]])])
def test_every_noise_level_is_measured_once_and_at_as_many_images_as_there_are(images: int, expected: list[list[int]]):
    levels = LevelsToProbe(images, 20, set())
    assert levels.needed == 5
    assert [sorted(levels.next(SIGMAS)) for _ in expected] == expected
    assert levels.needed == 0


def test_levels_that_are_measured_are_not_measured_again():
    levels = LevelsToProbe(60, 20, {SIGMAS[0], SIGMAS[12]})
    assert [sorted(levels.next(SIGMAS)) for _ in range(4)] == [[6], [18], [19], []]
