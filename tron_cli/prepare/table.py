"""A person's own log of events: CSV, TSV, RecBole's .inter, Parquet or JSON lines.

Whole sessions are split by when they start: the last `test_days` before the latest start test, the
`val_days` before those validate. Earlier sessions keep only their events before the stretch that is
held out, so that nothing is trained on what comes after the first event that is predicted.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from tron_cli.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.columns import (
    BadLines,
    Columns,
    Parser,
    find_columns,
    read_delimited,
    read_json_lines,
    read_parquet,
)
from tron_cli.prepare.events import IdKeys, collect_events, split_at_gaps, to_sessions
from tron_cli.prepare.filters import Cleaning, Steps, apply_filters, are_duplicates
from tron_cli.prepare.raw import PARQUET_MAGIC, first_bytes, open_raw
from tron_cli.prepare.split import Splits, by_start, sample_rows, split_by_time, split_last_items
from tron_cli.prepare.times import TimeParser
from tron_cli.prepare.write import dataset_path, in_order_of_appearance, write_splits

DEFAULT_GAP = "30m"
DEFAULT_TEST_DAYS = 1.0
NULL_TOKENS = ("NULL", "null", "None", "NA", "N/A", "NaN", "nan", "\\N")  # of databases, pandas, R
_MS_PER = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SEPARATORS = ",;\t|"
_TYPED = r"[^\t]+:(?:token|float)(?:_seq)?"
_RECBOLE_HEADER = rf"{_TYPED}(?:\t{_TYPED})+"


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table say what; exactly one of session and user is given.

    time_unit: auto, s, ms, us or ns. session_gap: a user's session ends where the next event is
    farther away than this, such as 30m; None keeps a user's events together. event, keep_events:
    only the events of these kinds. null_tokens: texts that are no session, user or item.
    """

    item: str
    time: str
    session: str | None = None
    user: str | None = None
    time_unit: str = "auto"
    session_gap: str | None = None
    event: str | None = None
    keep_events: tuple[str, ...] = ()
    null_tokens: tuple[str, ...] = NULL_TOKENS


def prepare_table(
    input_file: Path,
    columns: TableColumns,
    data_dir: Path,
    name: str,
    *,
    leave_one_out: bool = False,
    val_days: float = 1,
    test_days: float | None = None,
    min_session_length: int = 2,
    min_item_count: int = 5,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    force: bool = False,
    skip_bad_lines: bool = False,
    max_bad_share: float | None = None,
    drop_duplicates: bool = False,
    collapse_repeats: bool = False,
    max_session_length: int | None = None,
) -> Dataset:
    """Prepare a table of events, split by time, or leave-one-out (then val_days 0: no validation).

    The filters are those of the session-based literature: short sessions, rare items, and sessions
    that became short by that, each once. Leave-one-out needs at least three events of each.
    Before them come the cleanings that are asked for; see `Cleaning`.
    """
    gap = _checked_gap(columns, leave_one_out)
    if leave_one_out and test_days is not None:
        raise InputError(
            "--test-days goes with a split by time; leave-one-out tests on the last event of each"
        )
    test_days = DEFAULT_TEST_DAYS if test_days is None else test_days
    cleaning = Cleaning(drop_duplicates, collapse_repeats, max_session_length)
    _check_lengths(max_session_length, min_session_length, leave_one_out)
    with DatasetWriter(dataset_path(data_dir, name, input_file), force=force) as writer:
        bad = BadLines(skip=skip_bad_lines, max_share=max_bad_share)
        steps = Steps()
        reader = _TableReader(input_file, columns, bad)
        events = collect_events(input_file, iter(reader), bad)
        bad.check_share(reader.rows)
        if columns.event:
            steps.count("read", None, reader.rows, None, "")
        if gap is not None:
            events = replace(events, sessions=split_at_gaps(events.sessions, events.times, gap))
        sessions = to_sessions(events)
        if columns.session is None:  # neither pieces of a log nor whole histories have ids
            sessions = replace(sessions, session_ids=None)
        kinds = f"only {', '.join(columns.keep_events)}" if columns.event else ""
        steps.record("kinds of events" if kinds else "read", sessions, kinds)
        duplicates = int(np.count_nonzero(are_duplicates(sessions)))
        sessions = cleaning.apply(sessions, steps)
        sessions = apply_filters(
            sessions,
            steps,
            min_session_length=max(min_session_length, 3 if leave_one_out else 2),
            min_item_count=min_item_count,
        )
        if leave_one_out:
            splits = _leave_one_out(sessions, steps, val_days > 0, max_val_sessions, seed)
        else:
            splits = split_by_time(
                sessions,
                by_start,
                steps,
                test_days=test_days,
                val_days=val_days,
                max_val_sessions=max_val_sessions,
                seed=seed,
                cut_late_events=True,
            )
        return write_splits(
            writer,
            splits,
            item_ids=events.item_ids,
            catalogue=in_order_of_appearance(splits.period),
            name=name,
            protocol="last-item" if leave_one_out else "every-step",
            source="table",
            options={
                "input": str(input_file),
                "item_col": columns.item,
                "time_col": columns.time,
                "time_unit": columns.time_unit,
                "session_col": columns.session,
                "user_col": columns.user,
                "session_gap_ms": gap,
                "event_col": columns.event,
                "keep_events": list(columns.keep_events),
                "null_tokens": list(columns.null_tokens),
                "split": "leave-one-out" if leave_one_out else "time",
                "val_days": val_days,
                "test_days": None if leave_one_out else test_days,
                "min_session_length": min_session_length,
                "min_item_count": min_item_count,
                "max_val_sessions": max_val_sessions,
                "seed": seed,
                "skip_bad_lines": skip_bad_lines,
                "max_bad_share": max_bad_share,
                **asdict(cleaning),
            },
            duplicate_events=duplicates,
            files=[input_file],
            steps=steps,
            bad=bad,
            session_keys=reader.owners,
            user_keys=reader.owners,
        )


def _checked_gap(columns: TableColumns, leave_one_out: bool) -> int | None:
    """The session gap in ms, None where the sessions (or whole histories) are given."""
    if (columns.session is None) == (columns.user is None):
        raise InputError("expected exactly one of --session-col and --user-col")
    if bool(columns.event) != bool(columns.keep_events):
        raise InputError("--event-col and --keep-events go together: give both or none")
    if columns.session_gap and (columns.user is None or leave_one_out):
        raise InputError("--session-gap goes with --user-col and a split by time")
    if columns.user is None or leave_one_out:
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
    """Milliseconds of a duration such as 90s, 30m, 1.5h or 2d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise InputError(f"--session-gap {text!r}: expected a duration such as 90s, 30m, 2h or 1d")
    return round(float(match[1]) * _MS_PER[match[2]])


def _leave_one_out(
    sessions: Sessions, steps: Steps, validate: bool, max_val: int, seed: int
) -> Splits:
    rows = sample_rows(len(sessions), max_val if validate else 0, seed)
    # Everyone keeps the second last item from training, whoever of them validates.
    held_back = np.full(len(sessions), 2 if validate else 1)
    return split_last_items(sessions, rows, steps, train_without=held_back)


class _TableReader:
    """The blocks of a table as session, item and time; counts the readable rows of all kinds."""

    def __init__(self, file: Path, columns: TableColumns, bad: BadLines) -> None:
        if not file.is_file():
            raise InputError(f"--input {file} is not a file")
        self.file, self.columns, self.bad = file, columns, bad
        self.rows = 0
        self.owners = IdKeys()  # sessions or users

    def __iter__(self) -> Iterator[Columns]:
        owner = self.columns.session or self.columns.user
        assert owner is not None
        wanted = [owner, self.columns.item, self.columns.time]
        ids = Parser(_ids, "an id in one line", self.columns.null_tokens)
        times = TimeParser(self.columns.time_unit)
        parsers = {owner: ids, self.columns.item: ids, self.columns.time: times}
        if self.columns.event:
            wanted.append(self.columns.event)
        if len(set(wanted)) < len(wanted):
            raise InputError(f"expected different columns, got {', '.join(wanted)}")
        kinds: set[str] = set()
        for block in self._blocks(wanted):
            if self.columns.event:
                # A search has no item: nothing else of the other kinds is read.
                kind = block.parse({self.columns.event: _KIND}, self.bad).frame.to_series()
                kinds.update(kind.unique().to_list())
                is_kept = kind.is_in(self.columns.keep_events).to_numpy()
                self.rows += int(np.count_nonzero(~is_kept))
                block = block.where(is_kept)
            block = block.parse(parsers, self.bad)
            self.rows += len(block.lines)
            frame = block.frame
            keys = pl.Series(self.owners.keys(frame[owner]))
            frame = frame.select(session=keys, item=self.columns.item, time=self.columns.time)
            if self.columns.user:
                frame = frame.with_columns(user="session")
            yield replace(block, frame=frame)
        times.check(self.file)
        missing = [kind for kind in self.columns.keep_events if kind not in kinds]
        if missing:
            found = ", ".join(kind or "nothing" for kind in sorted(kinds)[:10])
            raise InputError(
                f"{self.file} has no event of the kind {' or '.join(missing)}: its "
                f"{self.columns.event} holds {found}{', ...' if len(kinds) > 10 else ''}; correct "
                "--keep-events"
            )

    def _blocks(self, wanted: list[str]) -> Iterator[Columns]:
        """Read the file as what it is, whatever its name says."""
        suffix = self.file.suffix.lower()
        if first_bytes(self.file).startswith(PARQUET_MAGIC) or suffix == ".parquet":
            return read_parquet(self.file, wanted)
        header = _header(self.file)
        if header.startswith(("{", "[")):
            return read_json_lines(self.file, wanted, self.bad, ids=wanted[:2])
        # RecBole's files have no quoting.
        is_recbole = suffix == ".inter" or re.fullmatch(_RECBOLE_HEADER, header) is not None
        separator = "\t" if is_recbole else _separator(self.file, header, wanted)
        return read_delimited(
            self.file, wanted, self.bad, separator=separator, quoted=not is_recbole
        )


def _header(file: Path) -> str:
    """Return the first line that is not blank, without its end."""
    with open_raw(file) as content:
        lines = iter(partial(content.readline, 1 << 16), b"")
        header = next((line for line in lines if line.strip(b"\r\n")), b"")
    return header.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").strip("\r\n")


def _separator(file: Path, header: str, wanted: list[str]) -> str:
    """Return the separator that the header has most often of those that give the wanted columns."""
    by_count = sorted(_SEPARATORS, key=header.count, reverse=True)
    for separator in by_count:
        with suppress(InputError, csv.Error):
            find_columns(file, next(csv.reader([header], delimiter=separator)), wanted)
            return separator
    return by_count[0]


def _ids(column: pl.Series) -> pl.Series:
    """Integers as they are, also where they are stored as floats; everything else as text."""
    if column.dtype == pl.Boolean:
        raise TypeError(column.dtype)
    if column.dtype.is_float():
        integers = column.cast(pl.Int64, strict=False)
        inexact = column.filter(column.is_finite() & (column.abs() >= _EXACT[type(column.dtype)]))
        if len(inexact):
            raise InputError(
                f"ids such as {inexact[0]:.0f} are not exact as {column.dtype}; store the ids as "
                "integers or as text"
            )
        return integers.set(integers != column, None)
    if column.dtype.is_integer() and column.dtype not in (pl.UInt64, pl.Int128, pl.UInt128):
        return column.cast(pl.Int64)
    ids = column.cast(pl.String)
    # The ids are kept one a line, and NUL stands in no text.
    return ids.set((ids == "") | ids.str.contains(r"[\r\n\x00]"), None)


# Below these every integer is a float of its own.
_EXACT: dict[type, int] = {pl.Float16: 2**11, pl.Float32: 2**24, pl.Float64: 2**53}
_KIND = Parser(lambda column: column.cast(pl.String).fill_null(""), "a kind of event")
