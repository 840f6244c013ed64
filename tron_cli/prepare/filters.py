"""Filters of preparation, and the record of what each of them dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tron_cli.data.dataset import Sessions, are_repeats
from tron_cli.prepare.sessions import drop_events, take_where


def drop_short(sessions: Sessions, min_length: int) -> Sessions:
    """Drop the sessions of fewer than `min_length` events."""
    return take_where(sessions, sessions.lengths >= min_length)


def drop_rare_items(parts: list[Sessions], min_count: int) -> list[Sessions]:
    """Drop the events of items that occur fewer than `min_count` times in all the parts."""
    support = np.bincount(np.concatenate([part.items for part in parts]))
    return [drop_events(part, (support >= min_count)[part.items]) for part in parts]


def are_duplicates(sessions: Sessions) -> np.ndarray:
    """Mark the events with item and time of an earlier event of their session: bool [E]."""
    assert sessions.times is not None
    row = np.repeat(np.arange(len(sessions)), sessions.lengths)
    times = sessions.times
    is_tie = (row[1:] == row[:-1]) & (times[1:] == times[:-1])
    tied = np.flatnonzero(np.append(False, is_tie) | np.append(is_tie, False))
    keys = (sessions.items[tied], times[tied], row[tied])
    order = np.lexsort(keys)
    same = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    duplicates = np.zeros(len(sessions.items), bool)
    duplicates[tied[order[1:][same]]] = True  # the order is stable: the first one stays
    return duplicates


@dataclass(frozen=True)
class Cleaning:
    """Cleaning steps before the filters, in this order.

    drop_duplicates: drop further events of the same session, item and time. collapse_repeats: drop
    events with the item of the event before. max_session_length: drop sessions with more events,
    such as a crawler's; None keeps them.
    """

    drop_duplicates: bool = False
    collapse_repeats: bool = False
    max_session_length: int | None = None

    def apply(self, parts: list[Sessions], steps: Steps) -> list[Sessions]:
        """Return the sessions (with times) that are left, and record each step of cleaning."""
        if self.drop_duplicates:
            parts = [drop_events(part, ~are_duplicates(part)) for part in parts]
            steps.record("duplicates", parts, "same session, item and time")
        if self.collapse_repeats:
            parts = [drop_events(part, ~are_repeats(part)) for part in parts]
            steps.record("repeats", parts, "the item of the event before")
        if self.max_session_length is not None:
            parts = [take_where(part, part.lengths <= self.max_session_length) for part in parts]
            steps.record("long sessions", parts, f"more than {self.max_session_length:,} events")
        return parts


class Steps:
    """Record of what each step of preparation kept and dropped, for dataset.json and the summary.

    A step's entry: {step, sessions, events, items, dropped_sessions, dropped_events, why}; the
    counts are those after the step.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def record(self, step: str, parts: list[Sessions], why: str) -> None:
        """Record the counts after `step`, in all the parts."""
        items = np.concatenate([part.items for part in parts])
        distinct = int(np.count_nonzero(np.bincount(items))) if len(items) else 0
        self.count(step, sum(map(len, parts)), len(items), distinct, why)

    def count(
        self, step: str, sessions: int | None, events: int, items: int | None, why: str
    ) -> None:
        """Record the counts after `step`; None where a count is not known."""
        before: dict[str, Any] = (
            self.entries[-1] if self.entries else {"sessions": sessions, "events": events}
        )
        dropped = None
        if sessions is not None and before["sessions"] is not None:
            dropped = before["sessions"] - sessions
        self.entries.append(
            {
                "step": step,
                "sessions": sessions,
                "events": events,
                "items": items,
                "dropped_sessions": dropped,
                "dropped_events": before["events"] - events,
                "why": why,
            }
        )

    def drop(self, step: str, sessions: int, events: int, why: str) -> None:
        """Record the counts that `step` dropped; remaining items are not counted."""
        last = self.entries[-1]
        self.count(step, last["sessions"] - sessions, last["events"] - events, None, why)


def apply_filters(
    parts: list[Sessions], steps: Steps, *, min_session_length: int, min_item_count: int
) -> list[Sessions]:
    """Drop short sessions, rare items, then short sessions again: once each, in TRON's order.

    The last of several parts is the test split: its events do not decide which items are rare, and
    it keeps rare items.
    """
    short = f"fewer than {min_session_length} events"
    parts = [drop_short(part, min_session_length) for part in parts]
    steps.record("short sessions", parts, short)
    training = slice(0, max(len(parts) - 1, 1))
    parts[training] = [
        take_where(part, part.lengths > 0)
        for part in drop_rare_items(parts[training], min_item_count)
    ]
    steps.record("rare items", parts, f"fewer than {min_item_count} events")
    parts = [drop_short(part, min_session_length) for part in parts]
    steps.record("short sessions again", parts, f"{short} left")
    return parts
