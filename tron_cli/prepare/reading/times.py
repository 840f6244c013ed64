"""Times in usual notations to milliseconds since 1970 UTC."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

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
    """Parser of one column of times, block after block, to int64 milliseconds since 1970 UTC.

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
        self._unread: str | None = None  # a time, while none was readable

    @property
    def unit(self) -> str | None:
        """Unit of the times, or iso; None with auto, while no time was readable."""
        return self._unit

    def check(self, file: Path) -> None:
        """Refuse a column of unreadable times, or mostly of another kind than its first block."""
        if self._unit is None and self._unread is not None:
            raise InputError(
                f"{file}: no time is {self.expected}; the first is {self._unread[:60]!r}: "
                f"{self.advice(self._unread)}"
            )
        most, count = max(self._counts.items(), key=lambda entry: entry[1], default=("", 0))
        if count > self._counts[self._unit or ""]:
            raise InputError(
                f"{file}: the first times are {_NAMES[self._unit or 'iso']}, but most are "
                f"{_NAMES[most]} ({count:,} of {self._counts.total():,}); write all of them alike"
            )

    def advice(self, value: Any) -> str | None:
        """Point to --time-format while no time was readable."""
        if value is None or value == "" or self._unit is not None:
            return None
        formats = [f'"{layout}"' for layout in _fitting_formats(str(value))][:3]
        if not formats:
            return 'name the format of the times with --time-format, such as "%d/%m/%Y %H:%M"'
        which = ", whichever is meant" if len(formats) > 1 else ""
        return f"pass --time-format {' or '.join(formats)}{which}"

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
                texts = column.cast(pl.String).drop_nulls()
                self._unread = self._unread or next(filter(None, texts), None)
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


_SAMPLE = 1_741_824_000_000 + 51_316_000  # 2025-03-13 14:15:16, in ms


class FormatParser(Parser):
    """Parser of times of one format, block after block, to int64 milliseconds since 1970 UTC.

    layout: as in strptime and polars, such as %d/%m/%Y %H:%M; without %z the times are UTC. Raises
    InputError for one that does not give a date, or that polars would read only in part.
    """

    def __init__(self, layout: str) -> None:
        self._given = layout
        self._layout = _polars_layout(layout)
        super().__init__(self._read, f"a time such as {self._checked_example()} (--time-format)")
        self._fit = self._unfit = 0
        self._is_checked = False

    def advice(self, value: Any) -> str | None:
        """Point to the format, which may be the mistake."""
        if value is None or value == "":
            return None
        return "correct the format or the line, or pass --skip-bad-lines"

    def check(self, file: Path) -> None:
        """Refuse a format that most times do not fit: it would read the others wrongly."""
        if self._unfit > self._fit:
            raise InputError(
                f"{file}: {self._unfit:,} of {self._fit + self._unfit:,} times do not fit "
                f'--time-format "{self._given}"; correct the format'
            )

    def _checked_example(self) -> str:
        """Return an example of the format; raise InputError unless it reads as the same day."""
        names = re.findall(r"%%|%Z|%f", self._layout)
        if "%Z" in names:
            raise self._wrong("names of zones are not read: give offsets as %z")
        if "%f" in names:
            raise self._wrong("%f reads a fraction after a point only; write %3f, %6f or %9f")
        try:
            times = pl.Series([_SAMPLE], dtype=pl.Datetime("ms", "UTC"))
            (example,) = times.dt.strftime(self._given.replace("%#z", "%z"))
        except pl.exceptions.PolarsError:
            example = ""
        try:
            (again,) = _parsed(pl.Series([example]), self._layout)
        except pl.exceptions.PolarsError as error:
            raise self._wrong(str(error).partition("\n")[0]) from error
        if again is None or abs(again - _SAMPLE) > 86_400_000:
            raise self._wrong(
                'expected the year, month and day of a time, such as "%d/%m/%Y %H:%M"'
            )
        return example

    def _wrong(self, problem: str) -> InputError:
        return InputError(f'--time-format "{self._given}": {problem}')

    def _read(self, column: pl.Series) -> pl.Series:
        if column.dtype.is_temporal():
            raise InputError("the column holds times already: leave --time-format out")
        texts = column.cast(pl.String)
        times = within(_parsed(texts, self._layout), *CALENDAR)
        fit = len(times) - times.null_count()
        self._fit += fit
        self._unfit += int((texts.fill_null("") != "").sum()) - fit
        if fit and not self._is_checked:
            self._is_checked = True
            typical = times.median()
            assert isinstance(typical, float)
            year = 1970 + typical / _YEAR
            if not _YEARS[0] <= year < _YEARS[1]:
                example = column.filter(times.is_not_null())[0]
                raise self._wrong(
                    f"times such as {example} are about the year {year:.0f}, expected {_YEARS[0]} "
                    f"to {_YEARS[1]}; correct the format: %y reads years of two digits"
                )
        return times


_DAYS = [
    *(
        layout.replace("/", mark)
        for mark in "/.-"
        for layout in ("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d/%m/%y", "%m/%d/%y", "%d/%b/%Y")
    ),
    "%d %b %Y",
    "%d %B %Y",
    "%b %d, %Y",
    "%B %d, %Y",
]
_HOURS = [
    "",
    *(
        mark + hours
        for mark in (" ", "T", ":", ", ")
        for hours in ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M:%S %p")
    ),
]


def _fitting_formats(text: str) -> list[str]:
    """Return the usual formats of dates that read the text, as FormatParser takes them."""
    found: dict[str, str] = {}
    zones = ("", " %z" if re.search(r" [+-]", text) else "%z")
    for parts in product(_DAYS, _HOURS, zones):
        layout = "".join(parts)
        (time,) = _parsed(pl.Series([text]), _polars_layout(layout))
        if time is not None and _USUAL[0] <= time < _USUAL[1]:
            # A fraction may be absent, and %B also reads what %b reads.
            found.setdefault(layout.replace(".%f", "").replace("%B", "%b"), layout)
    return list(found.values())


def _polars_layout(layout: str) -> str:
    """Translate .%f, which polars reads as a count of nanoseconds, and %z, which must accept Z."""
    polars = {".%f": "%.f", "%z": "%#z"}
    return re.sub(r"%%|\.%f|%z", lambda match: polars.get(match[0], match[0]), layout)


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
            'unit, or for dates such as 20240131 their format: --time-format "%Y%m%d"'
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
