"""Yoochoose clicks (RecSys Challenge 2015), filtered and split as TRON does.

`yoochoose-clicks.dat` has no header: `session,2014-04-07T10:51:09.277Z,item,category` per line.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import INTEGER, Columns, Parser, read_delimited
from tron_cli.prepare.reading.times import CALENDAR, within
from tron_cli.prepare.sources.clicks import ClickLog, prepare_clicks
from tron_cli.prepare.split import by_last_event

NAMES = ["session", "time", "item", "category"]

_TIME = Parser(
    lambda column: within(
        column.str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ", time_unit="ms", strict=False).to_physical(),
        *CALENDAR,
    ),
    "a time such as 2014-04-07T10:51:09.277Z",
)


def _read(file: Path, bad: BadLines) -> Iterator[Columns]:
    for columns in read_delimited(file, NAMES, bad, separator=",", names=NAMES):
        yield columns.parse({"session": INTEGER, "time": _TIME, "item": INTEGER}, bad)


prepare_yoochoose = partial(
    prepare_clicks,
    # Tested on the sessions that end in the last day.
    ClickLog("yoochoose", "yoochoose-clicks.dat", _read, by_last_event, test_days=1, val_days=1),
)
