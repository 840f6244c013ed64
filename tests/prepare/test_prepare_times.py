"""Times in the usual notations of logs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest

from tron_cli.errors import InputError
from tron_cli.prepare.reading.times import TimeParser
from tron_cli.prepare.sources.table import duration

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
    parsed = TimeParser(unit).parse(pl.Series([spell(at) for at in times]))
    assert parsed.to_list() == times


def moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, timezone.utc)


def test_coarse_and_impossible_times() -> None:
    parse = TimeParser("auto").parse
    texts = ["2024-02-29", "2024-02-29 12:30", "2023-02-29", "12:30", "", None, "29/02/2024"]
    leap_day = 1_709_164_800_000
    assert parse(pl.Series(texts)).to_list() == [leap_day, leap_day + 45_000_000, *[None] * 5]
    # One absurd number does not make nanoseconds of the others.
    numbers = TimeParser("auto").parse(pl.Series(["881250949", "nan", "inf", "9e99", "881250950"]))
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
            TimeParser(unit).parse(column)


def test_a_few_odd_years_among_the_others_are_read() -> None:
    numbers = ["0", "1700000000", "1700000001", "4102444801"]
    assert TimeParser("auto").parse(pl.Series(numbers)).to_list() == [
        int(number) * 1000 for number in numbers
    ]


def test_the_first_block_decides_the_unit_for_the_whole_file() -> None:
    parse = TimeParser("auto").parse
    assert parse(pl.Series(["1700000000000"])).to_list() == [1_700_000_000_000]
    assert parse(pl.Series(["5"])).to_list() == [5]


ISO = ["2024-01-01T00:00:00", "2024-01-01T00:00:01Z", "2024-01-02"]
ISO_MS = [1_704_067_200_000, 1_704_067_201_000, 1_704_153_600_000]


def test_a_number_among_iso_times_is_bad_and_not_the_others() -> None:
    times = TimeParser("auto")
    assert times.parse(pl.Series(["1700000000", *ISO])).to_list() == [None, *ISO_MS]
    assert times.expected == "an ISO 8601 time like most others"
    assert times.parse(pl.Series(["5", "1700000000", ISO[0]])).to_list() == [None, None, ISO_MS[0]]
    times.check(Path("a.csv"))


def test_an_iso_time_among_numbers_is_bad_and_not_the_others() -> None:
    times = TimeParser("auto")
    column = pl.Series(["1700000000000", ISO[0], "1700000000001"])
    assert times.parse(column).to_list() == [START, None, START + 1]
    assert times.expected == "a number of ms like most others"
    assert times.parse(pl.Series(ISO[:1])).to_list() == [None]
    times.check(Path("a.csv"))


@pytest.mark.parametrize("other", ["1700000000", "1700000000.5", "1700000000000000", ISO[0]])
def test_a_column_that_becomes_another_is_refused(other: str) -> None:
    times = TimeParser("auto")
    assert times.parse(pl.Series(["1700000000000"])).to_list() == [START]
    for _ in range(2):
        assert times.parse(pl.Series([other])).to_list() == [None]
    with pytest.raises(
        InputError, match=r"a\.csv: the first times are milliseconds, but most are "
    ):
        times.check(Path("a.csv"))


def test_numbers_of_two_units_are_told_apart() -> None:
    column = pl.Series(["1700000000000", "1700000000", "1700000000000001", "1700000000001", "0"])
    assert TimeParser("auto").parse(column).to_list() == [START, None, None, START + 1, 0]
    # Where the unit is named, numbers are taken at their word.
    assert TimeParser("ms").parse(column).to_list()[1] == 1_700_000_000


def test_times_are_of_the_years_1_to_9999() -> None:
    inside, outside = [-62_135_596_800_000, 253_402_300_799_999], [-62_135_596_800_001, 2**62]
    numbers = pl.Series([*[START] * 4, *inside, 253_402_300_800_000, *outside])
    expected = [*[START] * 4, *inside, None, None, None]
    assert TimeParser("ms").parse(numbers).to_list() == expected
    assert TimeParser("auto").parse(numbers.cast(pl.Datetime("ms"))).to_list() == expected
    assert TimeParser("auto").parse(pl.Series([2**31 - 1], dtype=pl.Date)).to_list() == [None]
    texts = ["2024-01-01", "0001-01-01", "9999-12-31T23:59:59.999", "0000-12-31", "0000-00-00"]
    read = TimeParser("auto").parse(pl.Series(texts)).to_list()
    assert read == [ISO_MS[0], *inside, None, None]


def test_a_null_does_not_change_how_the_others_are_read() -> None:
    """Integers of nanoseconds are exact: as floats these two would be the same, and rounded."""
    times = [f"{START}999999", f"{START + 1}000000"]
    assert TimeParser("auto").parse(pl.Series(times)).to_list() == [START, START + 1]
    assert TimeParser("auto").parse(pl.Series([*times, "x"])).to_list() == [START, START + 1, None]


@pytest.mark.parametrize(
    ("text", "ms"), [("90s", 90_000), ("30m", 1_800_000), ("1.5h", 5_400_000), ("2d", 2 * DAY)]
)
def test_durations(text: str, ms: int) -> None:
    assert duration(text) == ms


@pytest.mark.parametrize("text", ["30", "m", "-5m", "1 h", "30min"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InputError, match="--session-gap"):
        duration(text)
