"""Times as people write them -> milliseconds since 1970 UTC."""

from __future__ import annotations

import polars as pl

from tron_cli.errors import InputError
from tron_cli.prepare.columns import Parser

UNITS = ("s", "ms", "us", "ns")

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# The typical size up to which `auto` takes numbers for seconds, and so on: the year 5138.
_LARGEST = {"s": 1e11, "ms": 1e14, "us": 1e17}
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_YEARS = (1980, 2100)  # in which people's logs are written
_YEAR = 31_556_952_000  # ms
_LAYOUTS = (
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%dT%H:%M%#z",
)


def time_parser(unit: str) -> Parser:
    """Reads one column of times, block after block, into int64 milliseconds since 1970 UTC.

    unit: s, ms, us or ns for numbers (fractions allowed), or auto: dates and times in ISO 8601
    (without an offset: UTC), or numbers whose unit follows from the size of the median in the
    first block.
    """
    if unit not in ("auto", *UNITS):
        raise InputError(f"--time-unit {unit!r}: expected auto or one of {', '.join(UNITS)}")
    expected = "an ISO 8601 time or a number" if unit == "auto" else f"a number of {unit}"
    return Parser(_TimeReader(unit), expected)


class _TimeReader:
    """A column is what its first block is: numbers of one unit, or ISO text."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.is_checked = False

    def __call__(self, column: pl.Series) -> pl.Series:
        if column.dtype == pl.Boolean:
            raise TypeError(column.dtype)
        if column.dtype.is_temporal():
            return column.cast(pl.Datetime("ms"), strict=False).to_physical()
        if column.null_count() == len(column):  # says nothing about the others
            return pl.repeat(None, len(column), dtype=pl.Int64, eager=True)
        if self.unit == "auto":
            self.unit = _unit_of(column)
        if self.unit == "iso":
            return _from_iso(column)
        times = _from_numbers(column, self.unit)
        if not self.is_checked:
            _check_year(column, times, self.unit)
            self.is_checked = True
        return times


def _unit_of(column: pl.Series) -> str:
    numbers = column.cast(pl.Float64, strict=False)
    typical = numbers.filter(numbers.is_finite()).abs().median()
    if not isinstance(typical, float):
        return "iso"
    return next((unit for unit, most in _LARGEST.items() if typical < most), "ns")


def _check_year(column: pl.Series, times: pl.Series, unit: str) -> None:
    """Refuse numbers of another unit, or such as 20240131: they would spoil the split silently."""
    typical = times.median()
    if not isinstance(typical, float):
        return
    year = 1970 + typical / _YEAR
    if not _YEARS[0] <= year < _YEARS[1]:
        example = column.filter(times.is_not_null())[0]
        raise InputError(
            f"--time-unit: times such as {example}, taken as {_NAMES[unit]} since "
            f"1970, are about the year {year:.0f}, expected {_YEARS[0]} to {_YEARS[1]}: name their "
            "unit, or write dates as 2024-01-31"
        )


def _from_numbers(column: pl.Series, unit: str) -> pl.Series:
    integers = column.cast(pl.Int64, strict=False)
    if unit == "s" or column.dtype.is_float() or integers.null_count():
        seconds = column.cast(pl.Float64, strict=False) / _PER_SECOND[unit]
        return (seconds * 1000).round().cast(pl.Int64, strict=False)
    return integers // (_PER_SECOND[unit] // 1000)


def _from_iso(column: pl.Series) -> pl.Series:
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
    return times


def _parsed(text: pl.Series, layout: str) -> pl.Series:
    return text.str.to_datetime(layout, time_unit="ms", strict=False).to_physical()
