"""Events of a log on disk, in parts by session, so that they are sorted one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.filters import are_duplicates
from tron_cli.prepare.reading.bad_lines import BadLines, skipped_lines
from tron_cli.prepare.reading.columns import Columns
from tron_cli.prepare.sessions import Events, ItemIndex, Latest, grouped, later

PART_BYTES = 1 << 24  # of the log; about half a million events of CSV
MAX_PARTS = 256
_MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads consecutive keys over the parts
_FIELDS = [("session", np.int64), ("time", np.int64), ("place", np.int64), ("item", np.int32)]


class EventSpool:
    """Events of a log of the given files, spooled to a folder.

    A session's events are in one part, in the order of the log. Memory holds one block of the log,
    then one part, and 12 bytes per event of the sessions that `sessions` returns.
    """

    def __init__(self, folder: Path, files: Sequence[Path], *, has_users: bool) -> None:
        size = sum(file.stat().st_size for file in files)
        parts = min(1 + size // PART_BYTES, MAX_PARTS)
        self._files = [folder / f"{number}.bin" for number in range(parts)]
        self._dtype = np.dtype(_FIELDS + [("user", np.int64)] * has_users)
        self.duplicates = 0  # in the sessions: events of equal item and time
        folder.mkdir()

    def fill(
        self, file: Path, blocks: Iterable[Columns], bad: BadLines, index: ItemIndex
    ) -> Latest:
        """Write the events of all blocks; return the latest time, and its file and line."""
        latest: Latest | None = None
        place = 0
        for block in blocks:
            latest = later(latest, block)
            events = np.empty(len(block.lines), self._dtype)
            for name in block.frame.columns:
                is_item = name == "item"
                column = block.frame[name]
                events[name] = index.positions(column) if is_item else column.to_numpy()
            events["place"] = np.arange(place, place + len(events))
            place += len(events)
            self._append(events)
        if latest is None:
            raise InputError(f"{file} holds no readable event: {skipped_lines(bad.info())}")
        return latest

    def _append(self, events: np.ndarray) -> None:
        keys = events["session"].view(np.uint64) * _MIX >> np.uint64(32)
        part = (keys % np.uint64(len(self._files))).astype(np.int64)
        ends = np.cumsum(np.bincount(part, minlength=len(self._files)))
        events = events[np.argsort(part, kind="stable")]
        for file, low, high in zip(self._files, [0, *ends[:-1]], ends, strict=True):
            if high > low:
                with file.open("ab") as opened:
                    opened.write(events[low:high].data)

    def sessions(self, prepared: Callable[[Events], Events]) -> Sessions:
        """Return what `to_sessions(prepared(events))` gives for all events, and empty the spool.

        prepared: cuts the sessions of a part into others, say, with numbers of their own.
        """
        found: list[tuple[Path, Sessions, np.ndarray]] = []
        for file in self._files:
            if file.exists():
                sessions, places = self._grouped(file, prepared)
                assert sessions.times is not None
                self.duplicates += int(are_duplicates(sessions).sum())
                with file.open("wb") as opened:
                    opened.write(sessions.items.data)
                    opened.write(sessions.times.data)
                nothing = np.zeros(0, np.int32)
                light = Sessions(
                    nothing, sessions.offsets, None, sessions.session_ids, sessions.user_ids
                )
                found.append((file, light, places))
        return _in_order_of_places(found)

    def _grouped(
        self, file: Path, prepared: Callable[[Events], Events]
    ) -> tuple[Sessions, np.ndarray]:
        """Return the sessions of a part, and the place in the log where each appears first."""
        spooled = np.fromfile(file, self._dtype)
        events = Events(
            spooled["session"].copy(),
            spooled["item"].copy(),
            spooled["time"].copy(),
            np.zeros(0, np.int64),
            spooled["user"].copy() if "user" in (self._dtype.names or ()) else None,
        )
        sessions, first = grouped(prepared(events))
        return sessions, spooled["place"][first]


def _in_order_of_places(found: list[tuple[Path, Sessions, np.ndarray]]) -> Sessions:
    """Read the items and times of all parts, sessions in the order of their first events.

    found: of each part its file, its sessions without events, and places: int64 [S].
    """
    order = np.argsort(np.concatenate([places for _, _, places in found]))
    row = np.empty(len(order), np.int64)
    row[order] = np.arange(len(order))
    lengths = np.concatenate([sessions.lengths for _, sessions, _ in found])[order]
    offsets = np.append(0, np.cumsum(lengths))
    items, times = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.int64)
    done = 0
    for file, sessions, _ in found:
        starts = offsets[row[done : done + len(sessions)]]
        done += len(sessions)
        count = int(sessions.offsets[-1])
        to = np.arange(count) + np.repeat(starts - sessions.offsets[:-1], sessions.lengths)
        items[to] = np.fromfile(file, np.int32, count)
        times[to] = np.fromfile(file, np.int64, count, offset=4 * count)
        file.unlink()

    def whole(ids: list[np.ndarray | None]) -> np.ndarray | None:
        held = [each for each in ids if each is not None]
        return np.concatenate(held)[order] if held else None

    return Sessions(
        items,
        offsets,
        times,
        whole([sessions.session_ids for _, sessions, _ in found]),
        whole([sessions.user_ids for _, sessions, _ in found]),
    )
