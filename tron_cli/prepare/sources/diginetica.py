"""Diginetica item views (CIKM Cup 2016), filtered and split as TRON does, but in UTC.

`train-item-views.csv`: `sessionId;userId;itemId;timeframe;eventdate`, where timeframe is
milliseconds since the session began; an event's time is its date plus its timeframe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from tron_cli.data.dataset import Dataset
from tron_cli.prepare.reading.columns import INTEGER, BadLines, Columns, Parser, read_delimited
from tron_cli.prepare.reading.times import CALENDAR, within
from tron_cli.prepare.sources.clicks import prepare_clicks
from tron_cli.prepare.split import DAY, by_start_day

TEST_DAYS = 7

_DATE = Parser(
    lambda column: within(
        column.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("ms")).to_physical(),
        *CALENDAR,
    ),
    "a date such as 2016-05-09",
)
_TIMEFRAME = Parser(
    lambda column: within(column.cast(pl.Int64, strict=False), 0, 366 * DAY),
    "milliseconds since the session began",
)


def prepare_diginetica(
    raw: Path | None,
    data_dir: Path,
    name: str = "diginetica",
    *,
    force: bool = False,
    val_days: float = 7,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    skip_bad_lines: bool = False,
    catalogue: str | None = None,
) -> Dataset:
    """Prepare Diginetica; tested on the sessions that start on the last eight calendar days."""
    return prepare_clicks(
        "diginetica",
        _read,
        by_start_day,
        raw_file="train-item-views.csv",
        raw=raw,
        data_dir=data_dir,
        name=name,
        test_days=TEST_DAYS,
        val_days=val_days,
        max_val_sessions=max_val_sessions,
        seed=seed,
        force=force,
        skip_bad_lines=skip_bad_lines,
        catalogue=catalogue,
    )


def _read(file: Path, bad: BadLines) -> Iterator[Columns]:
    parsers = {"sessionId": INTEGER, "itemId": INTEGER, "timeframe": _TIMEFRAME, "eventdate": _DATE}
    for columns in read_delimited(file, list(parsers), bad, separator=";"):
        columns = columns.parse(parsers, bad)
        frame = columns.frame.select(
            session="sessionId", item="itemId", time=pl.col("eventdate") + pl.col("timeframe")
        )
        yield replace(columns, frame=frame)
