"""Diginetica item views (CIKM Cup 2016), filtered and split as TRON does, but in UTC.

`train-item-views.csv`: `sessionId;userId;itemId;timeframe;eventdate`, where timeframe is
milliseconds since the session began; an event's time is its date plus its timeframe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import INTEGER, Columns, Parser, read_delimited
from tron_cli.prepare.reading.times import CALENDAR, within
from tron_cli.prepare.sources.clicks import ClickLog, prepare_clicks
from tron_cli.prepare.split import DAY, by_start_day

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


def _read(file: Path, bad: BadLines) -> Iterator[Columns]:
    parsers = {"sessionId": INTEGER, "itemId": INTEGER, "timeframe": _TIMEFRAME, "eventdate": _DATE}
    for columns in read_delimited(file, list(parsers), bad, separator=";"):
        columns = columns.parse(parsers, bad)
        frame = columns.frame.select(
            session="sessionId", item="itemId", time=pl.col("eventdate") + pl.col("timeframe")
        )
        yield replace(columns, frame=frame)


prepare_diginetica = partial(
    prepare_clicks,
    # Tested on the sessions that start on the last eight calendar days.
    ClickLog("diginetica", "train-item-views.csv", _read, by_start_day, test_days=7, val_days=7),
)
