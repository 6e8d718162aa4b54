"""recording/statistics.py against sums in float64, and the GPU's kernel against the eager way."""

import os
import subprocess
import sys

import pytest
import torch
from flux_poke.recording import statistics_triton
from flux_poke.recording.statistics import TILE, SiteInternals, Sums, partial_sums_eager

CASES = [(1, 5), (TILE, 7), (TILE + 1, 300), (3 * TILE - 5, 130)]


def activations(tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, gate = torch.randn(2, tokens, width, generator=generator)
    h[:, 0] = 0.0  # exactly 0 does not fire
    keep = torch.rand(tokens, generator=generator) < 0.6
    return h.to(dtype), gate.to(dtype), keep


def in_float64(h, gate=None, keep=None):
    rows = torch.ones(len(h), dtype=torch.bool) if keep is None else keep
    h = h[rows].double()
    fires = ((h if gate is None else gate[rows].double()) > 0).sum(0)
    return fires, int(rows.sum()), h.sum(0), (h**2).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "width"), CASES)
def test_statistics_equal_those_in_float64(tokens, width, gated, masked, dtype):
    h, gate, keep = activations(tokens, width, dtype)
    given = {"gate": gate if gated else None, "keep": keep if masked else None}
    found = Sums.of(h, **given).result()
    fires, counted, total, squares = in_float64(h, **given)
    assert torch.equal(found.fires, fires)
    assert found.fires.dtype == torch.int64
    assert found.tokens == counted
    torch.testing.assert_close(found.sum, total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.sum_sq, squares, rtol=1e-5, atol=1e-5)


def test_calls_add_up_with_and_without_a_mask():
    parts = [activations(tokens, 40, seed=tokens) for tokens in (3, 200, 128)]
    found = (Sums.of(parts[0][0]) + Sums.of(parts[1][0], keep=parts[1][2]) + Sums.of(parts[2][0])).result()
    rows = torch.cat((parts[0][0], parts[1][0][parts[1][2]], parts[2][0]))
    fires, counted, total, squares = in_float64(rows)
    assert torch.equal(found.fires, fires)
    assert found.tokens == counted
    torch.testing.assert_close(found.sum, total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.sum_sq, squares, rtol=1e-5, atol=1e-5)


def test_counts_stay_exact_where_float32_would_not():
    """2^24 + 1 is the first whole number that float32 lacks."""
    sums = Sums.of(torch.ones(1, 1))
    for _ in range(8):
        sums += Sums.of(torch.ones(1, 1).expand(2**21, 1))
    found = sums.result()
    assert found.fires.item() == found.tokens == found.sum.item() == 2**24 + 1


def test_adding_does_not_change_what_is_added():
    h, gate, keep = activations(200, 30)
    before = [tensor.clone() for tensor in (h, gate, keep)]
    Sums.of(h, gate, keep)
    assert all(torch.equal(a, b) for a, b in zip((h, gate, keep), before, strict=True))


def test_a_slice_of_wider_rows_counts_as_its_copy():
    h, _, _ = activations(150, 64)
    a, b = Sums.of(h[:, 24:]), Sums.of(h[:, 24:].contiguous())
    assert torch.equal(a.sum_sq, b.sum_sq)


def test_tokens_that_do_not_count_may_hold_anything():
    h, gate, keep = activations(200, 30)
    dirty, dirty_gate = h.clone(), gate.clone()
    dirty[~keep], dirty_gate[~keep] = float("inf"), float("nan")
    for given in ((h, None), (h, gate)):
        clean, other = Sums.of(given[0], given[1], keep), Sums.of(dirty, None if given[1] is None else dirty_gate, keep)
        for name in ("fires", "sum", "sum_sq"):
            assert torch.equal(getattr(clean, name), getattr(other, name))


def test_no_tokens_add_nothing():
    found = (Sums.of(torch.empty(0, 3)) + Sums.of(torch.ones(4, 3), keep=torch.zeros(4, dtype=torch.bool))).result()
    assert (found.tokens, found.fires.tolist(), found.sum.tolist()) == (0, [0, 0, 0], [0, 0, 0])
    assert found.rate.tolist() == found.mean.tolist() == found.variance.tolist() == [0, 0, 0]


def test_rate_mean_and_variance_are_those_of_the_activations():
    h, _, _ = activations(500, 20)
    site = SiteInternals(*in_float64(h))
    torch.testing.assert_close(site.rate, (h > 0).double().mean(0))
    torch.testing.assert_close(site.mean, h.double().mean(0))
    torch.testing.assert_close(site.variance, h.double().var(0, correction=0))


def compare_kernel_with_eager(device: str) -> None:
    for tokens, width in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            h, gate, keep = (tensor.to(device) for tensor in activations(tokens, width + 9, dtype))
            h, gate = h[:, 9:], gate[:, 9:]  # as the MLP's part of a single block: rows stand further apart than they are wide
            for given in ((None, None), (gate, None), (None, keep), (gate, keep)):
                ours, eager = statistics_triton.partial_sums(h, *given), partial_sums_eager(h, *given)
                assert torch.equal(ours[0], eager[0]), (tokens, width, dtype)
                torch.testing.assert_close(ours[1], eager[1], rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(ours[2], eager[2], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not statistics_triton.AVAILABLE, reason="Triton is not there")
def test_the_kernel_equals_the_eager_way_in_tritons_interpreter():
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    run = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not statistics_triton.AVAILABLE, reason="Triton is not there")
def test_where_the_kernel_cannot_run_that_is_said_once(caplog):
    statistics_triton.works.cache_clear()
    assert [statistics_triton.works(torch.device("cpu"), torch.float32) for _ in range(3)] == [False] * 3
    (line,) = caplog.messages
    assert line.startswith("Triton cannot be used (")
    assert "\n" not in line


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and statistics_triton.AVAILABLE), reason="needs a CUDA device and Triton")
def test_the_kernel_equals_the_eager_way_on_a_gpu():
    assert statistics_triton.works(torch.device("cuda", 0), torch.bfloat16)
    compare_kernel_with_eager("cuda")


if __name__ == "__main__":
    compare_kernel_with_eager("cpu")
