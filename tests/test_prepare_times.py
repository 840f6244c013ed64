"""Times in every spelling that people's logs have."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

import polars as pl
import pytest

from tron_cli.errors import InputError
from tron_cli.prepare.table import duration
from tron_cli.prepare.times import time_parser

DAY = 86_400_000
START = 1_700_000_000_000


@pytest.mark.parametrize(
    ("spell", "unit"),
    [
        (lambda ms: str(ms), "auto"),
        (lambda ms: str(ms), "ms"),
        (lambda ms: f"{ms / 1000:.3f}", "auto"),
        (lambda ms: f"{ms / 1000:.3f}", "s"),
        (lambda ms: f"{ms}123", "auto"),
        (lambda ms: f"{ms}123", "us"),
        (lambda ms: f"{ms}123456", "auto"),
        (lambda ms: f"{ms}123456", "ns"),
        (lambda ms: f"{moment(ms):%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z", "auto"),
        (lambda ms: f"{moment(ms):%Y-%m-%d %H:%M:%S}.{ms % 1000:03d}", "auto"),
        (lambda ms: f"{moment(ms):%Y-%m-%d %H:%M:%S}.{ms % 1000:03d} UTC", "auto"),
        (lambda ms: f"{moment(ms + 19_800_000):%Y-%m-%d %H:%M:%S}.{ms % 1000:03d}+05:30", "auto"),
        (lambda ms: f"{moment(ms - 14_400_000):%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}-0400", "auto"),
    ],
)
def test_spellings_of_time(spell: Callable[[int], str], unit: str) -> None:
    times = [START, START + 1, START + 999, START + 45 * DAY + 123]
    parsed = time_parser(unit).parse(pl.Series([spell(at) for at in times]))
    assert parsed.to_list() == times


def moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, timezone.utc)


def test_coarse_and_impossible_times() -> None:
    parse = time_parser("auto").parse
    texts = ["2024-02-29", "2024-02-29 12:30", "2023-02-29", "12:30", "", None, "29/02/2024"]
    leap_day = 1_709_164_800_000
    assert parse(pl.Series(texts)).to_list() == [leap_day, leap_day + 45_000_000, *[None] * 5]
    # One absurd number does not make nanoseconds of the others.
    numbers = time_parser("auto").parse(pl.Series(["881250949", "nan", "inf", "9e99", "881250950"]))
    assert numbers.to_list() == [881_250_949_000, None, None, None, 881_250_950_000]


@pytest.mark.parametrize(
    ("number", "unit", "taken"),
    [
        ("20240101", "auto", "seconds since 1970, are about the year 1971"),
        ("20240101103000", "auto", "milliseconds since 1970, are about the year 2611"),
        ("1700000000", "ms", "milliseconds since 1970, are about the year 1970"),
        ("1700000000000", "s", "seconds since 1970, are about the year 5584"),
        ("1700000000000000", "ms", "milliseconds since 1970, are about the year 558"),
        ("1700000000000", "ns", "nanoseconds since 1970, are about the year 1970"),
    ],
)
def test_numbers_of_another_unit_are_refused(number: str, unit: str, taken: str) -> None:
    for column in (pl.Series([None, number, number]), pl.Series([int(number)])):
        with pytest.raises(
            InputError, match=f"--time-unit: times such as {number}, taken as {taken}"
        ):
            time_parser(unit).parse(column)


def test_a_few_odd_years_among_the_others_are_read() -> None:
    numbers = ["0", "1700000000", "1700000001", "4102444801"]
    assert time_parser("auto").parse(pl.Series(numbers)).to_list() == [
        int(number) * 1000 for number in numbers
    ]


def test_the_first_block_decides_the_unit_for_the_whole_file() -> None:
    parse = time_parser("auto").parse
    assert parse(pl.Series(["1700000000000"])).to_list() == [1_700_000_000_000]
    assert parse(pl.Series(["5"])).to_list() == [5]


@pytest.mark.parametrize(
    ("text", "ms"), [("90s", 90_000), ("30m", 1_800_000), ("1.5h", 5_400_000), ("2d", 2 * DAY)]
)
def test_durations(text: str, ms: int) -> None:
    assert duration(text) == ms


@pytest.mark.parametrize("text", ["30", "m", "-5m", "1 h", "30min"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InputError, match="--session-gap"):
        duration(text)
