"""The highest values of each row against torch.topk and sorted lists, ties included."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.ops import topk


@pytest.mark.parametrize(
    ("columns", "count"), [(1, 1), (5, 5), (31, 1), (32, 2), (48, 2), (1000, 3), (1607, 100)]
)
def test_the_highest_values_are_those_of_the_plain_form(columns, count):
    """There are ties, and columns that do not count."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(20, columns, generator=generator)
    values[10:] = values[10:].round()
    values[15:][torch.rand(5, columns, generator=generator) < 0.5] = -torch.inf
    found, column = topk.highest(values, count)
    expected, _ = topk.plain_highest(values, count)
    torch.testing.assert_close(found.sort(dim=1).values, expected.sort(dim=1).values)
    torch.testing.assert_close(values.gather(1, column), found)
    assert all(len(set(row)) == count for row in column.tolist())


# Small whole numbers: float32 and bf16 compute with them exactly, and they tie.
ties = st.one_of(st.integers(-3, 3).map(float), st.just(-math.inf))


@given(
    rows=st.integers(1, 70).flatmap(
        lambda columns: st.lists(
            st.lists(ties, min_size=columns, max_size=columns), min_size=1, max_size=4
        )
    ),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_highest_values_are_those_of_a_sorted_list(rows, data):
    count = data.draw(st.integers(1, len(rows[0])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    with mock.patch.object(topk, "_GROUP", data.draw(st.sampled_from([2, 3, 16]))):
        found_nk, column_nk = topk.highest(torch.tensor(rows, dtype=dtype), count)
    assert found_nk.dtype == dtype
    for row, found, columns in zip(rows, found_nk.tolist(), column_nk.tolist(), strict=True):
        assert sorted(found, reverse=True) == sorted(row, reverse=True)[:count]
        assert [row[column] for column in columns] == found
        assert len(set(columns)) == count
