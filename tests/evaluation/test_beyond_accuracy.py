"""Coverage, popularity, novelty, serendipity and intersection, checked by hand and by a loop."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from helpers.datasets import pack_sessions, random_sessions

from tron_cli.evaluation import beyond_accuracy as module
from tron_cli.evaluation.beyond_accuracy import ItemCounts, beyond_accuracy, count_items


def test_a_small_shop_worked_by_hand() -> None:
    # Items 1..5. Item 1: 4 events in 3 sessions; 2 and 3: two events each, item 2 in two sessions,
    # item 3 twice in one; item 4: one event; item 5 is never seen. Four sessions.
    counts = count_items(pack_sessions([[1, 2, 1], [1, 3, 3], [2, 1], [4]]), 5)
    assert counts.events_I.tolist() == [0, 4, 2, 2, 1, 0]
    assert counts.sessions_I.tolist() == [0, 3, 2, 1, 1, 0]
    assert counts.num_sessions == 4
    lists = np.array([[1, 2], [5, 3]])
    reference = np.array([[2, 1], [3, 4]])
    found = beyond_accuracy(lists, np.array([2, 3]), counts, reference)
    assert found.catalogue_coverage == pytest.approx(4 / 5)  # 1, 2, 3, 5
    assert found.average_popularity == pytest.approx(((4 + 2) / 2 + (0 + 2) / 2) / 2)
    # -log2 of 3/4, of 2/4, of 1/4 for item 5 (as if one session held it) and of 1/4.
    assert found.novelty == pytest.approx(((-math.log2(3 / 4) + 1) / 2 + (2 + 2) / 2) / 2)
    # Popularity ranks: item 1 is first, 2 and 3 second, 4 third. Both targets stand in the second
    # place: p = (5 + 1 - 2) / 5, and pu = (5 + 1 - 2) / 5 as well, so nothing is surprising.
    assert found.serendipity == 0.0
    assert found.intersection == pytest.approx((2 / 2 + 1 / 2) / 2)
    # The least popular item first: p = 1, pu = (5 + 1 - 3) / 5, in a list of two. Item 5, which
    # training never shows, has pu = 0.
    found = beyond_accuracy(np.array([[4, 1], [5, 1]]), np.array([4, 5]), counts)
    assert found.serendipity == pytest.approx(((1 - 3 / 5) / 2 + 1 / 2) / 2)
    assert found.intersection is None


def by_loop(
    lists: list[list[int]],
    targets: list[int],
    train: list[list[int]],
    num_items: int,
    references: list[list[int]],
) -> dict[str, float]:
    """Evaluate the formulas list by list and item by item."""
    events = Counter(item for session in train for item in session)
    held = Counter(item for session in train for item in set(session))
    popularity_rank = {
        item: 1 + len({count for count in events.values() if count > events[item]})
        for item in events
    }
    figures: dict[str, list[float]] = {
        "average_popularity": [], "novelty": [], "serendipity": [], "intersection": [],
    }  # fmt: skip
    for row, target, reference in zip(lists, targets, references, strict=True):
        if not row:
            continue
        serendipity = 0.0
        for place, item in enumerate(row, start=1):
            anybody = (num_items + 1 - popularity_rank[item]) / num_items if item in events else 0.0
            if item == target:
                serendipity += max((num_items + 1 - place) / num_items - anybody, 0.0)
        figures["average_popularity"].append(sum(events[item] for item in row) / len(row))
        figures["novelty"].append(
            sum(-math.log2(max(held[item], 1) / len(train)) for item in row) / len(row)
        )
        figures["serendipity"].append(serendipity / len(row))
        figures["intersection"].append(len(set(row) & set(reference)) / len(row))
    coverage = len({item for row in lists for item in row}) / num_items
    means = {name: sum(values) / len(values) for name, values in figures.items()}
    return {"catalogue_coverage": coverage, **means}


def random_lists(rng: np.random.Generator, count: int, depth: int, num_items: int) -> np.ndarray:
    """Lists of 0 to depth distinct items, filled up with 0."""
    top = np.zeros((count, depth), dtype=np.int32)
    for row in top:
        length = rng.integers(0, depth + 1)
        row[:length] = rng.choice(num_items, length, replace=False) + 1
    return top


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [1, 17, 1 << 20])
def test_equals_a_loop_over_lists_and_items(
    seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input has empty and short lists and items without events, and is cut in pieces."""
    monkeypatch.setattr(module, "_EVENTS_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_PLACES_AT_ONCE", at_once)
    rng = np.random.default_rng(seed)
    num_items, depth, count = 30, 6, 80
    train = random_sessions(rng, 25, 24, shortest=1)
    top_EK = random_lists(rng, count, depth, num_items)
    reference_EK = random_lists(rng, count, depth, num_items)
    reference_EK[::3] = top_EK[::3, ::-1]  # the same items in another order
    target_E = np.where(
        rng.random(count) < 0.7,
        top_EK[np.arange(count), rng.integers(0, depth, count)],
        rng.integers(1, num_items + 1, count),
    )
    target_E[target_E == 0] = 1
    found = beyond_accuracy(
        top_EK, target_E, count_items(pack_sessions(train), num_items), reference_EK
    )

    def as_lists(lists_EK: np.ndarray) -> list[list[int]]:
        return [[item for item in row if item] for row in lists_EK.tolist()]

    expected = by_loop(
        as_lists(top_EK), target_E.tolist(), train, num_items, as_lists(reference_EK)
    )
    assert expected["serendipity"] > 0.01
    assert 0.2 < expected["intersection"] < 0.9
    assert asdict(found) == pytest.approx(expected)


def test_sessions_longer_than_a_piece_and_empty_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVENTS_AT_ONCE", 3)
    counts = count_items(pack_sessions([[], [1, 1, 2, 2, 1], [], [2, 3], [1], []]), 3)
    assert counts.events_I.tolist() == [0, 4, 3, 1]
    assert counts.sessions_I.tolist() == [0, 2, 2, 1]
    assert counts.num_sessions == 3


def test_lists_that_are_all_empty_have_no_means() -> None:
    counts = ItemCounts(np.array([0, 2, 1]), np.array([0, 1, 1]), 2)
    found = beyond_accuracy(np.zeros((3, 2), np.int32), np.array([1, 2, 1]), counts)
    assert found.catalogue_coverage == 0
    assert found.average_popularity is found.novelty is found.serendipity is None


def test_the_same_lists_intersect_wholly(rng: np.random.Generator) -> None:
    lists = random_lists(rng, 50, 5, 20)
    counts = count_items(pack_sessions([[1, 2]]), 20)
    assert beyond_accuracy(lists, np.ones(50, int), counts, lists).intersection == 1.0
