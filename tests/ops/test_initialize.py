"""Random tables: the distributions that torch's own functions give, on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tron_cli.ops import initialize
from tron_cli.ops.initialize import standard_normal, xavier_uniform

Drawn = Callable[[int, int], torch.Tensor]


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of a table that draws in no time; the last one is shorter."""
    monkeypatch.setattr(initialize, "_NUMBERS_AT_ONCE", 1000)


@pytest.mark.usefixtures("short_parts")
def test_xavier_uniform_fills_its_interval_evenly() -> None:
    torch.manual_seed(0)
    rows, columns = 2001, 50
    table = xavier_uniform(rows, columns)
    bound = nn_bound(rows, columns)
    assert table.shape == (rows, columns)
    assert table.dtype == torch.float32
    assert float(table.abs().max()) <= bound
    check_uniform((table.flatten().double() / bound + 1) / 2)


@pytest.mark.usefixtures("short_parts")
def test_standard_normal_is_normal() -> None:
    torch.manual_seed(1)
    table = standard_normal(2001, 50).flatten().double()
    check_uniform((1 + torch.erf(table / math.sqrt(2))) / 2)


def nn_bound(rows: int, columns: int) -> float:
    """The largest number that nn.init.xavier_uniform_ can give, from its own draws."""
    largest = torch.nn.init.xavier_uniform_(torch.empty(rows, columns)).abs().max()
    bound = math.sqrt(6 / (rows + columns))
    assert float(largest) == pytest.approx(bound, rel=1e-3)
    return bound


def check_uniform(values: torch.Tensor) -> None:
    """Kolmogorov and Smirnov's statistic, below its value for a probability of 1e-4."""
    count = len(values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    ordered = values.sort().values
    distance = max(float((ordered - steps[:-1]).max()), float((steps[1:] - ordered).max()))
    assert distance < 2.23 / math.sqrt(count)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("drawn", [xavier_uniform, standard_normal])
def test_the_parts_differ(drawn: Drawn) -> None:
    torch.manual_seed(2)
    table = drawn(100, 100)
    assert len(table.flatten().unique()) > 9_900
    assert not torch.equal(table, drawn(100, 100))


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("drawn", [xavier_uniform, standard_normal])
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
