"""Pairs and ranges of whole numbers against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tron_cli.events import distinct_pairs, ranges

pairs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40)


@given(pairs=pairs, larger=st.sampled_from([0, 2_000_000]))
def test_distinct_pairs(pairs: list[tuple[int, int]], larger: int) -> None:
    """Rows of int64 and items as a dataset holds them, of a large catalogue too."""
    row_P = np.array([row for row, _ in pairs], dtype=np.int64) + larger
    item_P = np.array([item for _, item in pairs], dtype=np.int32) + np.int32(larger)
    rows, items = distinct_pairs(row_P, item_P)
    assert (rows.dtype, items.dtype) == (np.int64, np.int64)
    expected = sorted({(row + larger, item + larger) for row, item in pairs})
    assert list(zip(rows.tolist(), items.tolist(), strict=True)) == expected


@given(pairs=pairs)
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    """Those that end before they begin are empty."""
    low, high = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    rows, numbers = ranges(low, high)
    assert list(zip(rows.tolist(), numbers.tolist(), strict=True)) == [
        (row, number) for row, (first, end) in enumerate(pairs) for number in range(first, end)
    ]
