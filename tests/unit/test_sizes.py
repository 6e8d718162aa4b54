"""sizes.py: a size out of a list, within a budget of pixels."""

from __future__ import annotations

import pytest
from flux_poke.errors import UserError
from flux_poke.sizes import pick_size


def test_only_sizes_within_the_budget_come_all_of_them_and_the_same_for_a_seed():
    listed = "512x512, 1024x1024\n768 x 1344; 2048x2048"
    found = {pick_size(listed, 1.1, seed) for seed in range(50)}
    assert found == {(512, 512), (1024, 1024), (768, 1344)}
    assert pick_size(listed, 1.1, 7) == pick_size(listed, 1.1, 7)


@pytest.mark.parametrize(
    ("listed", "said"),
    [("1024", "'1024' is not a size"), ("100x100", "multiples of 16"), ("0x16", "is not a size"), ("", "none of the 0")],
)
def test_what_is_no_size_is_refused(listed, said):
    with pytest.raises(UserError, match=said):
        pick_size(listed, 1.0, 0)


def test_where_all_are_larger_it_says_so():
    with pytest.raises(UserError, match=r"none of the 1 sizes has at most 0\.5 million pixels"):
        pick_size("1024x1024", 0.5, 0)
