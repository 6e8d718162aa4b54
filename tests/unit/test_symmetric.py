"""pruning/symmetric.py against whole matrices."""

import pytest
import torch
from flux_poke.pruning import symmetric
from flux_poke.pruning.symmetric import add_product, invert, mirror, quadratic, row, select


@pytest.fixture(params=[1, 30, 100, 131])
def matrix(request, monkeypatch) -> torch.Tensor:
    """Positive definite, of a size below, at and above whole blocks."""
    monkeypatch.setattr(symmetric, "BLOCK", 50)
    monkeypatch.setattr(symmetric, "SWEPT", 20)
    root = torch.randn(request.param, request.param, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T + torch.eye(len(root))


def half(matrix: torch.Tensor) -> torch.Tensor:
    """What may be relied on between `add_product` and `mirror`: all else is not a number."""
    places = torch.arange(len(matrix)) // symmetric.BLOCK
    return matrix.masked_fill(places[None] > places[:, None], torch.nan)


def test_products_rows_and_the_mirror_are_those_of_the_whole_matrix(matrix):
    factor = torch.randn(3, len(matrix), dtype=torch.float64)
    expected, found = matrix - 2 * factor.T @ factor, half(matrix)
    add_product(found, factor, factor, alpha=-2.0)
    for index in {0, len(matrix) // 2, len(matrix) - 1}:
        torch.testing.assert_close(row(found, index), expected[index])
    torch.testing.assert_close(mirror(found), expected)


def test_products_of_float32_are_added_in_float64(matrix):
    factor, found = torch.full((1, len(matrix)), 1e-4), half(matrix)
    add_product(found, factor, factor)
    torch.testing.assert_close(mirror(found), matrix + 1e-8, rtol=1e-13, atol=1e-14)


def test_the_inverse_is_torchs(matrix):
    found = half(matrix)
    invert(found)
    torch.testing.assert_close(mirror(found), torch.linalg.inv(matrix), rtol=1e-8, atol=1e-10)


def test_what_has_no_inverse_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        invert(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))


@pytest.mark.parametrize("in_place", [False, True])
def test_selected_rows_and_columns_are_those_of_the_whole_matrix(matrix, in_place):
    kept, found = torch.arange(0, len(matrix), 3), half(matrix)
    small = select(found, kept, out=found if in_place else None)
    torch.testing.assert_close(mirror(small), matrix[kept][:, kept])


def test_the_trace_of_a_quadratic_form(matrix):
    rows = torch.randn(3, len(matrix), dtype=torch.float64)
    expected = torch.trace(rows @ matrix @ rows.T).item()
    assert quadratic(rows, half(matrix)) == pytest.approx(expected, rel=1e-12)
    assert quadratic(rows.float(), half(matrix)) == pytest.approx(expected, rel=1e-5)
