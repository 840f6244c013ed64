"""Exact ranks of the items that followed each history, by a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from tron_cli.baselines.base import Baseline
from tron_cli.baselines.ranking import Excluded
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import (
    Histories,
    Predictions,
    collect,
    count_predicted,
    predicted_events,
)

_ROWS_AT_ONCE = 1 << 12  # sessions, then events
_WORK_AT_ONCE = 1 << 22  # array elements: a few arrays of 32 MB


def predict_baseline(
    baseline: Baseline,
    sessions: Sessions,
    *,
    protocol: str,
    filter_rated: bool = False,
    full_sessions: bool = False,
    one_pass: bool = False,
    top_items: int = 0,
    progress: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> Predictions:
    """Rank the targets of `sessions` among the whole catalogue, as `evaluation.predict` does.

    Each event is predicted from its own history of up to sequence_length events. one_pass: from
    the events before it among the last sequence_length + 1 events of its session.
    """
    window = baseline.sequence_length

    def ranked() -> Iterator[tuple[Histories, np.ndarray, np.ndarray | None]]:
        # Work of a session: the total length of its histories.
        length_S, number = sessions.lengths, count()
        for low, high in pieces(length_S * np.minimum(length_S, window)):
            block = predicted_events(
                sessions,
                window=window,
                protocol=protocol,
                full_sessions=full_sessions,
                one_pass=one_pass,
                first=low,
                last=high,
            )
            for first, last in pieces(baseline.work(block)):
                if next(number) % share[1] != share[0]:
                    continue
                histories = block[first:last]
                excluded = Excluded(*histories.seen()) if filter_rated else None
                yield histories, *baseline.rank(histories, excluded=excluded, top_items=top_items)

    expected = count_predicted(
        sessions, window=window, protocol=protocol, full_sessions=full_sessions, share=share
    )
    return collect(ranked(), expected=expected, top_items=top_items, progress=progress)


def pieces(work_R: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges (first, last + 1) of at least one row whose work fits the limit."""
    work_before = np.cumsum(work_R)
    low = 0
    while low < len(work_R):
        done = work_before[low - 1] if low else 0
        fits = int(np.searchsorted(work_before, done + _WORK_AT_ONCE, side="right"))
        high = min(max(fits, low + 1), low + _ROWS_AT_ONCE, len(work_R))
        yield low, high
        low = high
