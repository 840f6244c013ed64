"""Yoochoose clicks (RecSys Challenge 2015), filtered and split as TRON does.

`yoochoose-clicks.dat` has no header: `session,2014-04-07T10:51:09.277Z,item,category` a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tron_cli.data.dataset import Dataset
from tron_cli.prepare.reading.columns import INTEGER, BadLines, Columns, Parser, read_delimited
from tron_cli.prepare.reading.times import CALENDAR, within
from tron_cli.prepare.sources.clicks import prepare_clicks
from tron_cli.prepare.split import by_last_event

NAMES = ["session", "time", "item", "category"]
TEST_DAYS = 1

_TIME = Parser(
    lambda column: within(
        column.str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ", time_unit="ms", strict=False).to_physical(),
        *CALENDAR,
    ),
    "a time such as 2014-04-07T10:51:09.277Z",
)


def prepare_yoochoose(
    raw: Path | None,
    data_dir: Path,
    name: str = "yoochoose",
    *,
    force: bool = False,
    val_days: float = 1,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    skip_bad_lines: bool = False,
    catalogue: str | None = None,
) -> Dataset:
    """Prepare Yoochoose; tested on the sessions that end in the last day."""
    return prepare_clicks(
        "yoochoose",
        _read,
        by_last_event,
        raw_file="yoochoose-clicks.dat",
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
    for columns in read_delimited(file, NAMES, bad, separator=",", names=NAMES):
        yield columns.parse({"session": INTEGER, "time": _TIME, "item": INTEGER}, bad)
