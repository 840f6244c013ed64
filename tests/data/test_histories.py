"""Predicted events and their histories, and pairs of integers, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions
from hypothesis import given
from hypothesis import strategies as st

from tron_cli.data.batches import Batch
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import (
    TrainingWindows,
    count_predicted,
    distinct_pairs,
    predicted_events,
    ranges,
    training_windows,
)
from tron_cli.evaluation.predict import predict
from tron_cli.models.base import Model

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


# ---- which event is predicted from which history --------------------------------------------


def expected_histories(
    rows: list[list[int]], window: int, protocol: str, full_sessions: bool, one_pass: bool
) -> list[tuple[int, int, list[int], int]]:
    """(session, event, history, target) by a loop over events, in order."""
    found = []
    for session, row in enumerate(rows):
        for event in range(1, len(row)):
            if protocol == "last-item" and event != len(row) - 1:
                continue
            if protocol == "every-step" and not full_sessions and event < len(row) - window:
                continue
            # In one pass all events see what the last one sees of what lies before them.
            start = max(0, (len(row) - 1 if one_pass else event) - window)
            if start < event:
                found.append((session, event, row[start:event], row[event]))
    return found


sessions_of_items = st.lists(st.lists(st.integers(1, 9), max_size=9), min_size=1, max_size=8)
HOWS = [
    (protocol, full_sessions, one_pass)
    for protocol in ("every-step", "last-item")
    for full_sessions in (False, True)
    for one_pass in (False, True)
    if not (full_sessions and one_pass)  # refused: one pass covers the last events only
]


@given(
    rows=sessions_of_items,
    window=st.integers(1, 6),
    how=st.sampled_from(HOWS),
    cut=st.integers(0, 8),
)
def test_predicted_events(
    rows: list[list[int]], window: int, how: tuple[str, bool, bool], cut: int
) -> None:
    """Two parts, joined, are the same as the whole."""
    protocol, full_sessions, one_pass = how
    sessions = pack_sessions(rows)
    found = []
    for first, last in ((0, cut), (cut, None)):
        histories = predicted_events(
            sessions, window=window, protocol=protocol, full_sessions=full_sessions,
            one_pass=one_pass, first=first, last=last,
        )  # fmt: skip
        event_E = histories.position_E - histories.begin_E
        for number in range(len(histories)):
            place = slice(histories.start_E[number], histories.position_E[number])
            found.append(
                (
                    int(histories.session_E[number]),
                    int(event_E[number]),
                    sessions.items[place].tolist(),
                    int(histories.target_E[number]),
                )
            )
        event_P, item_P = histories.seen()
        assert list(zip(event_P.tolist(), item_P.tolist(), strict=True)) == [
            (number, item)
            for number, (session, event) in enumerate(
                zip(histories.session_E.tolist(), event_E.tolist(), strict=True)
            )
            for item in sorted(set(rows[session][:event]))
        ]
    assert found == expected_histories(rows, window, protocol, full_sessions, one_pass)
    assert len(found) == count_predicted(
        sessions, window=window, protocol=protocol, full_sessions=full_sessions
    )


class LastSum(Model):
    """Scores an item by how near it is to the sum of the history modulo 9, and remembers inputs.

    A history is told apart from any other by its sum and its length here.
    """

    def __init__(self, window: int, *, shared: bool) -> None:
        super().__init__()
        self.sequence_length, self.num_items, self.one_row_serves_all = window, 9, shared
        self.item_embedding = torch.nn.Embedding(10, 9)
        with torch.no_grad():
            self.item_embedding.weight.copy_(torch.cat([torch.zeros(1, 9), torch.eye(9)]))

    @property
    def item_table(self) -> torch.Tensor:
        return self.item_embedding.weight

    def forward(self, batch: Batch, rows_UD: torch.Tensor | None = None) -> torch.Tensor:
        sums = torch.cat(
            [part.cumsum(0) for part in batch.inputs_N.split(batch.lengths_B.tolist())]
        )
        return scores_after(sums, batch.places_N + 1)


def scores_after(sum_N: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
    """float32 [N, 9]: the scores of items 1..9 after histories of these sums and lengths."""
    return ((sum_N[:, None] * 7 + length_N[:, None] * 3 + torch.arange(9) * 5) % 8).float()


@given(
    rows=sessions_of_items,
    window=st.integers(1, 6),
    how=st.sampled_from(HOWS),
    shared=st.booleans(),
    filter_rated=st.booleans(),
    batch_size=st.integers(1, 7),
)
def test_ranks_of_a_network_whatever_shares_a_row(
    rows: list[list[int]],
    window: int,
    how: tuple[str, bool, bool],
    shared: bool,
    filter_rated: bool,
    batch_size: int,
) -> None:
    """A row may serve several events where the network says so, and must not change a rank."""
    protocol, full_sessions, one_pass = how
    found = predict(
        LastSum(window, shared=shared), pack_sessions(rows), protocol=protocol,
        full_sessions=full_sessions, one_pass=one_pass, filter_rated=filter_rated,
        batch_size=batch_size,
    )  # fmt: skip
    expected = []
    histories = expected_histories(rows, window, protocol, full_sessions, one_pass)
    for session, event, history, target in histories:
        seen = set(rows[session][:event]) if filter_rated else set()
        score = scores_after(torch.tensor([sum(history)]), torch.tensor([len(history)]))[0].tolist()
        others = set(range(1, 10)) - seen - {target}
        rank = 1 + sum(score[other - 1] >= score[target - 1] for other in others)
        expected.append((session, event, target, 0 if target in seen else rank))
    columns = (found.session_E, found.event_E, found.target_E, found.rank_E)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


@given(rows=sessions_of_items, window=st.integers(1, 6))
def test_a_training_window_is_the_history_of_the_last_event(
    rows: list[list[int]], window: int
) -> None:
    rows = [row for row in rows if len(row) >= 2]
    sessions = pack_sessions(rows) if rows else pack_sessions([[1, 2]])
    rows = rows or [[1, 2]]
    chosen = np.arange(len(rows))[::-1]
    start_S, length_S = training_windows(sessions, chosen, window)
    windows = [
        sessions.items[start : start + length].tolist()
        for start, length in zip(start_S, length_S, strict=True)
    ]
    assert windows == [rows[number][:-1][-window:] for number in chosen]


def windows_by_loops(row: list[int], window: int, kind: str, stride: int) -> list[tuple[int, ...]]:
    """Inputs of each window and its last target, by going back from the end of a session."""
    if kind == "prefixes":
        return [tuple(row[max(0, end - window) : end + 1]) for end in range(1, len(row))]
    found, end = [], len(row) - 1
    while True:
        start = max(0, end - window)
        found.append(tuple(row[start : end + 1]))
        if kind == "last" or start == 0:
            return found[::-1]
        end -= stride


@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=14), min_size=1, max_size=6),
    kind=st.sampled_from(["last", "all", "prefixes"]),
    window=st.integers(1, 6),
    data=st.data(),
)
def test_all_training_windows_are_those_of_a_loop(
    rows: list[list[int]], kind: str, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window)) if kind == "all" else window
    sessions = pack_sessions(rows)
    windows = TrainingWindows(sessions, window, kind, stride)
    expected = [each for row in rows for each in windows_by_loops(row, window, kind, stride)]
    chosen = np.array(data.draw(st.permutations(range(len(expected)))))
    start_B, length_B = windows.at(chosen)
    found = [
        tuple(sessions.items[start : start + length + 1].tolist())
        for start, length in zip(start_B, length_B, strict=True)
    ]
    assert found == [expected[number] for number in chosen]
    assert len(windows) == len(expected)
    assert windows.mean_length() == np.mean([len(each) - 1 for each in expected])
    if kind == "all" and stride == window:  # each event but the first is a target once
        place, lengths = [], length_B.tolist()
        for start, length in zip(start_B.tolist(), lengths, strict=True):
            place += range(start + 1, start + length + 1)
        begins = sessions.offsets[:-1].tolist()
        assert sorted(place) == [at for at in range(len(sessions.items)) if at not in begins]


@pytest.mark.parametrize(("length", "window"), [(11, 4), (5, 4), (4, 4), (2, 4), (3, 1)])
def test_random_windows_are_equally_likely_and_reach_every_event(length: int, window: int) -> None:
    """All full windows of a session, and the whole of one that is shorter."""
    rows = [list(range(1, length + 1)), [9, 8]]
    windows = TrainingWindows(pack_sessions(rows), window, "random")
    random = np.random.default_rng(0)
    assert len(windows) == 2
    draws = 20_000
    start_B, length_B = windows.at(np.zeros(draws, dtype=np.int64), random)
    places = max(1, length - window)
    assert (length_B == min(window, length - 1)).all()
    share_P = np.bincount(start_B, minlength=places) / draws
    assert len(share_P) == places
    assert np.abs(share_P - 1 / places).max() <= 5 / np.sqrt(draws) / 2
    short_B, of_short_B = windows.at(np.ones(5, dtype=np.int64), random)
    assert short_B.tolist() == [length] * 5
    assert of_short_B.tolist() == [1] * 5


def test_windows_read_nothing_of_the_items() -> None:
    """Items as a file of ten terabytes would have them: only offsets say what a window is."""
    offsets = np.array([0, 5, 10**12, 10**12 + 2])
    sessions = Sessions(np.broadcast_to(np.int32(1), (10**12 + 2,)), offsets)
    windows = TrainingWindows(sessions, 50, "prefixes")
    assert len(windows) == 10**12 + 2 - 3
    start_B, length_B = windows.at(np.array([0, 4, 10**12 - 2]))
    assert start_B.tolist() == [0, 5, 10**12]
    assert length_B.tolist() == [1, 1, 1]
    assert len(TrainingWindows(sessions, 50, "all")) == 1 + (10**12 - 6 + 49) // 50 + 1
