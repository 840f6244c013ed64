"""Times in usual notations to milliseconds since 1970 UTC."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl

from tron_cli.errors import InputError
from tron_cli.prepare.reading.columns import Parser

UNITS = ("s", "ms", "us", "ns")

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# `auto` takes numbers whose median is smaller for seconds, and so on: up to the year 5138.
_LARGEST = {"s": 1e11, "ms": 1e14, "us": 1e17}
_NAMES = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "iso": "ISO 8601",
}
_YEARS = (1980, 2100)  # of usual logs
_YEAR = 31_556_952_000  # ms
_USUAL = tuple((year - 1970) * _YEAR for year in _YEARS)
CALENDAR = (-62_135_596_800_000, 253_402_300_799_999)  # the years 1 to 9999
_LAYOUTS = (
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%dT%H:%M%#z",
)


class TimeParser(Parser):
    """Reads one column of times, block after block, into int64 milliseconds since 1970 UTC.

    unit: s, ms, us or ns for numbers (fractions allowed), or auto: dates and times in ISO 8601
    (without an offset: UTC), or numbers, whose unit follows from the size of their median. The
    majority of the first block decides; values of another kind or unit are invalid. Only the years
    1 to 9999 are read.
    """

    def __init__(self, unit: str) -> None:
        if unit not in ("auto", *UNITS):
            raise InputError(f"--time-unit {unit!r}: expected auto or one of {', '.join(UNITS)}")
        expected = "an ISO 8601 time or a number" if unit == "auto" else f"a number of {unit}"
        super().__init__(self._read, expected)
        self._is_auto = unit == "auto"
        self._unit = None if self._is_auto else unit
        self._counts: Counter[str] = (
            Counter()
        )  # times of each kind; those of other kinds become null
        self._is_checked = False

    def check(self, file: Path) -> None:
        """Refuse a column that is mostly of another kind than its first block."""
        most, count = max(self._counts.items(), key=lambda entry: entry[1], default=("", 0))
        if count > self._counts[self._unit or ""]:
            raise InputError(
                f"{file}: the first times are {_NAMES[self._unit or 'iso']}, but most are "
                f"{_NAMES[most]} ({count:,} of {self._counts.total():,}); write all of them alike"
            )

    def _read(self, column: pl.Series) -> pl.Series:
        if column.dtype == pl.Boolean:
            raise TypeError(column.dtype)
        if column.dtype.is_temporal():
            return within(column.cast(pl.Datetime("ms"), strict=False).to_physical(), *CALENDAR)
        numbers = column.cast(pl.Float64, strict=False)
        numbers = numbers.set(~numbers.is_finite(), None)
        count = len(column) - numbers.null_count()
        nothing = iso = pl.repeat(None, len(column), dtype=pl.Int64, eager=True)
        if self._is_auto and count + column.null_count() < len(column):
            iso = from_iso(column)  # a date such as 20240131 counts as a number
            self._counts["iso"] += len(iso) - iso.null_count()
        if self._unit is None:
            if not count and iso.null_count() == len(iso):  # nothing to decide the unit by
                return nothing
            self._unit = "iso" if count <= self._counts["iso"] else _unit_of(numbers)
            kind = "an ISO 8601 time" if self._unit == "iso" else f"a number of {self._unit}"
            self.expected = f"{kind} like most others"
        if self._unit == "iso":
            if count:
                self._counts[_unit_of(numbers)] += count
            return iso
        if not count:
            return nothing
        times = _from_numbers(column, numbers, self._unit)
        if not self._is_checked:
            _check_year(column, numbers, self._unit)
            self._is_checked = True
        return self._without_other_units(numbers, times) if self._is_auto else times

    def _without_other_units(self, numbers: pl.Series, times: pl.Series) -> pl.Series:
        """Null the times whose year is unusual in this unit and usual in another."""
        assert self._unit is not None
        usual = times.is_between(_USUAL[0], _USUAL[1])
        if usual.sum() < len(numbers) - numbers.null_count():
            for unit in UNITS:
                other = (numbers * (1000 / _PER_SECOND[unit])).is_between(_USUAL[0], _USUAL[1])
                other &= ~usual.fill_null(False)
                self._counts[unit] += int(other.sum())
                times = times.set(other, None)
        self._counts[self._unit] += len(times) - times.null_count()
        return times


def _unit_of(numbers: pl.Series) -> str:
    typical = numbers.abs().median()
    assert isinstance(typical, float)
    return next((unit for unit, most in _LARGEST.items() if typical < most), "ns")


def _check_year(column: pl.Series, numbers: pl.Series, unit: str) -> None:
    """Refuse numbers of another unit, and dates such as 20240131, which would spoil the split."""
    typical = numbers.median()
    assert isinstance(typical, float)
    year = 1970 + typical * 1000 / _PER_SECOND[unit] / _YEAR
    if not _YEARS[0] <= year < _YEARS[1]:
        example = column.filter(numbers.is_not_null())[0]
        raise InputError(
            f"--time-unit: times such as {example}, taken as {_NAMES[unit]} since "
            f"1970, are about the year {year:.0f}, expected {_YEARS[0]} to {_YEARS[1]}: name their "
            "unit, or write dates as 2024-01-31"
        )


def _from_numbers(column: pl.Series, numbers: pl.Series, unit: str) -> pl.Series:
    """Convert numbers to milliseconds, int64: integers exactly, fractions rounded."""
    limits = [limit * _PER_SECOND[unit] // 1000 for limit in CALENDAR]
    low, high = max(limits[0], -(2**63)), min(limits[1], 2**63 - 1)
    rounded = (within(numbers, low, high) / _PER_SECOND[unit] * 1000).round().cast(pl.Int64)
    if column.dtype.is_float():
        return rounded
    integers = within(column.cast(pl.Int64, strict=False), low, high)
    exact = integers * 1000 if unit == "s" else integers // (_PER_SECOND[unit] // 1000)
    return exact.fill_null(rounded)


def within(numbers: pl.Series, low: int, high: int) -> pl.Series:
    """Null the numbers outside of low..high."""
    outside = ~numbers.is_between(low, high)
    return numbers.set(outside, None) if outside.any() else numbers


def from_iso(column: pl.Series) -> pl.Series:
    text = (
        column.cast(pl.String)
        .str.strip_suffix(" UTC")
        .str.strip_suffix("Z")
        .str.replace(" ", "T", literal=True)
    )
    dates = text.str.len_chars() == len("2014-04-07")
    if dates.any():
        text = pl.select(pl.when(dates).then(text + "T00:00").otherwise(text)).to_series()
    times = _parsed(text, _LAYOUTS[0])
    for layout in _LAYOUTS[1:]:
        if not times.null_count():
            break
        times = times.fill_null(_parsed(text, layout))
    return within(times, *CALENDAR)


def _parsed(text: pl.Series, layout: str) -> pl.Series:
    return text.str.to_datetime(layout, time_unit="ms", strict=False).to_physical()
