"""A user's own log of events: CSV, TSV, RecBole's .inter, Parquet or JSON lines.

Whole sessions are split by when they start: the last `test_days` before the latest start are the
test split, the `val_days` before them validation. Earlier sessions keep only their events before
the held-out period, so that training sees nothing later than the first event that is predicted. Or
the held-out periods begin at fixed dates, or the splits are separate tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.earlier import earlier_catalogue
from tron_cli.prepare.filters import Cleaning, Steps, Support
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.inputs import check_distinct, input_files
from tron_cli.prepare.reading.times import from_iso
from tron_cli.prepare.sessions import joined, take_where
from tron_cli.prepare.sources.table_parts import Splitter, StoredSessions, read_log
from tron_cli.prepare.sources.table_reader import TableColumns, TableReader
from tron_cli.prepare.split import (
    Splits,
    Timeline,
    TimeSplit,
    ValUsers,
    check_val_users,
    record_sample,
    split_by_time,
    split_last_items,
)
from tron_cli.prepare.write import dataset_path, in_order_of_appearance, write_splits

DEFAULT_GAP = "30m"
MAX_GAP = 1000 * 365 * 86_400_000  # ms
DEFAULT_DAYS = 1.0  # of validation and of test
_MS_PER = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def prepare_table(
    inputs: Path | Sequence[Path],
    columns: TableColumns,
    data_dir: Path,
    name: str,
    *,
    val: Sequence[Path] = (),
    test: Sequence[Path] = (),
    leave_one_out: bool = False,
    val_users: ValUsers | None = None,
    val_days: float | None = None,
    test_days: float | None = None,
    val_from: str | None = None,
    test_from: str | None = None,
    min_session_length: int = 2,
    min_item_count: int | None = None,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    force: bool = False,
    skip_bad_lines: bool = False,
    max_bad_share: float | None = None,
    drop_duplicates: bool = False,
    collapse_repeats: bool = False,
    max_session_length: int | None = None,
    catalogue: str | None = None,
    frames: Path | None = None,
    reader: TableReader | None = None,
) -> Dataset:
    """Prepare a table of events, split by time, or leave-one-out (then val_days 0: no validation).

    inputs, val, test: files, folders of parts or patterns. With `test` they are the splits: inputs
    trains, and validates in its last stretch where `val` is not given. val_days, test_days: 1
    unless a stretch begins at a date (val_from, test_from: ISO 8601, UTC where it names no zone).
    val_users: with leave-one-out, how many users validate; default: at most max_val_sessions.
    frames: a folder of files that hold data frames, which dataset.json names without it. reader:
    reads the inputs instead of a `TableReader` of the columns and bad lines.

    The filters are those of the session-based literature: short sessions, rare items (fewer than
    min_item_count events: 5, or 1 where the splits, of which test does not count, or an earlier
    catalogue are given), and sessions that became short by that, each once. Leave-one-out needs at
    least three events of each. Before them come the cleanings that are asked for; see `Cleaning`.
    """
    gap = _checked_gap(columns, leave_one_out)
    rule = _SplitRule(
        leave_one_out=leave_one_out,
        has_val=bool(val),
        has_test=bool(test),
        val_users=val_users,
        val_days=val_days,
        test_days=test_days,
        val_from=val_from,
        test_from=test_from,
        max_val_sessions=max_val_sessions,
        seed=seed,
    )
    cleaning = Cleaning(drop_duplicates, collapse_repeats, max_session_length)
    _check_lengths(max_session_length, min_session_length, leave_one_out)
    min_item_count = min_item_count or (1 if test or catalogue else 5)
    given = {"input": [inputs] if isinstance(inputs, Path) else inputs, "val": val, "test": test}
    options = {
        **_recorded(given, frames),
        **columns.options(gap),
        **rule.options(),
        "min_session_length": min_session_length,
        "min_item_count": min_item_count,
        "skip_bad_lines": skip_bad_lines,
        "catalogue": catalogue,
        "max_bad_share": max_bad_share,
        **asdict(cleaning),
    }
    tables = _files_of_tables(given)
    files = [file for table in tables for file in table]
    with DatasetWriter(dataset_path(data_dir, name, *files), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        steps = Steps()
        bad = BadLines(skip=skip_bad_lines, max_share=max_bad_share)
        log = read_log(tables, reader or TableReader(columns, bad), steps, writer.scratch)
        least = max(min_session_length, 3 if leave_one_out else 2)
        support = Support(steps, min_session_length=least, min_item_count=min_item_count)
        stored = StoredSessions(writer.scratch, log, support, steps)
        stored.fill(gap, cleaning, earlier if leave_one_out else None)
        split = rule.splitter(stored.timeline(rule.split_table, least), log.latest)
        return write_splits(
            writer,
            stored.split(split),
            item_ids=log.item_ids,
            catalogue=in_order_of_appearance(stored.periods(split)),
            bounds=stored.bounds(),
            name=name,
            protocol="last-item" if leave_one_out else "every-step",
            source="table",
            options=options,
            duplicate_events=log.duplicates,
            shared_sessions=stored.shared_sessions if test else {},
            files=files,
            steps=steps,
            bad=log.reader.bad,
            earlier=earlier,
            session_keys=log.reader.sessions,
            user_keys=log.reader.users,
        )


def _recorded(given: dict[str, Sequence[Path]], frames: Path | None) -> dict[str, list[str]]:
    """Return the record of the given paths in dataset.json."""
    return {
        option: [path.name if path.parent == frames else str(path) for path in paths]
        for option, paths in given.items()
    }


def _files_of_tables(given: dict[str, Sequence[Path]]) -> list[list[Path]]:
    """Return the files of each table: the one to split, or train, perhaps val, and test."""
    tables = [
        input_files(paths, "--train" if option == "input" and given["test"] else f"--{option}")
        for option, paths in given.items()
        if paths
    ]
    check_distinct([file for table in tables for file in table])
    return tables


@dataclass(frozen=True)
class _SplitRule:
    """Options of the split as they are given, checked; see `prepare_table`."""

    leave_one_out: bool
    has_val: bool
    has_test: bool
    val_users: ValUsers | None
    val_days: float | None
    test_days: float | None
    val_from: str | None
    test_from: str | None
    max_val_sessions: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for options that contradict each other."""
        if self.has_val and not self.has_test:
            raise InputError("--val goes with --train and --test: tables that are already split")
        if self.val_users is not None:
            check_val_users(self.val_users)
        for option, value, other, is_given in (
            ("--val-users", self.val_users, "--split time", not self.leave_one_out),
            ("--val-users", self.val_users, "--val-days 0", self.val_days == 0),
            ("--test", self.has_test or None, "--split leave-one-out", self.leave_one_out),
            ("--test-days", self.test_days, "--split leave-one-out", self.leave_one_out),
            ("--test-from", self.test_from, "--split leave-one-out", self.leave_one_out),
            ("--val-from", self.val_from, "--split leave-one-out", self.leave_one_out),
            ("--test-days", self.test_days, "--test", self.has_test),
            ("--test-from", self.test_from, "--test", self.has_test),
            ("--val-days", self.val_days, "--val", self.has_val),
            ("--val-from", self.val_from, "--val", self.has_val),
            ("--test-days", self.test_days, "--test-from", self.test_from is not None),
            ("--val-days", self.val_days, "--val-from", self.val_from is not None),
        ):
            if value is not None and is_given:
                raise InputError(f"{option} has no effect with {other}: leave one of them out")
        val_ms, test_ms = self._dates()
        if val_ms is not None and test_ms is not None and val_ms >= test_ms:
            raise InputError(
                f"--val-from {self.val_from} is not before --test-from {self.test_from}: "
                "validation is the last stretch before the test"
            )

    @property
    def split_table(self) -> int:
        """Table whose sessions are split, or sampled for validation."""
        return 1 if self.has_val else 0

    def splitter(self, line: Timeline, latest: tuple[int, str]) -> Splitter:
        """Return the function that splits a part of the tables; latest: as in `split_by_time`.

        line: of all sessions in `split_table`.
        """
        val_days, everyone = _days(self.val_days), np.ones(len(line), bool)
        if self.leave_one_out or self.has_val:
            given = self.val_users if self.leave_one_out else None
            most = len(line) if given == "all" else given or self.max_val_sessions
            most = most if val_days > 0 or self.has_val else 0
            in_val = line.sample(everyone, most, self.seed)
            return partial(self._last_items if self.leave_one_out else self._given, in_val, most)
        val_ms, test_ms = self._dates()
        by_time = split_by_time(
            line,
            test_days=_days(self.test_days),
            val_days=val_days,
            max_val_sessions=self.max_val_sessions,
            seed=self.seed,
            latest=latest,
            cut_late_events=True,
            has_test=self.has_test,
            val_from=val_ms,
            test_from=test_ms,
        )
        return partial(self._by_time, by_time)

    @staticmethod
    def _by_time(
        by_time: TimeSplit, tables: list[Sessions], done: int, steps: Steps
    ) -> tuple[Splits, int]:
        sessions, *given = tables
        splits = by_time(sessions, slice(done, done + len(sessions)), steps)
        return (replace(splits, test=given[0]) if given else splits), len(sessions)

    @staticmethod
    def _last_items(
        in_val: np.ndarray, most: int, tables: list[Sessions], done: int, steps: Steps
    ) -> tuple[Splits, int]:
        (histories,) = tables
        rows = np.flatnonzero(in_val[done : done + len(histories)])
        held_back = np.full(len(histories), 2 if most else 1)
        return split_last_items(histories, rows, steps, train_without=held_back), len(histories)

    @staticmethod
    def _given(
        in_val: np.ndarray, most: int, tables: list[Sessions], done: int, steps: Steps
    ) -> tuple[Splits, int]:
        train, val, test = tables
        sampled = take_where(val, in_val[done : done + len(val)])
        record_sample(val, sampled, most, steps)
        return Splits(joined([train, val]), train, sampled, test), len(val)

    def options(self) -> dict[str, Any]:
        """Return the record of the split in dataset.json."""
        has_test_days = not (self.leave_one_out or self.has_test or self.test_from)
        return {
            "split": (
                "leave-one-out" if self.leave_one_out else "given" if self.has_test else "time"
            ),
            "val_users": self.val_users,
            "val_days": None if self.has_val or self.val_from else _days(self.val_days),
            "test_days": _days(self.test_days) if has_test_days else None,
            "val_from": self.val_from,
            "test_from": self.test_from,
            "max_val_sessions": self.max_val_sessions,
            "seed": self.seed,
        }

    def _dates(self) -> tuple[int | None, int | None]:
        return _date("--val-from", self.val_from), _date("--test-from", self.test_from)


def _days(given: float | None) -> float:
    return DEFAULT_DAYS if given is None else given


def _date(option: str, text: str | None) -> int | None:
    """Parse an ISO date or time, UTC where it names no zone, to milliseconds since 1970 UTC."""
    if text is None:
        return None
    times = from_iso(pl.Series([text.strip()]))
    if times[0] is None:
        raise InputError(
            f"{option} {text!r}: expected a date or time such as 2024-01-31, 2024-01-31T12:00 or "
            "2024-01-31T12:00+02:00"
        )
    return int(times[0])


def _checked_gap(columns: TableColumns, leave_one_out: bool) -> int | None:
    """Return the session gap in ms, None where the sessions (or whole histories) are given."""
    if columns.session is None and columns.user is None:
        raise InputError("expected --session-col, --user-col or both")
    if columns.session and columns.user and leave_one_out:
        raise InputError(
            "--split leave-one-out takes --user-col or --session-col, not both: one of them says "
            "what a history is"
        )
    if bool(columns.event) != bool(columns.keep_events):
        raise InputError("--event-col and --keep-events go together: give both or none")
    if columns.session_gap and (columns.session or leave_one_out):
        raise InputError(
            "--session-gap cuts the logs of users into sessions: it goes with --user-col, without "
            "--session-col and --split leave-one-out"
        )
    if columns.session or leave_one_out:
        return None
    return duration(columns.session_gap or DEFAULT_GAP)


def _check_lengths(most: int | None, least: int, leave_one_out: bool) -> None:
    needed = "leave-one-out needs 3" if leave_one_out and least < 3 else ""
    if most is not None and most < max(least, 3 if leave_one_out else 2):
        raise InputError(
            f"--max-session-length {most} leaves no session: "
            f"{needed or f'--min-session-length {least} asks for more'}"
        )


def duration(text: str) -> int:
    """Parse a duration such as 90s, 30m, 1.5h or 2d to milliseconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise InputError(f"--session-gap {text!r}: expected a duration such as 90s, 30m, 2h or 1d")
    milliseconds = float(match[1]) * _MS_PER[match[2]]
    if milliseconds > MAX_GAP:
        raise InputError(
            f"--session-gap {text!r} is longer than a thousand years: name a pause after which a "
            "session has ended, such as 30m"
        )
    return round(milliseconds)
