"""Columns to events to sessions in time order, all with array operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.reading.bad_lines import BadLines, skipped_lines
from tron_cli.prepare.reading.columns import Columns


@dataclass(frozen=True)
class Events:
    """A log of events, in any order.

    sessions: int64 [E], any number that names the session; items: int32 [E], positions in item_ids;
    times: int64 [E], milliseconds since 1970 UTC; item_ids: the original ids, int64 [I] or str [I];
    users: int64 [E], any number that names the user, or None. latest: the latest time, and the
    file and line of it.
    """

    sessions: np.ndarray
    items: np.ndarray
    times: np.ndarray
    item_ids: np.ndarray
    users: np.ndarray | None = None
    latest: Latest = (0, "")

    def __len__(self) -> int:
        return len(self.items)


Latest = tuple[int, str]
"""Latest time of a log (ms), and its file and line."""


class ItemIndex:
    """Index of distinct ids, numbered in order of first appearance; ids come in blocks."""

    def __init__(self) -> None:
        self._positions: dict[int | str, int] = {}

    def positions(self, ids: pl.Series) -> np.ndarray:
        """Return the position of each id: int32 [n]; new ids get the next free ones."""
        distinct = ids.unique(maintain_order=True)
        known = self._positions
        codes = [known.setdefault(item, len(known)) for item in distinct.to_list()]
        return (
            ids.replace_strict(distinct, codes, return_dtype=pl.Int32).to_numpy()
            if len(distinct)
            else np.zeros(0, np.int32)
        )

    def ids(self) -> np.ndarray:
        """Return the distinct ids by position: int64 if all are integers, plainly spelled."""
        ids = list(self._positions)
        if not ids or not isinstance(ids[0], str):
            return np.array(ids, np.int64)
        spelled = plain_integers(pl.Series(ids, dtype=pl.String))
        return spelled.to_numpy() if spelled.dtype == pl.Int64 else np.array(ids, dtype=object)


class IdKeys:
    """Map between ids of sessions or users, which come in blocks, and int64 keys.

    An integer is its own key. The key of a text is its 64-bit hash, so that memory holds each
    distinct text once, whatever the number of events.
    """

    def __init__(self) -> None:
        self._texts = pl.DataFrame(schema={"key": pl.Int64, "text": pl.String})
        self._new: list[pl.DataFrame] = []

    def keys(self, ids: pl.Series, users: pl.Series | None = None) -> np.ndarray:
        """Return the key of each id: int64 [n]; with users, equal ids of two users differ."""
        if users is not None:
            keys = pl.DataFrame([ids.alias("id"), users.alias("user")]).hash_rows()
        elif ids.dtype == pl.Int64:
            return ids.to_numpy()
        else:
            keys = ids.hash()
        keys = keys.reinterpret(signed=True)
        texts = pl.DataFrame({"key": keys, "text": ids.cast(pl.String)})
        self._new.append(texts.unique("key"))
        if sum(map(len, self._new)) > max(len(self._texts), 1 << 20):
            self._gather()
        return keys.to_numpy()

    def _gather(self) -> None:
        self._texts = pl.concat([self._texts, *self._new]).unique("key").sort("key")
        self._new = []

    @cached_property
    def _distinct(self) -> pl.Series:
        """Return the ids in ascending order of their keys, after all blocks."""
        self._gather()
        return plain_integers(self._texts["text"])

    def ids(self, keys: np.ndarray) -> np.ndarray:
        """Return the original id of each key: int64 if all are plain integers, else str."""
        if not len(self._distinct):
            return keys
        places = self._texts["key"].search_sorted(pl.Series(keys, dtype=pl.Int64))
        ids = self._distinct.gather(places)
        return ids.to_numpy() if ids.dtype == pl.Int64 else np.array(ids.to_list(), object)


def plain_integers(texts: pl.Series) -> pl.Series:
    """Return texts as Int64 if all are integers, plainly spelled (7, not 007), else unchanged.

    If all of them end with .0, as pandas writes a column with missing values, they are integers
    too, up to the largest that a float holds exactly.
    """
    are_floats = len(texts) > 0 and texts.str.ends_with(".0").all()
    plain = texts.str.strip_suffix(".0") if are_floats else texts
    numbers = plain.cast(pl.Int64, strict=False)
    is_plain = (numbers.cast(pl.String) == plain).fill_null(False)
    if are_floats:
        is_plain &= numbers.abs() <= 1 << 53
    return numbers if is_plain.all() else texts


def collect_events(
    file: Path, blocks: Iterable[Columns], bad: BadLines, index: ItemIndex | None = None
) -> Events:
    """Join blocks into one log: int64 columns session, time and perhaps user; item of any ids.

    index: shared by logs of the same items; item_ids are those of all logs so far.
    """
    index = index or ItemIndex()
    sessions, items, times, users = [], [], [], []
    latest: Latest | None = None
    for block in blocks:
        latest = later(latest, block)
        if "user" in block.frame.columns:
            users.append(block.frame["user"].to_numpy())
        sessions.append(block.frame["session"].to_numpy())
        items.append(index.positions(block.frame["item"]))
        times.append(block.frame["time"].to_numpy())
    if latest is None:
        raise InputError(f"{file} holds no readable event: {skipped_lines(bad.info())}")
    return Events(
        np.concatenate(sessions),
        np.concatenate(items),
        np.concatenate(times),
        index.ids(),
        np.concatenate(users) if users else None,
        latest,
    )


def later(latest: Latest | None, block: Columns) -> Latest | None:
    """Return the later of `latest` and the latest event of a block."""
    at = block.frame["time"].arg_max()
    if at is not None and (latest is None or block.frame["time"][at] > latest[0]):
        return block.frame["time"][at], f"{block.file}, {block.unit} {block.lines[at]}"
    return latest


def to_sessions(events: Events, places: np.ndarray | None = None) -> Sessions:
    """Group events into sessions, in order of first appearance in the file.

    The events of each are sorted by time; those of equal times keep the order of the file. The
    items stay positions in item_ids; session_ids and user_ids are the numbers of the events.
    places: int64 [E], of the events in the log.
    """
    if not len(events):
        nothing = np.zeros(0, np.int64)
        return Sessions(events.items, _offsets(nothing), nothing, nothing, events.users, places)
    codes, ids, first = _by_appearance(events.sessions)
    users = None
    if events.users is not None:
        users = np.empty(len(ids), np.int64)
        users[codes] = events.users
    items, times = events.items, events.times
    same = codes[1:] == codes[:-1]
    if not ((codes[1:] > codes[:-1]) | (same & (times[1:] >= times[:-1]))).all():
        order = np.lexsort((times, codes))
        items, times = items[order], times[order]
    offsets = _offsets(np.bincount(codes, minlength=len(ids)))
    return Sessions(items, offsets, times, ids, users, None if places is None else places[first])


def joined(parts: list[Sessions]) -> Sessions:
    """Concatenate the sessions of all parts; times and ids that one part lacks are left out."""

    def whole(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        held = [array for array in arrays if array is not None]
        return np.concatenate(held) if len(held) == len(arrays) else None

    return Sessions(
        np.concatenate([part.items for part in parts]),
        _offsets(np.concatenate([part.lengths for part in parts])),
        whole([part.times for part in parts]),
        whole([part.session_ids for part in parts]),
        whole([part.user_ids for part in parts]),
        whole([part.places for part in parts]),
    )


def first_keys(sessions: Sessions) -> tuple[np.ndarray, np.ndarray]:
    """Return what orders sessions (none empty): int64 [S] starts, 0 without times, and places."""
    count = len(sessions)
    return (
        np.zeros(count, np.int64) if sessions.times is None else first_times(sessions),
        np.arange(count) if sessions.places is None else sessions.places,
    )


def order_by_first_event(sessions: Sessions) -> np.ndarray:
    """Return the order of sessions (none empty) by start, then place; as they are without times."""
    starts, places = first_keys(sessions)
    return np.lexsort((places, starts))


def split_at_gaps(users: np.ndarray, times: np.ndarray, gap: int) -> np.ndarray:
    """Number sessions, which end where a user's next event is over `gap` ms away: int64 [E]."""
    order = np.lexsort((times, users))
    users, times = users[order], times[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (users[1:] != users[:-1]) | (times[1:] - times[:-1] > gap)
    sessions = np.empty(len(order), np.int64)
    sessions[order] = np.cumsum(starts)
    return sessions


def take(sessions: Sessions, rows: np.ndarray) -> Sessions:
    """Return the sessions of `rows` (int64, in that order), packed."""
    if np.array_equal(rows, np.arange(len(sessions))):
        return sessions
    lengths = sessions.lengths[rows]
    offsets = _offsets(lengths)
    events = np.arange(offsets[-1]) + np.repeat(sessions.offsets[rows] - offsets[:-1], lengths)
    times = None if sessions.times is None else sessions.times[events]
    return Sessions(sessions.items[events], offsets, times, *_ids_at(sessions, rows))


def take_where(sessions: Sessions, keep: np.ndarray) -> Sessions:
    """Return the sessions where `keep` (bool [S]) holds."""
    if keep.all():
        return sessions
    kept = drop_events(sessions, np.repeat(keep, sessions.lengths))
    ids = _ids_at(sessions, keep)
    return Sessions(kept.items, _offsets(sessions.lengths[keep]), kept.times, *ids)


def drop_events(sessions: Sessions, keep: np.ndarray) -> Sessions:
    """Keep the events where `keep` (bool [E]) holds; sessions may be left short, or empty."""
    if keep.all():
        return sessions
    kept_before = np.zeros(len(keep) + 1, np.int64)
    np.cumsum(keep, out=kept_before[1:])
    times = None if sessions.times is None else sessions.times[keep]
    return replace(
        sessions, items=sessions.items[keep], offsets=kept_before[sessions.offsets], times=times
    )


def _ids_at(sessions: Sessions, rows: np.ndarray) -> list[np.ndarray | None]:
    """Return session ids, user ids and places of some rows (int64, or bool [S])."""
    of_sessions = sessions.session_ids, sessions.user_ids, sessions.places
    return [None if array is None else array[rows] for array in of_sessions]


def first_times(sessions: Sessions) -> np.ndarray:
    """Return when each session (none empty) starts: int64 [S], ms."""
    assert sessions.times is not None
    return sessions.times[sessions.offsets[:-1]]


def last_times(sessions: Sessions) -> np.ndarray:
    """Return when each session (none empty) ends: int64 [S], ms."""
    assert sessions.times is not None
    return sessions.times[sessions.offsets[1:] - 1]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _by_appearance(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number keys in order of first appearance.

    Returns (int64 [E], the distinct keys in that order, the position where each appears first).
    """
    # Logs mostly keep a session's events together, so only runs of equal keys are sorted.
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    distinct, first, inverse = np.unique(keys[starts], return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty(len(distinct), np.int64)
    number[order] = np.arange(len(distinct))
    codes = np.repeat(number[inverse], np.diff(np.append(starts, len(keys))))
    return codes, distinct[order], starts[first[order]]
