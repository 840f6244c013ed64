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


@dataclass
class _Step:
    """Counts after a step, or of what it dropped; items: their number, or bool [I], which occur."""

    why: str
    is_drop: bool = False
    sessions: int | None = 0
    events: int = 0
    items: np.ndarray | int | None = None


class Steps:
    """Record of what each step of preparation kept and dropped, for dataset.json and the summary.

    Where sessions come in parts, `record` and `drop` add up what is said of each part.
    """

    def __init__(self) -> None:
        self._steps: dict[str, _Step] = {}

    def record(self, step: str, parts: list[Sessions], why: str) -> None:
        """Record the counts after `step`, in all the parts."""
        found = self._steps.setdefault(step, _Step(why, items=np.zeros(0, bool)))
        assert found.sessions is not None
        assert isinstance(found.items, np.ndarray)
        for part in parts:
            found.sessions += len(part)
            found.events += len(part.items)
            found.items = grown(found.items, int(part.items.max(initial=-1)) + 1)
            found.items[part.items] = True

    def count(
        self, step: str, sessions: int | None, events: int, items: int | None, why: str
    ) -> None:
        """Record the counts after `step`; None where a count is not known."""
        self._steps[step] = _Step(why, False, sessions, events, items)

    def drop(self, step: str, sessions: int, events: int, why: str) -> None:
        """Record the counts that `step` dropped; remaining items are not counted."""
        found = self._steps.setdefault(step, _Step(why, is_drop=True))
        assert found.sessions is not None
        found.sessions += sessions
        found.events += events

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Return {step, sessions, events, items, dropped_sessions, dropped_events, why} of each.

        The counts are those after the step.
        """
        entries: list[dict[str, Any]] = []
        for step, found in self._steps.items():
            sessions, events, items = found.sessions, found.events, found.items
            before: dict[str, Any] = {"sessions": sessions, "events": events}
            before = entries[-1] if entries else before
            if found.is_drop:
                assert sessions is not None
                sessions, events = before["sessions"] - sessions, before["events"] - events
            dropped = None
            if sessions is not None and before["sessions"] is not None:
                dropped = before["sessions"] - sessions
            if isinstance(items, np.ndarray):
                items = int(np.count_nonzero(items))
            entries.append(
                {
                    "step": step,
                    "sessions": sessions,
                    "events": events,
                    "items": items,
                    "dropped_sessions": dropped,
                    "dropped_events": before["events"] - events,
                    "why": found.why,
                }
            )
        return entries


class Support:
    """Filters by support: short sessions, rare items, then short sessions again; once each.

    That is TRON's order. `shortened` takes the sessions of all tables, in one part or several;
    then `supported` takes what it returned. The last of several tables is the test split: its
    events do not decide which items are rare, and it keeps rare items.
    """

    def __init__(self, steps: Steps, *, min_session_length: int, min_item_count: int) -> None:
        self._steps = steps
        self._min_length, self._min_count = min_session_length, min_item_count
        self._events_of_items = np.zeros(0, np.int64)

    def shortened(self, tables: list[Sessions]) -> list[Sessions]:
        """Drop short sessions, and count the events of each item."""
        tables = [drop_short(table, self._min_length) for table in tables]
        self._steps.record("short sessions", tables, f"fewer than {self._min_length} events")
        for table in tables[: max(len(tables) - 1, 1)]:
            counts = np.bincount(table.items, minlength=len(self._events_of_items))
            counts[: len(self._events_of_items)] += self._events_of_items
            self._events_of_items = counts
        return tables

    def supported(self, tables: list[Sessions]) -> list[Sessions]:
        """Drop rare items, then the sessions that became short."""
        is_kept = self._events_of_items >= self._min_count
        training = slice(0, max(len(tables) - 1, 1))
        tables = list(tables)
        tables[training] = [
            take_where(kept, kept.lengths > 0)
            for kept in (drop_events(table, is_kept[table.items]) for table in tables[training])
        ]
        self._steps.record("rare items", tables, f"fewer than {self._min_count} events")
        tables = [drop_short(table, self._min_length) for table in tables]
        why = f"fewer than {self._min_length} events left"
        self._steps.record("short sessions again", tables, why)
        return tables


def grown(array: np.ndarray, length: int) -> np.ndarray:
    """Return an array of at least this length, with zeros at its end."""
    return np.append(array, np.zeros(max(length - len(array), 0), array.dtype))
