"""Measures against their definitions, written again with numpy and scipy."""

from __future__ import annotations

import csv
import json
import math
import struct

import numpy as np
import pytest
import torch
from flux_poke.analysis.metrics import Comparison, compare, comparison_table, read_images, side_by_side, write_comparisons
from flux_poke.errors import UserError
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor


def images(batch: int = 2, channels: int = 3, height: int = 40, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def noisy(reference: Tensor, strength: float) -> Tensor:
    return (reference + strength * torch.randn(reference.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 1)


def ssim(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Wang et al. 2004, equation 13, with an 11x11 Gaussian window of sigma 1.5, where it lies wholly within the image."""

    def smooth(x):
        return gaussian_filter(x, 1.5, radius=5, axes=(-2, -1))[..., 5:-5, 5:-5]

    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, cov = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    return float(((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


@pytest.mark.parametrize("strength", [0.01, 0.2])
def test_measures_are_those_of_their_definitions(strength):
    b = images()
    a = noisy(b, strength)
    row = compare(a, b, "x")
    x, y = a.double().numpy(), b.double().numpy()
    assert row.relative_mse == pytest.approx(((x - y) ** 2).sum() / (y**2).sum())
    assert row.psnr == pytest.approx(-10 * math.log10(((x - y) ** 2).mean()))
    assert row.ssim == pytest.approx(ssim(x, y, 1.0), abs=1e-6)


def test_latents_are_measured_by_their_own_range():
    b = 6 * images(channels=16, height=16, width=24) - 3
    a = b + 0.1 * images(channels=16, height=16, width=24, seed=1)
    x, y = a.double().numpy(), b.double().numpy()
    row = compare(a, b)
    assert row.psnr == pytest.approx(10 * math.log10((y.max() - y.min()) ** 2 / ((x - y) ** 2).mean()))
    assert row.ssim == pytest.approx(ssim(x, y, float(y.max() - y.min())), abs=1e-6)


def test_equal_images_have_no_error():
    row = compare(images(), images(), "same")
    assert (row.relative_mse, row.psnr) == (0.0, math.inf)
    assert row.ssim == pytest.approx(1)


def test_latents_smaller_than_the_window_are_compared_too():
    b = images(channels=16, height=8, width=8)
    assert compare(b, b).ssim == pytest.approx(1)
    assert compare(b.flip(-1), b).ssim < 0.5


def test_different_sizes_are_refused():
    with pytest.raises(UserError, match="2 of 32x40 with 3 channels, the reference 2 of 40x40"):
        compare(images(), images(width=40), "half")


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_compared(wrong):
    b = images()
    a = b.clone()
    a[0, 0, 3, 3] = wrong
    with pytest.raises(UserError, match="half holds numbers that are not finite"):
        compare(a, b, "half")
    with pytest.raises(UserError, match="The reference holds numbers that are not finite"):
        compare(b, a, "half")


def test_several_variants_are_written_as_csv_and_json(tmp_path):
    b = images()
    rows = [compare(b, b, "dense"), compare(noisy(b, 0.1), b, "half")]
    write_comparisons(tmp_path / "rows.json", rows)
    write_comparisons(tmp_path / "rows.csv", rows)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found[0] == {"name": "dense", "relative_mse": 0.0, "psnr": None, "ssim": pytest.approx(1)}
    assert found[1]["psnr"] == rows[1].psnr
    with open(tmp_path / "rows.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert (lines[0]["psnr"], float(lines[1]["ssim"])) == ("", rows[1].ssim)
    with pytest.raises(UserError, match=r"ends in \.txt"):
        write_comparisons(tmp_path / "rows.txt", rows)


def test_the_result_is_one_line_of_what_is_known():
    row = Comparison("fitted", 0.001, 38.234, 0.99)
    assert row.result((22.1e9, 1.94), (17.8e9, 1.61)) == "22.1 -> 17.8 GB in memory, PSNR 38.2 dB, 1.9 -> 1.6 s a step"
    assert row.result((120e6, None), (90e6, None)) == "0.12 GB -> 90 MB in memory, PSNR 38.2 dB"
    assert row.result((None, None), (90e6, 0.5)) == "90 MB in memory, PSNR 38.2 dB, 0.5 s a step"
    assert row.result((120e6, 1.0), (None, None)) == "PSNR 38.2 dB"


def test_a_name_in_a_table_is_no_formula_for_a_spreadsheet(tmp_path):
    b = images()
    names = ['=HYPERLINK("http://127.0.0.1";"half")', "+1", "-1", "@a", "\ta", "a = b"]
    write_comparisons(tmp_path / "rows.csv", [compare(b, b, name) for name in names])
    with open(tmp_path / "rows.csv", newline="") as file:
        found = [line["name"] for line in csv.DictReader(file)]
    assert found == [*(f"'{name}" for name in names[:-1]), names[-1]]


def test_the_table_has_one_line_a_variant():
    b = images()
    lines = comparison_table([compare(noisy(b, s), b, name) for name, s in (("a", 0.1), ("a longer name", 0.2))]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("a longer name")


def test_the_difference_is_black_where_images_are_equal_and_bright_where_not():
    b = torch.full((1, 3, 64, 64), 0.5)
    a = b.clone()
    a[..., 32:] = 1.0
    pixels = np.asarray(side_by_side([compare(a, b, "right half")], [a], b)).astype(int)
    black = (pixels == (0, 0, 3)).all(-1).nonzero()
    bright = (pixels == (252, 254, 164)).all(-1).nonzero()
    assert len(black[0]) > 20_000
    assert abs(len(black[0]) / len(bright[0]) - 1) < 0.1
    assert black[1].max() < bright[1].min() + 12


def test_several_variants_share_one_scale_of_differences():
    reference = torch.full((1, 3, 64, 64), 0.5)
    far, near = reference + 0.4, reference + 0.2
    both = [compare(far, reference, "far"), compare(near, reference, "near")]
    pixels = np.asarray(side_by_side(both, [far, near], reference)).astype(int)
    brightest, half = (252, 254, 164), (187, 55, 84)  # matplotlib's inferno at 1 and at 0.5
    assert (abs(pixels - brightest).max(-1) < 3).sum() > 20_000
    assert (abs(pixels - half).max(-1) < 6).sum() > 20_000


def test_images_folders_and_latents_are_read(tmp_path):
    for number in (0, 2, 10):
        Image.new("RGB", (4, 3), (number, 0, 255)).save(tmp_path / f"img_{number}.png")
    folder = read_images(tmp_path)
    assert folder.shape == (3, 3, 3, 4)
    assert (folder[:, 0, 0, 0] * 255).tolist() == pytest.approx([0, 2, 10])
    assert torch.equal(read_images(tmp_path / "img_10.png"), folder[2:])
    latent = torch.randn(1, 16, 8, 8)
    save_file({"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}, tmp_path / "a.latent")
    assert torch.equal(read_images(tmp_path / "a.latent"), latent)


def test_a_picture_that_would_fill_memory_or_start_a_program_is_not_opened(tmp_path):
    """A few bytes that announce 200,000 x 200,000 pixels, and a PostScript file, which Pillow gives to Ghostscript."""
    long, short = 4, 3
    size = [(256, long, 1, 200_000), (257, long, 1, 200_000)]
    tags = [*size, (258, short, 1, 8), (262, short, 1, 1), (273, long, 1, 8), (279, long, 1, 1)]
    (tmp_path / "bomb.tif").write_bytes(
        struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    for name, why in (("bomb.tif", "Image size"), ("program.png", "cannot identify")):
        with pytest.raises(UserError, match=rf"{name} cannot be read as an image \(.*{why}"):
            read_images(tmp_path / name)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    save_file({"x": torch.zeros(1)}, tmp_path / "a.latent")
    for name, match in (("a.png", "cannot be read as an image"), ("b.png", "cannot be read"), ("a.latent", "is not a latent")):
        with pytest.raises(UserError, match=match):
            read_images(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        read_images(tmp_path / "empty")


@pytest.mark.parametrize("channels", [3, 16])
def test_equal_images_are_equal_to_the_last_digit(channels):
    images = torch.rand(2, channels, 37, 53, generator=torch.Generator().manual_seed(1))
    same = compare(images, images.clone())
    assert (same.relative_mse, same.psnr, same.ssim) == (0.0, math.inf, 1.0)
