"""Columns -> events -> sessions in time order. Nothing here is done event by event in Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from tron_cli.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.columns import BadLines, Columns


@dataclass(frozen=True)
class Events:
    """A log of events, in any order.

    sessions: int64 [E], any number that names the session; items: int32 [E], positions in item_ids;
    times: int64 [E], milliseconds since 1970 UTC; item_ids: the original ids, int64 [I] or str [I].
    """

    sessions: np.ndarray
    items: np.ndarray
    times: np.ndarray
    item_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.items)


class ItemIndex:
    """Gives every distinct id a position, in order of first appearance; ids come in blocks."""

    def __init__(self) -> None:
        self._positions: dict[int | str, int] = {}

    def positions(self, ids: pl.Series) -> np.ndarray:
        """int32 [n]: the position of each id; ids not seen before get the next free ones."""
        distinct = ids.unique(maintain_order=True)
        known = self._positions
        codes = [known.setdefault(item, len(known)) for item in distinct.to_list()]
        return (
            ids.replace_strict(distinct, codes, return_dtype=pl.Int32).to_numpy()
            if len(distinct)
            else np.zeros(0, np.int32)
        )

    def ids(self) -> np.ndarray:
        """The distinct ids by position: int64 where every one is an integer's plain spelling."""
        ids = list(self._positions)
        spelled = pl.Series(ids, dtype=pl.String) if ids and isinstance(ids[0], str) else None
        if spelled is None:
            return np.array(ids, np.int64)
        numbers = spelled.cast(pl.Int64, strict=False)
        if (numbers.cast(pl.String) == spelled).fill_null(False).all():
            return numbers.to_numpy()
        return np.array(ids, dtype=object)


def collect_events(file: Path, blocks: Iterable[Columns], bad: BadLines) -> Events:
    """One log of all blocks, which have the columns session and time (int64) and item (any ids)."""
    index = ItemIndex()
    sessions, items, times = [], [], []
    for block in blocks:
        sessions.append(block.frame["session"].to_numpy())
        items.append(index.positions(block.frame["item"]))
        times.append(block.frame["time"].to_numpy())
    if not sum(map(len, items)):
        raise InputError(f"{file} holds no readable event ({bad.count:,} bad lines: {bad.first})")
    return Events(
        np.concatenate(sessions), np.concatenate(items), np.concatenate(times), index.ids()
    )


def to_sessions(events: Events) -> Sessions:
    """Group events into sessions, in the order in which the file first shows them.

    The events of each are stably sorted by time: of equal times the file's first comes first. The
    items stay positions in item_ids.
    """
    codes, count = _by_appearance(events.sessions)
    items, times = events.items, events.times
    same = codes[1:] == codes[:-1]
    if not ((codes[1:] > codes[:-1]) | (same & (times[1:] >= times[:-1]))).all():
        order = np.lexsort((times, codes))
        items, times = items[order], times[order]
    return Sessions(items, _offsets(np.bincount(codes, minlength=count)), times)


def by_first_event(sessions: Sessions) -> Sessions:
    """Sessions (none empty) stably sorted by when they start; as they are where times lack."""
    if sessions.times is None:
        return sessions
    return take(sessions, np.argsort(first_times(sessions), kind="stable"))


def split_at_gaps(users: np.ndarray, times: np.ndarray, gap: int) -> np.ndarray:
    """int64 [E], session numbers: one ends where the user's next event is over `gap` ms away."""
    order = np.lexsort((times, users))
    users, times = users[order], times[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (users[1:] != users[:-1]) | (times[1:] - times[:-1] > gap)
    sessions = np.empty(len(order), np.int64)
    sessions[order] = np.cumsum(starts)
    return sessions


def take(sessions: Sessions, rows: np.ndarray) -> Sessions:
    """The sessions of `rows` (int64, in that order), packed."""
    if np.array_equal(rows, np.arange(len(sessions))):
        return sessions
    lengths = sessions.lengths[rows]
    offsets = _offsets(lengths)
    events = np.arange(offsets[-1]) + np.repeat(sessions.offsets[rows] - offsets[:-1], lengths)
    times = None if sessions.times is None else sessions.times[events]
    return Sessions(sessions.items[events], offsets, times)


def take_where(sessions: Sessions, keep: np.ndarray) -> Sessions:
    """The sessions where `keep` (bool [S]) holds."""
    if keep.all():
        return sessions
    kept = drop_events(sessions, np.repeat(keep, sessions.lengths))
    return Sessions(kept.items, _offsets(sessions.lengths[keep]), kept.times)


def drop_events(sessions: Sessions, keep: np.ndarray) -> Sessions:
    """Only the events where `keep` (bool [E]) holds; sessions may be left short, or empty."""
    if keep.all():
        return sessions
    kept_before = np.zeros(len(keep) + 1, np.int64)
    np.cumsum(keep, out=kept_before[1:])
    times = None if sessions.times is None else sessions.times[keep]
    return Sessions(sessions.items[keep], kept_before[sessions.offsets], times)


def first_times(sessions: Sessions) -> np.ndarray:
    """int64 [S] ms: when each session (none empty) starts."""
    assert sessions.times is not None
    return sessions.times[sessions.offsets[:-1]]


def last_times(sessions: Sessions) -> np.ndarray:
    """int64 [S] ms: when each session (none empty) ends."""
    assert sessions.times is not None
    return sessions.times[sessions.offsets[1:] - 1]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _by_appearance(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """(int64 [E] with the distinct keys numbered in order of first appearance, how many)."""
    # Logs mostly hold a session's events together, so only the runs of equal keys are sorted.
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    distinct, first, inverse = np.unique(keys[starts], return_index=True, return_inverse=True)
    number = np.empty(len(distinct), np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(len(distinct))
    return np.repeat(number[inverse], np.diff(np.append(starts, len(keys)))), len(distinct)
