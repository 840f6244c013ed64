"""Random tables have their distributions, decided by the seed on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tron_cli.ops import initialize
from tron_cli.ops.initialize import small_normal, standard_normal, xavier_uniform

Drawn = Callable[[int, int], torch.Tensor]


def test_xavier_uniform_fills_its_interval_evenly() -> None:
    torch.manual_seed(0)
    rows, columns = 2001, 50
    table = xavier_uniform(rows, columns)
    bound = math.sqrt(6 / (rows + columns))
    assert table.shape == (rows, columns)
    assert table.dtype == torch.float32
    assert float(table.abs().max()) <= bound
    check_uniform((table.flatten().double() / bound + 1) / 2)


@pytest.mark.parametrize(("drawn", "deviation"), [(standard_normal, 1), (small_normal, 0.02)])
def test_normal_tables_are_normal(drawn: Drawn, deviation: float) -> None:
    torch.manual_seed(1)
    table = drawn(2001, 50).flatten().double() / deviation
    check_uniform((1 + torch.erf(table / math.sqrt(2))) / 2)


def check_uniform(values: torch.Tensor) -> None:
    """Kolmogorov and Smirnov's statistic, below its value for a probability of 1e-4."""
    count = len(values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    ordered = values.sort().values
    distance = max(float((ordered - steps[:-1]).max()), float((steps[1:] - ordered).max()))
    assert distance < 2.23 / math.sqrt(count)


@pytest.mark.parametrize("drawn", [xavier_uniform, standard_normal, small_normal])
def test_the_seed_decides_and_the_number_of_threads_does_not(drawn: Drawn) -> None:
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            tables.append((drawn(77, 100), torch.rand(1)))
    finally:
        torch.set_num_threads(before)
    for table, after in tables[1:]:
        assert torch.equal(table, tables[0][0])
        assert torch.equal(after, tables[0][1])
    torch.manual_seed(4)
    assert not torch.equal(drawn(77, 100), tables[0][0])


@pytest.mark.parametrize("draw", [xavier_uniform, standard_normal, small_normal])
@pytest.mark.parametrize(("rows", "columns"), [(100, 3), (64, 8), (33, 1), (5, 3), (95, 7)])
def test_some_rows_are_those_of_the_whole_table(
    draw: Drawn, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch draws normal numbers in groups of 16, and whatever follows is drawn as before."""
    monkeypatch.setattr(initialize, "_ROWS_AT_ONCE", 32)
    torch.manual_seed(1)
    whole, after = draw(rows, columns), torch.rand(1)
    for first, last in ((0, rows), (7 % rows, rows // 2), (rows // 2, rows), (rows, rows)):
        torch.manual_seed(1)
        with initialize.keeping_rows(first, max(first, last)):
            kept = draw(rows, columns)
        assert torch.equal(kept, whole[first : max(first, last)])
        assert torch.equal(torch.rand(1), after)


def test_xavier_is_torch_s() -> None:
    torch.manual_seed(1)
    expected = torch.nn.init.xavier_uniform_(torch.empty(95, 7))
    torch.manual_seed(1)
    assert torch.equal(xavier_uniform(95, 7), expected)
