"""Every baseline against a plain loop that scores all items of one event at a time."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from helpers.datasets import pack_sessions, random_sessions

from tron_cli.baselines import ease, predict
from tron_cli.baselines.base import Baseline
from tron_cli.baselines.ease import EASE
from tron_cli.baselines.markov import Markov
from tron_cli.baselines.popular import Popular
from tron_cli.baselines.predict import predict_baseline
from tron_cli.baselines.session_knn import SessionKNN
from tron_cli.baselines.session_popular import SessionPopular
from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.registry import BASELINES

NUM_ITEMS, LENGTH = 12, 4
Rows = Sequence[Sequence[int]]
# Scores of the items that a history speaks for; the others are ordered by popularity alone.
Scores = dict[int, Any]


def popular(train: Rows, history: Sequence[int]) -> Scores:
    return {}


def session_popular(train: Rows, history: Sequence[int]) -> Scores:
    last_place = {item: place for place, item in enumerate(history)}
    return {item: (times, last_place[item]) for item, times in Counter(history).items()}


def markov(train: Rows, history: Sequence[int]) -> Scores:
    pairs = (pair for row in train for pair in itertools.pairwise(row))
    return dict(Counter(second for first, second in pairs if first == history[-1]))


NEIGHBORS, SAMPLE = 3, 6


def session_knn(train: Rows, history: Sequence[int]) -> Scores:
    """Score items by votes, with weights rounded to multiples of 2^-28, so that equal sums tie."""

    def on_grid(weight: float) -> int:
        return round(weight * 2**28)

    step = {item: len(history) - place for place, item in enumerate(history)}
    weight = {item: 1 / math.log10(step[item] + 0.7) for item in step}
    total = sum(weight.values())
    shared = {number: set(row) & set(history) for number, row in enumerate(train)}
    sample = [number for number in reversed(range(len(train))) if shared[number]][:SAMPLE]
    similarity = {
        number: sum(on_grid(weight[item] / total) for item in shared[number]) for number in sample
    }
    neighbors = sorted(sample, key=lambda number: similarity[number], reverse=True)[:NEIGHBORS]
    votes: Counter[int] = Counter()
    for number in neighbors:
        place = {item: place for place, item in enumerate(train[number])}
        common = min(shared[number], key=lambda item: step[item])
        vote = round(similarity[number] / step[common])
        for item in place:
            votes[item] += round(vote * math.exp(-abs(place[item] - place[common]) / 3))
    holding = Counter(item for row in train for item in set(row))
    return {item: vote * (1 + math.log(len(train) / holding[item])) for item, vote in votes.items()}


ORACLES: dict[str, Callable[[Rows, Sequence[int]], Scores]] = {
    "popular": popular,
    "session_popular": session_popular,
    "markov": markov,
    "session_knn": session_knn,
}


def make(name: str, num_items: int = NUM_ITEMS) -> Baseline:
    settings = {"num_items": num_items, "sequence_length": LENGTH}
    if name == "session_knn":
        return SessionKNN(**settings, knn_neighbors=NEIGHBORS, knn_sample_size=SAMPLE)
    kinds = {"popular": Popular, "session_popular": SessionPopular, "markov": Markov}
    return kinds[name](**settings)


def fitted(name: str, train: Rows, num_items: int = NUM_ITEMS) -> Baseline:
    baseline = make(name, num_items)
    baseline.fit(pack_sessions(train))
    return baseline


def ranked(
    train: Rows, scores: Scores, target: int, seen: Sequence[int] = (), num_items: int = NUM_ITEMS
) -> tuple[int, list[int]]:
    """Return the rank of the target and all eligible items in order."""
    count = Counter(item for row in train for item in row)

    def value(item: int) -> tuple[bool, Any, int]:
        return item in scores, scores.get(item, 0), count[item]

    others = [item for item in range(1, num_items + 1) if item != target and item not in seen]
    others.sort(reverse=True, key=lambda item: (value(item), -item))
    if target in seen:
        return 0, others
    rank = 1 + sum(value(item) >= value(target) for item in others)
    return rank, [*others[: rank - 1], target, *others[rank - 1 :]]


def expected(
    name: str,
    train: Rows,
    split: Rows,
    *,
    protocol: str = "every-step",
    filter_rated: bool = False,
    full_sessions: bool = False,
    one_pass: bool = False,
) -> list[tuple[int, int, int, int, list[int]]]:
    """Return (session, event, target, rank, best items) of each predicted event."""
    found = []
    for number, row in enumerate(split):
        first = len(row) - 1 if protocol == "last-item" else len(row) - LENGTH
        if full_sessions and protocol == "every-step":
            first = 1
        for event in range(max(first, 1), len(row)):
            start = (len(row) - 1 if one_pass else event) - LENGTH
            history, target = row[max(start, 0) : event], row[event]
            seen = row[:event] if filter_rated else ()
            rank, best = ranked(train, ORACLES[name](train, history), target, seen)
            found.append((number, event, target, rank, best))
    return found


def check(baseline: Baseline, split: Rows, wanted: list[Any], top_items: int, **how: Any) -> None:
    found = predict_baseline(baseline, pack_sessions(split), top_items=top_items, **how)
    columns = (found.session_E, found.event_E, found.target_E, found.rank_E)
    assert all(column.dtype == np.int64 for column in columns)
    table = list(zip(*(column.tolist() for column in columns), strict=True))
    assert table == [row[:4] for row in wanted]
    assert found.top_EK is not None
    for shown, row in zip(found.top_EK.tolist(), wanted, strict=True):
        best = row[4][:top_items]
        assert shown == best + [0] * (top_items - len(best))
    without = predict_baseline(baseline, pack_sessions(split), **how)
    assert without.top_EK is None
    assert without.rank_E.tolist() == found.rank_E.tolist()


@pytest.fixture
def train(rng: np.random.Generator) -> list[list[int]]:
    """Training sessions of items 1 to 10; 11 and 12 are in the catalogue but not in training."""
    return random_sessions(rng, 25, NUM_ITEMS - 2, longest=6)


@pytest.fixture
def split(rng: np.random.Generator) -> list[list[int]]:
    """Sessions of 0 to 10 events for a window of 4, with repeats and items that training lacks."""
    rows = random_sessions(rng, 15, NUM_ITEMS, longest=10, shortest=0)
    return [*rows, [3, 3, 7, 3, 3, 7], [1], [], [12, 11, 12]]


HOW = [
    {"protocol": "every-step"},
    {"protocol": "last-item"},
    {"protocol": "every-step", "filter_rated": True},
    {"protocol": "last-item", "filter_rated": True},
    {"protocol": "every-step", "full_sessions": True},
    {"protocol": "every-step", "full_sessions": True, "filter_rated": True},
    {"protocol": "every-step", "one_pass": True},
    {"protocol": "last-item", "one_pass": True},
]


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("top_items", [1, 5, 20])
def test_ranks_and_lists_are_those_of_scoring_everything(
    name: str, how: dict[str, Any], top_items: int, train: Rows, split: Rows
) -> None:
    wanted = expected(name, train, split, **how)
    check(fitted(name, train), split, wanted, top_items, **how)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", range(15))
def test_any_data(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few items make many ties and repeats; the work is cut into small pieces."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(predict, "_ROWS_AT_ONCE", int(rng.integers(1, 8)))
    monkeypatch.setattr(predict, "_WORK_AT_ONCE", int(rng.integers(1, 100)))
    train = random_sessions(rng, int(rng.integers(1, 20)), int(rng.integers(1, NUM_ITEMS)))
    split = random_sessions(rng, 10, NUM_ITEMS, shortest=0)
    how: dict[str, Any] = {"protocol": "every-step", "filter_rated": bool(seed % 2)}
    check(fitted(name, train), split, expected(name, train, split, **how), 4, **how)


@pytest.mark.parametrize("name", ORACLES)
def test_what_was_learned_comes_back_from_its_arrays(name: str, train: Rows, split: Rows) -> None:
    state = fitted(name, train).state_dict()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    again = make(name)
    again.load_state_dict({key: array.copy() for key, array in state.items()})
    wanted = expected(name, train, split)
    check(again, split, wanted, 3, protocol="every-step")


@pytest.mark.parametrize("name", ORACLES)
def test_nothing_to_predict(name: str) -> None:
    for split in ([], [[1]], [[], [2]]):
        found = predict_baseline(
            fitted(name, [[1, 2]]), pack_sessions(split), protocol="every-step", top_items=3
        )
        assert found.rank_E.tolist() == []
        assert found.top_EK is not None
        assert found.top_EK.shape == (0, 3)


def test_hand_computed_ranks() -> None:
    # Items 1..5 occur 3, 3, 2, 1, 0 times; after item 1 came 2 twice and 3 once.
    train = [[1, 2], [1, 2], [1, 3, 4], [3, 2]]
    split = pack_sessions([[1, 2], [1, 3], [1, 4], [1, 1], [5, 3], [5, 5]])
    wanted = {
        "popular": [2, 3, 4, 2, 3, 5],
        "markov": [1, 2, 4, 3, 3, 5],
        # The item of the history first.
        "session_popular": [2, 3, 4, 1, 4, 1],
    }
    for name, ranks in wanted.items():
        found = predict_baseline(fitted(name, train, 5), split, protocol="every-step")
        assert found.rank_E.tolist() == ranks, name


@pytest.mark.parametrize("name", ["markov", "session_knn"])
def test_ranks_of_a_large_catalogue(name: str) -> None:
    """A [predictions, items] matrix would need 640 GB here."""
    rng = np.random.default_rng(0)
    events, num_items = 100_000, 1_000_000
    data = Sessions(
        rng.integers(1, num_items + 1, events, dtype=np.int32), np.arange(0, events + 1, 5)
    )
    baseline = make(name, num_items)
    baseline.fit(data)
    ranks = predict_baseline(baseline, data, protocol="every-step").rank_E
    assert len(ranks) == 80_000
    assert ranks.min() >= 1
    assert np.mean(ranks <= 20) > 0.99  # every target was seen together with its history


def ease_oracle(train: Rows, l2: float, num_items: int = NUM_ITEMS) -> np.ndarray:
    """Compute EASE column by column, as ridge regression of an item on all others."""
    x = np.zeros((len(train), num_items))
    for number, row in enumerate(train):
        x[number, np.asarray(row, dtype=int) - 1] = 1
    weights = np.zeros((num_items, num_items))
    for item in range(num_items):
        others = np.delete(np.arange(num_items), item)
        rows = np.vstack([x[:, others], np.sqrt(l2) * np.eye(num_items - 1)])
        wanted = np.concatenate([x[:, item], np.zeros(num_items - 1)])
        weights[others, item] = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return weights


def make_ease(train: Rows, l2: float, num_items: int = NUM_ITEMS) -> EASE:
    baseline = EASE(num_items=num_items, sequence_length=LENGTH, ease_l2=l2)
    baseline.fit(pack_sessions(train))
    return baseline


@pytest.mark.parametrize("l2", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("pairs", [1, 1 << 22])
def test_ease_is_the_ridge_regression_of_each_item_on_the_others(
    l2: float, pairs: int, train: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ease, "_PAIRS_AT_ONCE", pairs)
    found = make_ease(train, l2).state_dict()["weights"]
    assert found.dtype == np.float32
    assert found.diagonal().tolist() == [0] * (NUM_ITEMS + 1)
    assert not found[0].any()
    assert not found[:, 0].any()
    np.testing.assert_allclose(found[1:, 1:], ease_oracle(train, l2), rtol=1e-4, atol=1e-6)


def test_ease_of_three_items_by_hand() -> None:
    # X'X = [[2, 1, 0], [1, 2, 1], [0, 1, 1]] and l2 = 1: item 1 regressed on items 2 and 3 solves
    # [[3, 1], [1, 2]] b = [1, 0], item 2 on 1 and 3 [[3, 0], [0, 2]] b = [1, 1], item 3 on 1 and 2
    # [[3, 1], [1, 3]] b = [0, 1].
    found = make_ease([[1, 2], [2, 3, 3], [1]], 1.0, 3).state_dict()["weights"]
    by_hand = [[0, 1 / 3, -1 / 8], [2 / 5, 0, 3 / 8], [-1 / 5, 1 / 2, 0]]
    np.testing.assert_allclose(found[1:, 1:], by_hand, rtol=1e-6)


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("top_items", [1, 5, 20])
def test_ease_ranks_by_the_sum_of_weights(
    how: dict[str, Any], top_items: int, train: Rows, split: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = make_ease(train, 0.5)
    weights = baseline.state_dict()["weights"]
    # On a coarse grid, so that many scores tie.
    weights[:] = np.round(weights * 8) / 8

    def scores(train: Rows, history: Sequence[int]) -> Scores:
        return {
            item: sum(float(weights[other, item]) for other in set(history))
            for item in range(1, NUM_ITEMS + 1)
        }

    monkeypatch.setitem(ORACLES, "ease", scores)
    check(baseline, split, expected("ease", train, split, **how), top_items, **how)


def test_ease_refuses_a_catalogue_whose_matrix_would_not_fit() -> None:
    with pytest.raises(InputError, match=r"1,855,603 items would need 55,092 GB.*session_knn"):
        EASE(num_items=1_855_603, sequence_length=50, ease_l2=1.0)


def test_what_ease_advises_exists(command: Callable[..., tuple[int, str, str]]) -> None:
    with pytest.raises(InputError) as error:
        EASE(num_items=20_001, sequence_length=50, ease_l2=1.0)
    advice = re.search(r"model=(\w+), or .*`tron (.+) (--[\w-]+)`", str(error.value))
    assert advice is not None
    assert advice[1] in BASELINES
    code, help_text, _ = command(*advice[2].split(), "--help")
    assert (code, f"{advice[3]} " in help_text) == (0, True)
