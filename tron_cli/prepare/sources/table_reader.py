"""Reader of a user's table, in any format, into sessions, items and times."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tron_cli.errors import InputError
from tron_cli.prepare.fetching.raw import PARQUET_MAGIC, first_bytes
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import Columns, Parser, read_delimited, read_json_lines
from tron_cli.prepare.reading.header import find_separator, header_line
from tron_cli.prepare.reading.ids import ids_of
from tron_cli.prepare.reading.parquet import read_parquet
from tron_cli.prepare.reading.times import FormatParser, TimeParser
from tron_cli.prepare.sessions import IdKeys

NULL_TOKENS = ("NULL", "null", "None", "NA", "N/A", "NaN", "nan", "\\N")  # of databases, pandas, R
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

    @property
    def ids(self) -> list[str]:
        """Columns of original ids."""
        return [name for name in (self.session, self.user, self.item) if name]

    @property
    def wanted(self) -> list[str]:
        """All columns to read."""
        return [*self.ids, self.time, *([self.event] if self.event else [])]

    def options(self, gap: int | None) -> dict[str, Any]:
        """Return the record of the columns in dataset.json; gap: the session gap in ms."""
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


class TableReader:
    """Reader of tables into session, item and time, which counts the readable rows of all kinds."""

    def __init__(self, columns: TableColumns, bad: BadLines) -> None:
        self.columns, self.bad = columns, bad
        self.rows = 0
        self.sessions, self.users = IdKeys(), IdKeys()
        self._ids, self._wanted = columns.ids, columns.wanted
        self.columns_read = [*self._ids, columns.time]
        if not columns.item or not columns.time:
            raise InputError("expected the name of a column for --item-col and --time-col")
        if len(set(self._wanted)) < len(self._wanted):
            raise InputError(f"expected different columns, got {', '.join(self._wanted)}")
        self._times = _time_parser(columns)
        ids = Parser(ids_of, "an id without line breaks", columns.null_tokens)
        self._parsers = {**dict.fromkeys(self._ids, ids), columns.time: self._times}
        self.kinds: set[str] = set()
        self._first: tuple[Path, dict[str, pl.DataType]] | None = None

    def read(self, files: Sequence[Path]) -> Iterator[Columns]:
        """Yield the int64 columns session, time and perhaps user, and the ids in item."""
        kept = 0
        for block in self.parsed(files):
            kept += len(block.lines)
            self._check_types(block.file, block.frame)
            yield replace(block, frame=self._keyed(block.frame))
        if not kept:
            self.check(files[0])  # may raise the reason

    def parsed(self, files: Sequence[Path]) -> Iterator[Columns]:
        """Yield `columns_read` of the kept events: ids as int64 or text, times in ms."""
        for file in files:
            for block in self._blocks(file):
                if self.columns.event:
                    # Other kinds, such as searches, may lack an item, so only their kind is read.
                    kind = block.parse({self.columns.event: _KIND}, self.bad).frame.to_series()
                    self.kinds.update(kind.unique().to_list())
                    is_kept = kind.is_in(self.columns.keep_events).to_numpy()
                    self.rows += int(np.count_nonzero(~is_kept))
                    block = block.where(is_kept)
                block = block.parse(self._parsers, self.bad)
                self.rows += len(block.lines)
                yield block

    @property
    def time_unit(self) -> str | None:
        """Unit of the times as they were read, iso, or None while it is not known."""
        return self._times.unit if isinstance(self._times, TimeParser) else None

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
        self.check_times(file)
        missing = [kind for kind in self.columns.keep_events if kind not in self.kinds]
        if missing:
            found = ", ".join(kind or "nothing" for kind in sorted(self.kinds)[:10])
            raise InputError(
                f"{file} has no event of the kind {' or '.join(missing)}: its "
                f"{self.columns.event} holds {found}{', ...' if len(self.kinds) > 10 else ''}; "
                "correct --keep-events"
            )

    def check_times(self, file: Path) -> None:
        """Refuse times that are mostly of another kind than the first."""
        self._times.check(file)

    def _blocks(self, file: Path) -> Iterator[Columns]:
        """Read a file by its content, whatever its name."""
        suffix = file.suffix.lower()
        if first_bytes(file).startswith(PARQUET_MAGIC) or suffix == ".parquet":
            return read_parquet(file, self._wanted)
        header = header_line(file)
        if header.startswith(("{", "[")):
            return read_json_lines(file, self._wanted, self.bad, ids=self._ids)
        # RecBole's files have no quoting.
        is_recbole = suffix == ".inter" or re.fullmatch(_RECBOLE_HEADER, header) is not None
        separator = "\t" if is_recbole else find_separator(file, header, self._wanted)
        return read_delimited(
            file, self._wanted, self.bad, separator=separator, quoted=not is_recbole
        )


def _time_parser(columns: TableColumns) -> TimeParser | FormatParser:
    if columns.time_format is None:
        return TimeParser(columns.time_unit)
    if columns.time_unit != "auto":
        raise InputError("--time-unit has no effect with --time-format: leave one of them out")
    return FormatParser(columns.time_format)


_KIND = Parser(lambda column: column.cast(pl.String).fill_null(""), "a kind of event")
