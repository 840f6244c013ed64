"""Predictions of BERT4Rec, compared with a loop that puts a mask behind one history at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bert4rec import BLOCKS, ITEMS, LENGTH, MASK, make_model
from helpers.datasets import pack_sessions, random_sessions

from tron_cli.data import histories as events
from tron_cli.data.batches import pack
from tron_cli.evaluation.predict import predict
from tron_cli.models.bert4rec import BERT4Rec


class Served:
    """Scores of items 0..I at a mask behind a history's last events, in a batch of its own."""

    def __init__(self, model: BERT4Rec) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], list[float]] = {}

    @torch.no_grad()
    def scores(self, history: Sequence[int]) -> list[float]:
        row = (*history[-LENGTH:], MASK)
        if row not in self.known:
            items = np.array(row, dtype=np.int32)
            batch = pack(items, np.array([0]), np.array([len(row)]), with_targets=False)
            table = self.model.item_table[: ITEMS + 1].double()
            self.known[row] = (table @ self.model(batch)[-1].double()).tolist()
        return self.known[row]


def one_history_at_a_time(
    served: Served, rows: list[list[int]], protocol: str, filter_rated: bool, full: bool
) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """Session, event, target, rank and list of each predicted event."""
    for number, row in enumerate(rows):
        first = 1 if full else max(1, len(row) - LENGTH)
        if protocol == "last-item":
            first = max(1, len(row) - 1)
        for event in range(first, len(row)):
            scores = served.scores(row[:event])
            seen = set(row[:event]) if filter_rated else set()
            target = row[event]
            # Of equal ones the target comes last.
            ranked = sorted(
                set(range(1, ITEMS + 1)) - seen,
                key=lambda item, s=scores, t=target: (-s[item], item == t, item),
            )
            rank = 0 if target in seen else ranked.index(target) + 1
            yield number, event, target, rank, ranked


def check_predictions(served: Served, rows: list[list[int]], **options: Any) -> None:
    found = predict(served.model, pack_sessions(rows), top_items=6, **options)
    expected = list(
        one_history_at_a_time(
            served,
            rows,
            options["protocol"],
            options.get("filter_rated", False),
            options.get("full_sessions", False),
        )
    )
    columns = (found.session_E, found.event_E, found.target_E, found.rank_E)
    assert list(zip(*(each.tolist() for each in columns), strict=True)) == [
        row[:4] for row in expected
    ]
    for top, (*_, target, _, ranked), rank in zip(
        found.top_EK.tolist(), expected, found.rank_E.tolist(), strict=True
    ):
        assert set(top) <= set(range(1, ITEMS + 1))
        # Items 3 and 7 tie, in whatever order; the target has its rank.
        same = {3: 3, 7: 3}
        assert [same.get(i, i) for i in top] == [same.get(i, i) for i in ranked[:6]]
        assert not 0 < rank <= 6 or top[rank - 1] == target


@pytest.fixture
def rows(rng: np.random.Generator) -> list[list[int]]:
    """Lengths 0 to 14 around a window of 5, with repeats."""
    found = random_sessions(rng, 20, ITEMS, longest=14, shortest=0)
    return [*found, [3, 3, 7, 3, 3, 7], [1], [], [2, 9]]


@pytest.mark.parametrize("positions", ["end", "start", "none"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
def test_predictions_are_those_of_a_mask_behind_one_history_at_a_time(
    positions: str, block: str, protocol: str, rows: list[list[int]]
) -> None:
    served = Served(make_model(positions, block))
    for filter_rated, full, batch_size in ((False, False, 512), (True, True, 7)):
        check_predictions(
            served, rows, protocol=protocol, filter_rated=filter_rated, full_sessions=full,
            batch_size=batch_size,
        )  # fmt: skip


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_predictions_with_an_output_table_and_a_bias(
    reuse: bool, bias: bool, rows: list[list[int]]
) -> None:
    model = make_model(reuse_item_embeddings=reuse, output_bias=bias)
    check_predictions(Served(model), rows, protocol="every-step")


def test_rows_that_are_no_item_count_for_nothing(rows: list[list[int]]) -> None:
    """However they score: the mask's row of the output table, and row 0."""
    model = make_model(reuse_item_embeddings=False)
    sessions = pack_sessions(rows)
    before = predict(model, sessions, protocol="every-step", top_items=ITEMS)
    for value in (1e6, -1e6):
        with torch.no_grad():
            model.item_table[[0, MASK]] = value
        after = predict(model, sessions, protocol="every-step", top_items=ITEMS)
        assert np.array_equal(after.rank_E, before.rank_E)
        assert np.array_equal(after.top_EK, before.top_EK)
    # In a shared table the mask's row is an input too.
    model = make_model()
    with torch.no_grad():
        model.item_table[MASK] *= 1000
    check_predictions(Served(model), rows, protocol="every-step")


@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
@pytest.mark.parametrize("full", [False, True])
def test_the_bar_ends_where_it_said(
    protocol: str, full: bool, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, *, total: int, **_: Any) -> None:
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            pass

    monkeypatch.setattr(events, "tqdm", Bar)
    found = predict(make_model(), pack_sessions(rows), protocol=protocol, full_sessions=full)
    (bar,) = bars
    assert bar.total == bar.n == len(found.rank_E) > 0
