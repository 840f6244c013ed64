"""Figures of slices of the predicted events: by length, position, popularity and repeat.

The slices of a kind partition the events. Empty slices are omitted.

Shapes: E predicted events, N events of the sessions, I items.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import Predictions
from tron_cli.evaluation.metrics import figures

# Kinds of slices, and the property that defines them.
KINDS = {
    "length": "events of the whole session",
    "position": "place of the target in its session, from 1: one more than the history has events",
    "popularity": "training events of the target's item; items sorted by popularity are cut "
    "where they hold a fifth, two fifths, ... of all training events, equals staying together",
    "repeat": "whether the target's item is among the earlier events of its session",
}
_FROM = np.array([1, 2, 3, 4, 5, 10, 20, 50, 100])  # lengths and positions
_PARTS = 5  # of the training events


def sliced_figures(
    kind: str,
    value_of: dict[str, np.ndarray],
    predictions: Predictions,
    sessions: Sessions,
    train_events_I: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return label, events, sessions and metrics of each slice of a kind, in order.

    value_of: from metrics.values_by_rank. predictions: those of `sessions`. train_events_I: int64
    [I + 1], training events of each item, needed for popularity. Standard errors are clustered by
    session, over the sessions with an event in the slice.
    """
    labels, slice_E = _slices(kind, predictions, sessions, train_events_I)
    found = []
    for number in np.unique(slice_E):
        chosen = slice_E == number
        rank_E, session_E = predictions.rank_E[chosen], predictions.session_E[chosen]
        found.append(
            {
                "slice": labels[number],
                "events": len(rank_E),
                "sessions": int(np.count_nonzero(np.bincount(session_E))),
                "metrics": {
                    name: asdict(figure)
                    for name, figure in figures(value_of, rank_E, session_E).items()
                },
            }
        )
    return found


def _slices(
    kind: str,
    predictions: Predictions,
    sessions: Sessions,
    train_events_I: np.ndarray | None,
) -> tuple[list[str], np.ndarray]:
    """Return the labels of slices and the slice of each event, int64 [E]."""
    if kind == "popularity":
        assert train_events_I is not None
        labels, slice_I = _by_popularity(train_events_I)
        return labels, slice_I[predictions.target_E]
    if kind == "repeat":
        place_E = sessions.offsets[predictions.session_E] + predictions.event_E
        return ["new", "repeat"], _repeats(sessions)[place_E].astype(np.int64)
    if kind == "length":
        value_E = sessions.lengths[predictions.session_E]
    else:
        value_E = predictions.event_E + 1
    labels = [
        str(low) if low == high else f"{low}-{high}"
        for low, high in zip(_FROM[:-1], _FROM[1:] - 1, strict=True)
    ]
    return [*labels, f"{_FROM[-1]}+"], np.searchsorted(_FROM, value_E, side="right") - 1


def _by_popularity(train_events_I: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return labels and the slice of each item, int64 [I + 1], by the share of more popular items.

    The last slice holds the items without a training event.
    """
    count, item_I = np.unique(train_events_I, return_inverse=True)
    events = count * np.bincount(item_I)
    before = events.sum() - np.cumsum(events)  # events of all more popular items
    part = np.where(count > 0, before * _PARTS // max(1, events.sum()), _PARTS)
    labels = []
    for number in range(_PARTS):
        here = count[part == number]
        spread = "" if not len(here) else f"{here[0]}-{here[-1]}"
        labels.append(f"fifth {number + 1} ({spread})")
    return [*labels, "not in training (0)"], part[item_I]


def _repeats(sessions: Sessions) -> np.ndarray:
    """Mark the events whose item is that of an earlier event of their session, bool [N]."""
    item_N = np.asarray(sessions.items[: sessions.offsets[-1]], dtype=np.int64)
    session_N = np.repeat(np.arange(len(sessions)), sessions.lengths)
    order = np.lexsort((item_N, session_N))  # stable: the earliest event of an item comes first
    item_N, session_N = item_N[order], session_N[order]
    repeat_N = np.zeros(len(order), dtype=bool)
    repeat_N[order[1:]] = (item_N[1:] == item_N[:-1]) & (session_N[1:] == session_N[:-1])
    return repeat_N
