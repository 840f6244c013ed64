"""Ranks of the baselines against a brute-force score matrix."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tron_cli.baselines import every_step, markov_ranks, popularity_ranks
from tron_cli.dataset import Sessions


def make(sessions: list[list[int]]) -> Sessions:
    items = np.array([item for session in sessions for item in session], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, sessions)]).astype(np.int64)
    return Sessions(items, offsets)


def random_sessions(rng: np.random.Generator, count: int, num_items: int) -> list[list[int]]:
    return [rng.integers(1, num_items + 1, rng.integers(0, 7)).tolist() for _ in range(count)]


def brute_force(
    train: list[list[int]], split: list[list[int]], num_items: int, *, markov: bool
) -> list[int]:
    """Compare every target with every other item on (times it followed, times it occurred)."""
    occurred = [sum(s.count(item) for s in train) for item in range(num_items + 1)]

    def score(previous: int, item: int) -> tuple[int, int]:
        followed = sum(pair == (previous, item) for s in train for pair in pairwise(s))
        return (followed if markov else 0, occurred[item])

    ranks = []
    for session in split:
        for previous, target in pairwise(session):
            wanted = score(previous, target)
            others = [item for item in range(1, num_items + 1) if item != target]
            ranks.append(1 + sum(score(previous, item) >= wanted for item in others))
    return ranks


@pytest.mark.parametrize("seed", range(30))
def test_ranks_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_items = int(rng.integers(1, 9))
    train = random_sessions(rng, int(rng.integers(1, 15)), num_items)
    # The last item is in the catalogue (through validation, say) without being in training.
    split = random_sessions(rng, 8, num_items + 1)
    catalogue = num_items + 1
    for ranks_of, markov in ((popularity_ranks, False), (markov_ranks, True)):
        ranks = ranks_of(make(train), make(split), catalogue)
        assert ranks.dtype == np.int64
        assert ranks.tolist() == brute_force(train, split, catalogue, markov=markov)


def test_hand_computed_ranks() -> None:
    # Items 1..5 occur 3, 3, 2, 1, 0 times; after item 1 came 2 twice and 3 once.
    train = make([[1, 2], [1, 2], [1, 3, 4], [3, 2]])
    split = make([[1, 2], [1, 3], [1, 4], [1, 1], [5, 3], [5, 5]])
    assert popularity_ranks(train, split, 5).tolist() == [2, 3, 4, 2, 3, 5]
    assert markov_ranks(train, split, 5).tolist() == [1, 2, 4, 3, 3, 5]


def test_every_step_is_aligned() -> None:
    steps = every_step(make([[7, 8, 9], [], [4], [5, 5]]))
    assert steps.previous.tolist() == [7, 8, 5]
    assert steps.targets.tolist() == [8, 9, 5]
    assert steps.sessions.tolist() == [0, 0, 3]


def test_a_split_without_predictions() -> None:
    for split in (make([]), make([[1]])):
        assert markov_ranks(make([[1, 2]]), split, 2).tolist() == []
        assert popularity_ranks(make([[1, 2]]), split, 2).tolist() == []


def test_ranks_of_a_large_catalogue() -> None:
    """A [predictions, items] matrix would need 800 GB here."""
    rng = np.random.default_rng(0)
    events, num_items = 100_000, 1_000_000
    data = Sessions(
        rng.integers(1, num_items + 1, events, dtype=np.int32), np.arange(0, events + 1, 5)
    )
    ranks = markov_ranks(data, data, num_items)
    assert ranks.min() == 1
    assert np.mean(ranks <= 5) > 0.99  # every pair was seen in training
