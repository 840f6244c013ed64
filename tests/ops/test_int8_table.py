"""Int8 products: all pairs that float64 decides otherwise are among the undecided ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.ops import int8_table
from tron_cli.ops.int8_table import Int8Table

pytestmark = pytest.mark.skipif(
    not int8_table.usable(torch.device("cpu")), reason="this processor has no exact int8 products"
)

SHAPES = [(1, 1), (3, 7), (15, 64), (16, 2), (17, 200), (5_000, 33), (16_384, 8), (40_000, 64)]


def scores(table: torch.Tensor, hidden_ED: torch.Tensor) -> torch.Tensor:
    """Return exact scores (in float64, whose rounding is far below the bounds), [E, I + 1]."""
    score_EI = hidden_ED.double() @ table.double().T
    score_EI[:, 0] = -torch.inf
    return score_EI


def check_possible(table: torch.Tensor, hidden_ED: torch.Tensor, count_E: torch.Tensor) -> None:
    found = Int8Table(table).possible(hidden_ED, count_E)
    pairs = torch.stack([found.query_P, found.item_P], dim=1)
    assert len(pairs.unique(dim=0)) == len(pairs)
    assert not found.open_E[found.query_P].any()
    is_found_EI = torch.zeros(len(hidden_ED), len(table), dtype=torch.bool)
    is_found_EI[found.query_P, found.item_P] = True
    score_EI = scores(table, hidden_ED)
    kth_E1 = score_EI.sort(dim=1, descending=True).values.gather(1, count_E[:, None] - 1)
    is_best_EI = score_EI >= kth_E1  # all that tie for the last place
    is_best_EI[found.open_E] = False
    assert bool((is_found_EI | ~is_best_EI).all())


def check_higher(table: torch.Tensor, hidden_ED: torch.Tensor, target_E: torch.Tensor) -> None:
    limit_E = torch.randint(1, 50, target_E.shape)
    score_EI = scores(table, hidden_ED)
    target_score_E = score_EI.gather(1, target_E[:, None])[:, 0]
    ahead_E, doubt = Int8Table(table).higher(hidden_ED, target_score_E, limit_E)
    at_least_P = score_EI[doubt.query_P, doubt.item_P] >= target_score_E[doubt.query_P]
    found_E = ahead_E + torch.bincount(doubt.query_P[at_least_P], minlength=len(target_E))
    true_E = (score_EI >= target_score_E[:, None]).sum(dim=1)  # the target is among them
    right_E = (found_E == true_E) | ((ahead_E >= limit_E) & (true_E - 1 >= limit_E))
    assert bool((right_E | doubt.open_E).all())


@pytest.mark.parametrize(("items", "width"), SHAPES)
def test_the_best_are_among_the_pairs_and_counts_are_those_of_float64(items, width) -> None:
    torch.manual_seed(items)
    table = torch.randn(items + 1, width) * torch.rand(items + 1, 1) ** 2
    hidden_ED = torch.randn(70, width) * torch.rand(70, 1) * 10
    check_possible(table, hidden_ED, torch.randint(1, min(items, 60) + 1, (70,)))
    best_Ek = scores(table, hidden_ED).topk(min(items, 60), dim=1).indices
    targets = [best_Ek[:, 0], best_Ek[:, -1], torch.randint(1, items + 1, (70,))]
    for target_E in targets:
        check_higher(table, hidden_ED, target_E)


@pytest.mark.parametrize(("items", "threads"), [(1_000, 5), (1_100, 2), (3_000, 5)])
def test_threads_that_share_the_chunks_find_the_same(items, threads, monkeypatch) -> None:
    monkeypatch.setattr(int8_table, "_CHUNK", 256)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_the_best_are_among_the_pairs_and_counts_are_those_of_float64(items, 24)
        with torch.inference_mode():
            test_the_best_are_among_the_pairs_and_counts_are_those_of_float64(items, 24)
    finally:
        torch.set_num_threads(before)


def test_few_of_many_items_are_left_undecided() -> None:
    torch.manual_seed(0)
    table, hidden_ED = torch.randn(100_001, 64), torch.randn(30, 64)
    int8 = Int8Table(table)
    found = int8.possible(hidden_ED, torch.full((30,), 20))
    assert not found.open_E.any()
    assert len(found.query_P) < 30 * 200
    score_EI = scores(table, hidden_ED)
    tenth_E = score_EI.topk(10, dim=1).values[:, -1]
    ahead_E, doubt = int8.higher(hidden_ED, tenth_E, torch.full((30,), 20))
    assert not doubt.open_E.any()
    assert len(doubt.query_P) < 30 * 100
    middling_E = score_EI.topk(1_000, dim=1).values[:, -1]
    ahead_E, doubt = int8.higher(hidden_ED, middling_E, torch.full((30,), 20))
    assert bool((ahead_E >= 20).all())


VALUES = st.sampled_from(
    [0.0, 1.0, -1.0, 0.5, 1e-3, 127.0, -126.5, 1e-20, 1e-38, 1e-42, 1e15, 3e20]
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_zeros_and_extreme_numbers(data) -> None:
    width = data.draw(st.integers(1, 5))
    rows = st.lists(VALUES, min_size=width, max_size=width)
    different = data.draw(st.lists(rows, min_size=1, max_size=6))
    items = data.draw(st.integers(1, 3_000))
    torch.manual_seed(items)
    choice = torch.randint(len(different), (items + 1,))
    table = torch.tensor(different)[choice]
    hidden_ED = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    count_E = torch.randint(1, items + 1, (len(hidden_ED),))
    check_possible(table, hidden_ED, count_E)
    check_higher(table, hidden_ED, torch.randint(1, items + 1, (len(hidden_ED),)))


def test_queries_about_which_int8_can_say_nothing_are_open() -> None:
    torch.manual_seed(0)
    table = torch.randn(20_001, 8)
    hidden_ED = torch.stack([torch.zeros(8), torch.full((8,), 1e-40), torch.randn(8)])
    int8 = Int8Table(table)
    assert int8.possible(hidden_ED, torch.tensor([5, 5, 5])).open_E.tolist() == [True, True, False]
    assert int8.possible(hidden_ED, torch.tensor([1, 1, 9_999])).open_E.all()
    tied = Int8Table(torch.ones(20_001, 8))
    assert tied.possible(hidden_ED, torch.tensor([5, 5, 5])).open_E.all()
    _, doubt = tied.higher(hidden_ED, hidden_ED.double().sum(dim=1), torch.tensor([5, 5, 5]))
    assert doubt.open_E.all()
    assert not len(doubt.item_P)
    huge = Int8Table(table * 1e16)
    assert huge.possible(hidden_ED, torch.tensor([5, 5, 5])).open_E.all()


def test_no_queries() -> None:
    int8 = Int8Table(torch.randn(100, 8))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert not len(int8.possible(torch.zeros(0, 8), nothing).query_P)
    ahead_E, doubt = int8.higher(torch.zeros(0, 8), nothing.double(), nothing)
    assert not len(ahead_E)
    assert not len(doubt.item_P)
