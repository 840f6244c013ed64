"""The log of `tron prepare table` on disk, and the passes over its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.prepare.earlier import Earlier
from tron_cli.prepare.event_spool import EventSpool
from tron_cli.prepare.filters import Cleaning, Steps, Support, are_duplicates
from tron_cli.prepare.session_files import Bounds, SessionFile
from tron_cli.prepare.sessions import ItemIndex, first_keys, split_at_gaps, to_sessions
from tron_cli.prepare.sources.table_reader import TableReader
from tron_cli.prepare.split import Splits, Timeline
from tron_cli.prepare.write import Content, refuse_copies, refuse_empty_val

Splitter = Callable[[list[Sessions], int, Steps], tuple[Splits, int]]
"""(tables of a part, split sessions of earlier parts, steps) -> splits, and how many were split."""

BOUNDS_PER_PART = 256  # sessions, from which equal buckets are found


@dataclass
class Log:
    """Log of all tables as it was read, its events in a spool.

    tables: the files of each. item_ids: original ids of the items; latest: as in `Events`, of the
    first table. Known after `sessions` of all parts: duplicates, events of equal session, item and
    time; contents of several tables.
    """

    tables: list[list[Path]]
    spool: EventSpool
    item_ids: np.ndarray
    latest: tuple[int, str]
    reader: TableReader
    contents: list[Content]
    duplicates: int = 0

    def sessions(self, number: int, gap: int | None, steps: Steps) -> list[Sessions]:
        """Return the sessions of all tables in a part, and record them."""
        columns = self.reader.columns
        tables = []
        for table, content in enumerate(self.contents):
            events, places = self.spool.events(table, number)
            if gap is not None:
                keys = split_at_gaps(events.sessions, events.times, gap)
                events = replace(events, sessions=keys)
            sessions = to_sessions(events, places)
            if columns.session is None:  # parts of a log and whole histories have no ids
                sessions = replace(sessions, session_ids=None)
            self.duplicates += int(are_duplicates(sessions).sum())
            if len(self.contents) > 1:
                content.add(sessions)
            tables.append(sessions)
        kinds = f"only {', '.join(columns.keep_events)}" if columns.event else ""
        steps.record("kinds of events" if kinds else "read", tables, kinds)
        return tables


def read_log(tables: list[list[Path]], reader: TableReader, steps: Steps, scratch: Path) -> Log:
    """Read the tables, and record how many rows they have where only some kinds are used."""
    columns, bad, index = reader.columns, reader.bad, ItemIndex()
    spool = EventSpool(scratch / "events", tables, has_users=columns.user is not None)
    latest = [
        spool.fill(table, files[0], reader.read(files), bad, index)
        for table, files in enumerate(tables)
    ]
    spool.divide()
    reader.check(tables[0][0])
    bad.check_share(reader.rows)
    if columns.event:
        steps.count("read", None, reader.rows, None, "")
    return Log(tables, spool, index.ids(), latest[0], reader, [Content() for _ in tables])


class StoredSessions:
    """Sessions of all tables on disk, in parts, between the passes over them: each method is one.

    shared_sessions: of val and test, how many have ids that sessions of earlier splits have too;
    known after `split`.
    """

    def __init__(self, scratch: Path, log: Log, support: Support, steps: Steps) -> None:
        self._log, self._support, self._steps = log, support, steps
        self._parts = [
            [SessionFile(scratch / f"sessions-{table}-{part}") for table in range(len(log.tables))]
            for part in range(log.spool.parts)
        ]
        self._keys: list[tuple[np.ndarray, np.ndarray]] = []
        self.shared_sessions: Counter[str] = Counter()

    def fill(self, gap: int | None, cleaning: Cleaning, earlier: Earlier | None) -> None:
        """Store all sessions, cleaned and without short ones; earlier: of whole histories."""
        log, steps = self._log, self._steps
        is_known = None if earlier is None else earlier.numbers(log.item_ids) > 0
        for number, files in enumerate(self._parts):
            tables = cleaning.apply(log.sessions(number, gap, steps), steps)
            if earlier is not None and is_known is not None:
                tables = [earlier.known_histories(tables[0], is_known, steps)]
            _append(files, self._support.shortened(tables))
        log.spool.check()
        if len(log.tables) > 1:
            refuse_copies([files[0] for files in log.tables], log.contents)

    def timeline(self, table: int, min_session_length: int) -> Timeline:
        """Filter all sessions by support, and return the times of those of one table."""
        line = Timeline.of(self._filtered(table))
        if table:
            refuse_empty_val(len(line), self._log.tables[table][0], min_session_length)
        return line

    def _filtered(self, table: int) -> Iterator[Sessions]:
        for files in self._parts:
            tables = self._support.supported([file.read(remove=True) for file in files])
            _append(files, tables)
            for sessions in tables:
                some = slice(None, None, len(sessions) // BOUNDS_PER_PART + 1)
                starts, places = first_keys(sessions)
                self._keys.append((starts[some].copy(), places[some].copy()))
            yield tables[table]

    def bounds(self) -> Bounds:
        """Return bounds of as many buckets by start as there are parts."""
        return Bounds.of(self._keys, len(self._parts))

    def periods(self, split: Splitter) -> Iterator[Sessions]:
        """Yield the training period of each part."""
        for splits in self._split(split, Steps(), remove=False):
            yield splits.period

    def split(self, split: Splitter) -> Iterator[Splits]:
        """Yield the splits of each part, and remove its sessions from disk."""
        for splits in self._split(split, self._steps, remove=True):
            pairs = {"val": (splits.val, splits.train), "test": (splits.test, splits.period)}
            for name, (later, earlier) in pairs.items():
                if later.session_ids is not None and earlier.session_ids is not None:
                    shared = np.isin(later.session_ids, earlier.session_ids)
                    self.shared_sessions[name] += int(shared.sum())
            yield splits

    def _split(self, split: Splitter, steps: Steps, *, remove: bool) -> Iterator[Splits]:
        done = 0
        for files in self._parts:
            splits, rows = split([file.read(remove=remove) for file in files], done, steps)
            done += rows
            yield splits


def _append(files: list[SessionFile], tables: list[Sessions]) -> None:
    for file, sessions in zip(files, tables, strict=True):
        file.append(sessions)
