"""Events of a log on disk, in parts by session, so that one part at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tron_cli.errors import InputError
from tron_cli.prepare.reading.bad_lines import BadLines, skipped_lines
from tron_cli.prepare.reading.columns import Columns
from tron_cli.prepare.session_files import changed
from tron_cli.prepare.sessions import Events, ItemIndex, Latest, later

PART_EVENTS = 1 << 19  # of all tables
MAX_PARTS = 4096
_EVENT_BYTES = 32  # of CSV, roughly
_MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads consecutive keys over the parts
_FIELDS = [("session", np.int64), ("time", np.int64), ("place", np.int64), ("item", np.int32)]


class EventSpool:
    """Events of the tables of a log, spooled to a folder, each event with its place in the log.

    A session's events are in one part, in the order of the log; sessions of one key are in parts of
    one number in all tables. Memory holds one block of the log, or one part.
    """

    def __init__(self, folder: Path, tables: Sequence[Sequence[Path]], *, has_users: bool) -> None:
        size = sum(file.stat().st_size for files in tables for file in files)
        self.parts = min(1 + size // (_EVENT_BYTES * PART_EVENTS), MAX_PARTS)
        self._folder, self._tables = folder, len(tables)
        self._dtype = np.dtype(_FIELDS + [("user", np.int64)] * has_users)
        self._events = self._events_read = 0
        folder.mkdir()

    def fill(
        self, table: int, file: Path, blocks: Iterable[Columns], bad: BadLines, index: ItemIndex
    ) -> Latest:
        """Write the events of a table; return the latest time, and its file and line."""
        latest: Latest | None = None
        for block in blocks:
            latest = later(latest, block)
            events = np.empty(len(block.lines), self._dtype)
            for name in block.frame.columns:
                is_item = name == "item"
                column = block.frame[name]
                events[name] = index.positions(column) if is_item else column.to_numpy()
            events["place"] = np.arange(self._events, self._events + len(events))
            self._events += len(events)
            self._append(table, events)
        if latest is None:
            raise InputError(f"{file} holds no readable event: {skipped_lines(bad.info())}")
        return latest

    def _append(self, table: int, events: np.ndarray) -> None:
        keys = events["session"].view(np.uint64) * _MIX >> np.uint64(32)
        part = (keys % np.uint64(self.parts)).astype(np.int64)
        ends = np.cumsum(np.bincount(part, minlength=self.parts))
        events = events[np.argsort(part, kind="stable")]
        for number, (low, high) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if high > low:
                with self._file(table, number).open("ab") as opened:
                    opened.write(events[low:high].data)

    def divide(self) -> None:
        """Divide parts that are too large, as those of a compressed log are."""
        wanted = min(self._events // PART_EVENTS + 1, MAX_PARTS)
        if wanted <= 2 * self.parts:
            return
        parts = [self._file(table, n) for table in range(self._tables) for n in range(self.parts)]
        of_table = np.repeat(np.arange(self._tables), self.parts).tolist()
        self.parts = wanted
        for table, file in zip(of_table, parts, strict=True):
            if file.exists():
                with file.open("rb") as opened:
                    while len(events := np.fromfile(opened, self._dtype, PART_EVENTS)):
                        self._append(table, events)
                file.unlink()

    def events(self, table: int, part: int) -> tuple[Events, np.ndarray]:
        """Return the events of a part, and their places, and remove them from disk."""
        file = self._file(table, part)
        spooled = np.zeros(0, self._dtype)
        if file.exists():
            spooled = np.fromfile(file, self._dtype)
            file.unlink()
        self._events_read += len(spooled)
        events = Events(
            spooled["session"].copy(),
            spooled["item"].copy(),
            spooled["time"].copy(),
            np.zeros(0, np.int64),
            spooled["user"].copy() if "user" in (self._dtype.names or ()) else None,
        )
        return events, spooled["place"].copy()

    def check(self) -> None:
        """Raise RunError unless all events were read that were written."""
        if self._events_read != self._events:
            raise changed(self._folder)

    def _file(self, table: int, part: int) -> Path:
        return self._folder / f"{table}-{part}-of-{self.parts}"
