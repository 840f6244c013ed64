"""A user's own log of events: CSV, TSV, RecBole's .inter, Parquet or JSON lines.

Whole sessions are split by when they start: the last `test_days` before the latest start are the
test split, the `val_days` before them validation. Earlier sessions keep only their events before
the held-out period, so that training sees nothing later than the first event that is predicted. Or
the held-out periods begin at fixed dates, or the splits are separate tables.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.earlier import earlier_catalogue
from tron_cli.prepare.fetching.raw import PARQUET_MAGIC, first_bytes, open_raw
from tron_cli.prepare.filters import Cleaning, Steps, apply_filters, are_duplicates
from tron_cli.prepare.reading.columns import (
    BadLines,
    Columns,
    Parser,
    find_columns,
    read_delimited,
    read_json_lines,
    read_parquet,
)
from tron_cli.prepare.reading.ids import ids_of
from tron_cli.prepare.reading.inputs import check_distinct, input_files
from tron_cli.prepare.reading.times import FormatParser, TimeParser, from_iso
from tron_cli.prepare.sessions import (
    Events,
    IdKeys,
    ItemIndex,
    collect_events,
    joined,
    split_at_gaps,
    to_sessions,
)
from tron_cli.prepare.split import (
    Splits,
    by_start,
    sample,
    sample_rows,
    split_by_time,
    split_last_items,
)
from tron_cli.prepare.write import (
    dataset_path,
    in_order_of_appearance,
    refuse_copies,
    refuse_empty_val,
    write_splits,
)

DEFAULT_GAP = "30m"
MAX_GAP = 1000 * 365 * 86_400_000  # ms
DEFAULT_DAYS = 1.0  # of validation and of test
NULL_TOKENS = ("NULL", "null", "None", "NA", "N/A", "NaN", "nan", "\\N")  # of databases, pandas, R
_MS_PER = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SEPARATORS = ",;\t|"
_TYPED = r"[^\t]+:(?:token|float)(?:_seq)?"
_RECBOLE_HEADER = rf"{_TYPED}(?:\t{_TYPED})+"


@dataclass(frozen=True)
class TableColumns:
    """Columns of a table; session, user or both, where session ids are unique per user.

    time_unit: auto, s, ms, us or ns. time_format: of times that are neither ISO 8601 nor numbers,
    such as %d/%m/%Y. session_gap: the pause after which a user's session ends, such as 30m; None
    keeps a user's events together. event, keep_events: only events of these kinds are used.
    null_tokens: texts that mean a missing session, user or item.
    """

    item: str
    time: str
    session: str | None = None
    user: str | None = None
    time_unit: str = "auto"
    time_format: str | None = None
    session_gap: str | None = None
    event: str | None = None
    keep_events: tuple[str, ...] = ()
    null_tokens: tuple[str, ...] = NULL_TOKENS

    def options(self, gap: int | None) -> dict[str, Any]:
        """Return what dataset.json records of the columns; gap: the session gap in ms."""
        return {
            "item_col": self.item,
            "time_col": self.time,
            "time_unit": self.time_unit,
            "time_format": self.time_format,
            "session_col": self.session,
            "user_col": self.user,
            "session_gap_ms": gap,
            "event_col": self.event,
            "keep_events": list(self.keep_events),
            "null_tokens": list(self.null_tokens),
        }


def prepare_table(
    inputs: Path | Sequence[Path],
    columns: TableColumns,
    data_dir: Path,
    name: str,
    *,
    val: Sequence[Path] = (),
    test: Sequence[Path] = (),
    leave_one_out: bool = False,
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
) -> Dataset:
    """Prepare a table of events, split by time, or leave-one-out (then val_days 0: no validation).

    inputs, val, test: files, folders of parts or patterns. With `test` they are the splits: inputs
    trains, and validates in its last stretch where `val` is not given. val_days, test_days: 1
    unless a stretch begins at a date (val_from, test_from: ISO 8601, UTC where it names no zone).

    The filters are those of the session-based literature: short sessions, rare items (fewer than
    min_item_count events: 5, or 1 where the splits, of which test does not count, or an earlier
    catalogue are given), and
    sessions that became short by that, each once. Leave-one-out needs at least three events of
    each. Before them come the cleanings that are asked for; see `Cleaning`.
    """
    gap = _checked_gap(columns, leave_one_out)
    rule = _SplitRule(
        leave_one_out=leave_one_out,
        has_val=bool(val),
        has_test=bool(test),
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
    given = [inputs] if isinstance(inputs, Path) else inputs
    options = ("--train", "--val", "--test") if test else ("--input", "--val", "--test")
    files = {
        option: input_files(paths, option)
        for option, paths in zip(options, (given, val, test), strict=True)
        if paths
    }
    all_files = [file for part in files.values() for file in part]
    check_distinct(all_files)
    with DatasetWriter(dataset_path(data_dir, name, *all_files), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        bad = BadLines(skip=skip_bad_lines, max_share=max_bad_share)
        steps = Steps()
        reader = _TableReader(columns, bad)
        index = ItemIndex()
        logs = [collect_events(part[0], reader.read(part), bad, index) for part in files.values()]
        reader.check(all_files[0])
        bad.check_share(reader.rows)
        if columns.event:
            steps.count("read", None, reader.rows, None, "")
        parts = [_sessions(events, columns, gap) for events in logs]
        refuse_copies([part[0] for part in files.values()], parts)
        kinds = f"only {', '.join(columns.keep_events)}" if columns.event else ""
        steps.record("kinds of events" if kinds else "read", parts, kinds)
        duplicates = sum(int(np.count_nonzero(are_duplicates(part))) for part in parts)
        parts = cleaning.apply(parts, steps)
        if earlier is not None and leave_one_out:
            parts = [earlier.known_histories(parts[0], logs[0].item_ids, steps)]
        parts = apply_filters(
            parts,
            steps,
            min_session_length=max(min_session_length, 3 if leave_one_out else 2),
            min_item_count=min_item_count,
        )
        if val:
            refuse_empty_val(parts[1], files["--val"][0], max(min_session_length, 2))
        splits = rule.apply(parts, steps, logs[0].latest)
        return write_splits(
            writer,
            splits,
            item_ids=logs[-1].item_ids,
            catalogue=in_order_of_appearance(splits.period),
            name=name,
            protocol="last-item" if leave_one_out else "every-step",
            source="table",
            options={
                "input": [str(path) for path in given],
                "val": [str(path) for path in val],
                "test": [str(path) for path in test],
                **columns.options(gap),
                **rule.options(),
                "min_session_length": min_session_length,
                "min_item_count": min_item_count,
                "skip_bad_lines": skip_bad_lines,
                "catalogue": catalogue,
                "max_bad_share": max_bad_share,
                **asdict(cleaning),
            },
            duplicate_events=duplicates,
            shared_sessions=_shared_sessions(splits) if test else {},
            files=all_files,
            steps=steps,
            bad=bad,
            earlier=earlier,
            session_keys=reader.sessions,
            user_keys=reader.users,
        )


def _sessions(events: Events, columns: TableColumns, gap: int | None) -> Sessions:
    if gap is not None:
        events = replace(events, sessions=split_at_gaps(events.sessions, events.times, gap))
    sessions = to_sessions(events)
    if columns.session is None:  # parts of a log and whole histories have no ids
        sessions = replace(sessions, session_ids=None)
    return sessions


def _shared_sessions(splits: Splits) -> dict[str, int]:
    """Count sessions of val and test with ids that sessions of earlier splits have as well."""
    pairs = {"val": (splits.val, splits.train), "test": (splits.test, splits.period)}
    return {
        split: int(np.isin(later.session_ids, earlier.session_ids).sum())
        for split, (later, earlier) in pairs.items()
        if later.session_ids is not None and earlier.session_ids is not None
    }


@dataclass(frozen=True)
class _SplitRule:
    """Options of the split as they are given, checked; see `prepare_table`."""

    leave_one_out: bool
    has_val: bool
    has_test: bool
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
        for option, value, other, is_given in (
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

    def apply(self, parts: list[Sessions], steps: Steps, latest: tuple[int, str]) -> Splits:
        """Split one table, or take the given ones; latest: as in `split_by_time`."""
        sessions, val_days = parts[0], _days(self.val_days)
        if self.leave_one_out:
            validate = val_days > 0
            rows = sample_rows(len(sessions), self.max_val_sessions if validate else 0, self.seed)
            # All histories keep the second last item from training, whether or not they validate.
            held_back = np.full(len(sessions), 2 if validate else 1)
            return split_last_items(sessions, rows, steps, train_without=held_back)
        if self.has_val:
            sampled = sample(parts[1], self.max_val_sessions, self.seed, steps)
            return Splits(joined(parts[:2]), sessions, sampled, parts[2])
        val_ms, test_ms = self._dates()
        return split_by_time(
            sessions,
            by_start,
            steps,
            test_days=_days(self.test_days),
            val_days=val_days,
            max_val_sessions=self.max_val_sessions,
            seed=self.seed,
            latest=latest,
            cut_late_events=True,
            test=parts[1] if self.has_test else None,
            val_from=val_ms,
            test_from=test_ms,
        )

    def options(self) -> dict[str, Any]:
        """Return what dataset.json records of the split."""
        has_test_days = not (self.leave_one_out or self.has_test or self.test_from)
        return {
            "split": (
                "leave-one-out" if self.leave_one_out else "given" if self.has_test else "time"
            ),
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


class _TableReader:
    """Reads tables into session, item and time; counts the readable rows of all kinds."""

    def __init__(self, columns: TableColumns, bad: BadLines) -> None:
        self.columns, self.bad = columns, bad
        self.rows = 0
        self.sessions, self.users = IdKeys(), IdKeys()
        self._ids = [name for name in (columns.session, columns.user, columns.item) if name]
        self._wanted = [*self._ids, columns.time, *([columns.event] if columns.event else [])]
        if not columns.item or not columns.time:
            raise InputError("expected the name of a column for --item-col and --time-col")
        if len(set(self._wanted)) < len(self._wanted):
            raise InputError(f"expected different columns, got {', '.join(self._wanted)}")
        self._times = _time_parser(columns)
        ids = Parser(ids_of, "an id in one line", columns.null_tokens)
        self._parsers = {**dict.fromkeys(self._ids, ids), columns.time: self._times}
        self._kinds: set[str] = set()
        self._first: tuple[Path, dict[str, pl.DataType]] | None = None

    def read(self, files: Sequence[Path]) -> Iterator[Columns]:
        """Yield the int64 columns session, time and perhaps user, and the ids in item."""
        kept = 0
        for file in files:
            for block in self._blocks(file):
                if self.columns.event:
                    # Other kinds may lack an item, as searches do, so nothing else of them is read.
                    kind = block.parse({self.columns.event: _KIND}, self.bad).frame.to_series()
                    self._kinds.update(kind.unique().to_list())
                    is_kept = kind.is_in(self.columns.keep_events).to_numpy()
                    self.rows += int(np.count_nonzero(~is_kept))
                    block = block.where(is_kept)
                block = block.parse(self._parsers, self.bad)
                self.rows += len(block.lines)
                kept += len(block.lines)
                self._check_types(file, block.frame)
                yield replace(block, frame=self._keyed(block.frame))
        if not kept:
            self.check(files[0])  # may raise the reason

    def _keyed(self, frame: pl.DataFrame) -> pl.DataFrame:
        session, user = self.columns.session, self.columns.user
        users = frame[user] if user else None
        keys = {} if users is None else {"user": self.users.keys(users)}
        if session:
            keys["session"] = self.sessions.keys(frame[session], users)
        else:
            keys["session"] = keys["user"]
        named = frame.select(item=self.columns.item, time=self.columns.time)
        return named.with_columns(**{name: pl.Series(values) for name, values in keys.items()})

    def _check_types(self, file: Path, frame: pl.DataFrame) -> None:
        types = {name: frame[name].dtype for name in self._ids}
        self._first = self._first or (file, types)
        for name, dtype in types.items():
            if dtype != self._first[1][name]:
                kind, other = (
                    "integers" if of == pl.Int64 else "text" for of in (dtype, self._first[1][name])
                )
                raise InputError(
                    f"{file}: {name} holds {kind}, but {other} in {self._first[0]}; store the ids "
                    "of all files alike"
                )

    def check(self, file: Path) -> None:
        """Refuse times that are mostly of another kind, and kinds of events that do not occur."""
        self._times.check(file)
        missing = [kind for kind in self.columns.keep_events if kind not in self._kinds]
        if missing:
            found = ", ".join(kind or "nothing" for kind in sorted(self._kinds)[:10])
            raise InputError(
                f"{file} has no event of the kind {' or '.join(missing)}: its "
                f"{self.columns.event} holds {found}{', ...' if len(self._kinds) > 10 else ''}; "
                "correct --keep-events"
            )

    def _blocks(self, file: Path) -> Iterator[Columns]:
        """Read a file by its content, whatever its name."""
        suffix = file.suffix.lower()
        if first_bytes(file).startswith(PARQUET_MAGIC) or suffix == ".parquet":
            return read_parquet(file, self._wanted)
        header = _header(file)
        if header.startswith(("{", "[")):
            return read_json_lines(file, self._wanted, self.bad, ids=self._ids)
        # RecBole's files have no quoting.
        is_recbole = suffix == ".inter" or re.fullmatch(_RECBOLE_HEADER, header) is not None
        separator = "\t" if is_recbole else _separator(file, header, self._wanted)
        return read_delimited(
            file, self._wanted, self.bad, separator=separator, quoted=not is_recbole
        )


def _time_parser(columns: TableColumns) -> TimeParser | FormatParser:
    if columns.time_format is None:
        return TimeParser(columns.time_unit)
    if columns.time_unit != "auto":
        raise InputError("--time-unit has no effect with --time-format: leave one of them out")
    return FormatParser(columns.time_format)


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


_KIND = Parser(lambda column: column.cast(pl.String).fill_null(""), "a kind of event")
