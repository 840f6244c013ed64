"""Times in other notations than ISO 8601, read by `--time-format` and never by a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from helpers.tables import DAY, START, USER
from hypothesis import given
from hypothesis import strategies as st

from tron_cli.errors import InputError
from tron_cli.prepare.reading.times import FormatParser
from tron_cli.prepare.sources.table import prepare_table

Command = Callable[..., tuple[int, str, str]]
START_S = START // DAY * 86_400  # a midnight


def write_times(path: Path, spell: Callable[[datetime], str]) -> Path:
    """Write 60 sessions of 3 events over 20 days, their times spelled by `spell`."""
    lines = ["user;item;time"]
    for session in range(60):
        begin = datetime.fromtimestamp(START_S + session * 28_800 + 60, timezone.utc)
        lines += [f"u{session};i{n};{spell(begin + timedelta(minutes=n))}" for n in range(3)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "layout",
    ["%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%y%m%d%H%M", "%d %b %Y %I:%M %p"],
)
def test_a_named_format_gives_the_dataset_of_iso_times(tmp_path: Path, layout: str) -> None:
    iso = write_times(tmp_path / "iso.csv", datetime.isoformat)
    expected = prepare_table(iso, USER, tmp_path, "iso")
    other = write_times(tmp_path / "other.csv", lambda time: time.strftime(layout))
    dataset = prepare_table(other, replace(USER, time_format=layout), tmp_path, "other")
    assert dataset.info["splits"] == expected.info["splits"]
    assert dataset.info["options"]["time_format"] == layout


@pytest.mark.parametrize(
    ("layout", "text", "iso"),
    [
        ("%d/%m/%Y", "13/03/2025", "2025-03-13"),
        ("%d/%m/%Y", "3/4/2025", "2025-04-03"),
        ("%m/%d/%Y", "3/4/2025", "2025-03-04"),
        ("%d/%m/%Y %H:%M:%S.%f", "13/03/2025 10:00:05.123", "2025-03-13T10:00:05.123"),
        ("%d/%m/%Y %H:%M:%S.%f", "13/03/2025 10:00:05.123456", "2025-03-13T10:00:05.123"),
        ("%d/%m/%Y %H:%M:%S.%f", "13/03/2025 10:00:05.5", "2025-03-13T10:00:05.500"),
        ("%d/%m/%Y %H:%M:%S%.f", "13/03/2025 10:00:05", "2025-03-13T10:00:05"),
        ("%d/%m/%Y %H:%M:%S,%3f", "13/03/2025 10:00:05,123", "2025-03-13T10:00:05.123"),
        ("%d/%m/%Y %H:%M %z", "13/03/2025 10:00 +0530", "2025-03-13T04:30"),
        ("%d/%m/%Y %H:%M%z", "13/03/2025 23:30-05:00", "2025-03-14T04:30"),
        ("%d/%m/%Y %H:%M%z", "13/03/2025 10:00Z", "2025-03-13T10:00"),
        ("%d/%b/%Y:%H:%M:%S %z", "13/Mar/2025:10:00:05 -0700", "2025-03-13T17:00:05"),
        ("%I:%M %p on %d %B %Y", "12:05 AM on 13 March 2025", "2025-03-13T00:05"),
        ("%d/%m/%y 100%%", "13/03/25 100%", "2025-03-13"),
    ],
)
def test_formats(layout: str, text: str, iso: str) -> None:
    expected = datetime.fromisoformat(iso).replace(tzinfo=timezone.utc).timestamp() * 1000
    assert FormatParser(layout).parse(pl.Series([text])).to_list() == [expected]


@given(st.from_regex(r"(?a)\A[0-3]?\d/[01]?\d/20\d\d( [0-2]?\d:[0-6]\d)?\Z"), st.booleans())
def test_formats_read_what_python_reads(text: str, month_first: bool) -> None:
    layout = "%m/%d/%Y %H:%M" if month_first else "%d/%m/%Y %H:%M"
    try:
        time = datetime.strptime(text, layout).replace(tzinfo=timezone.utc)
    except ValueError:
        expected = None
    else:
        expected = time.timestamp() * 1000
    assert FormatParser(layout).parse(pl.Series([text])).to_list() == [expected]


@pytest.mark.parametrize(
    "text",
    ["", None, "31/02/2025", "2025-03-13", "13/03/2025 10:00", "13/03/20255", "13.03.2025", "x"],
)
def test_what_does_not_fit_is_bad(text: str | None) -> None:
    column = pl.Series(["13/03/2025", text], dtype=pl.String)
    assert FormatParser("%d/%m/%Y").parse(column).to_list() == [1_741_824_000_000, None]


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("", "expected the year, month and day of a time, such as"),
        ("dd/mm/yyyy", "expected the year, month and day of a time, such as"),
        ("%H:%M", "expected the year, month and day of a time, such as"),
        ("%m/%Y", "expected the year, month and day of a time, such as"),
        ("%d/%m/%Q", "expected the year, month and day of a time, such as"),
        ("%d/%m/%Y %", "expected the year, month and day of a time, such as"),
        ("%d/%m/%Y %H", "both hour and minute"),
        ("%d/%m/%Y %I:%M", "meridiem"),
        ("%d/%m/%Y %H:%M %Z", "names of zones are not read: give offsets as %z"),
        ("%d/%m/%Y %H:%M:%S,%f", "%f reads a fraction after a point only; write %3f, %6f or %9f"),
    ],
)
def test_formats_that_cannot_be_read(layout: str, problem: str) -> None:
    with pytest.raises(InputError, match="--time-format") as error:
        FormatParser(layout)
    assert problem in str(error.value)


def test_years_of_two_digits_are_not_those_of_the_romans() -> None:
    with pytest.raises(InputError, match=r"such as 13/03/25 .* the year 25, .* %y reads years of"):
        FormatParser("%d/%m/%Y").parse(pl.Series(["13/03/25"]))


def test_integers_and_times_of_parquet() -> None:
    assert FormatParser("%Y%m%d").parse(pl.Series([20250313])).to_list() == [1_741_824_000_000]
    with pytest.raises(InputError, match="holds times already: leave --time-format out"):
        FormatParser("%Y%m%d").parse(pl.Series([datetime(2025, 3, 13)]))


def test_the_first_line_that_does_not_fit_is_named(tmp_path: Path) -> None:
    file = write_times(tmp_path / "a.csv", lambda time: time.strftime("%m/%d/%Y"))
    columns = replace(USER, time_format="%d/%m/%Y")
    line, found = next(
        (number, text.split(";")[2])
        for number, text in enumerate(file.read_text().splitlines(), 1)
        if number > 1 and int(text.split(";")[2].split("/")[1]) > 12
    )
    with pytest.raises(InputError) as error:
        prepare_table(file, columns, tmp_path, "out")
    assert str(error.value) == (
        f"{file}, line {line}: expected a time such as 13/03/2025 (--time-format) in time, found "
        f"'{found}'; correct the format or the line, or pass --skip-bad-lines"
    )
    # Half of the days read as months would be a dataset of wrong times.
    with pytest.raises(InputError, match=r"a\.csv: 1\d\d of 180 times do not fit --time-format"):
        prepare_table(file, columns, tmp_path, "out", skip_bad_lines=True)


def test_a_time_format_and_a_time_unit_are_not_given_together(tmp_path: Path) -> None:
    file = write_times(tmp_path / "a.csv", datetime.isoformat)
    both = replace(USER, time_format="%d/%m/%Y", time_unit="ms")
    with pytest.raises(InputError, match="--time-unit has no effect with --time-format"):
        prepare_table(file, both, tmp_path, "out")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("13/03/2025", 'pass --time-format "%d/%m/%Y"'),
        ("03/13/2025", 'pass --time-format "%m/%d/%Y"'),
        ("13.03.2025", 'pass --time-format "%d.%m.%Y"'),
        ("13-03-2025 10:00", 'pass --time-format "%d-%m-%Y %H:%M"'),
        ("2025/03/13 10:00:05", 'pass --time-format "%Y/%m/%d %H:%M:%S"'),
        ("13/03/25", 'pass --time-format "%d/%m/%y"'),
        ("3/13/2025 9:05 PM", 'pass --time-format "%m/%d/%Y %I:%M %p"'),
        ("13/03/2025 10:00:05.123", 'pass --time-format "%d/%m/%Y %H:%M:%S.%f"'),
        ("13/03/2025 10:00 +02:00", 'pass --time-format "%d/%m/%Y %H:%M %z"'),
        ("13 Mar 2025 10:00", 'pass --time-format "%d %b %Y %H:%M"'),
        ("Mar 13, 2025", 'pass --time-format "%b %d, %Y"'),
        ("13/Mar/2025:10:00:05 -0700", 'pass --time-format "%d/%b/%Y:%H:%M:%S %z"'),
        ("03/04/2025", 'pass --time-format "%d/%m/%Y" or "%m/%d/%Y", whichever is meant'),
        (
            "1/2/2025 10:00",
            'pass --time-format "%d/%m/%Y %H:%M" or "%m/%d/%Y %H:%M", whichever is meant',
        ),
        ("03/03/2025", 'pass --time-format "%d/%m/%Y" or "%m/%d/%Y", whichever is meant'),
        ("13 May 2025", 'pass --time-format "%d %b %Y"'),
        ("13 March 2025, 10:00:05", 'pass --time-format "%d %B %Y, %H:%M:%S"'),
        ("13/03/2025 10:00+0200", 'pass --time-format "%d/%m/%Y %H:%M%z"'),
        ("week 11", 'name the format of the times with --time-format, such as "%d/%m/%Y %H:%M"'),
    ],
)
def test_a_date_that_is_not_iso_leads_to_the_option(
    tmp_path: Path, text: str, advice: str, command: Command
) -> None:
    file = write_times(tmp_path / "a.csv", lambda _: text)
    words = ["prepare", "table", "--input", file, "--item-col", "item", "--time-col", "time"]
    words += ["--user-col", "user", "--data-dir", tmp_path, "--name", "out"]
    code, _, error = command(*words)
    sentence = f"{file}, line 2: expected an ISO 8601 time or a number in time, found '{text}'; "
    assert code == 2
    assert error.endswith(f"{sentence}{advice}\n")
    file.write_text(file.read_text().replace("\n", "\n#### a broken line\n", 1))
    code, _, error = command(*words, "--skip-bad-lines")
    assert (code, advice in error) == (2, True)


def test_the_option_on_the_command_line(tmp_path: Path, command: Command) -> None:
    file = write_times(tmp_path / "a.csv", lambda time: time.strftime("%d/%m/%Y %H:%M"))
    words = ["prepare", "table", "--input", file, "--item-col", "item", "--time-col", "time"]
    words += ["--user-col", "user", "--data-dir", tmp_path, "--name", "out", "--json"]
    code, out, _ = command(*words, "--time-format", "%d/%m/%Y %H:%M")
    assert code == 0
    info = json.loads(out)
    assert info["options"]["time_format"] == "%d/%m/%Y %H:%M"
    assert info["splits"]["train"]["first_time"] == (START_S + 60) * 1000


def test_a_date_among_iso_times_is_a_bad_line(tmp_path: Path) -> None:
    file = write_times(tmp_path / "a.csv", datetime.isoformat)
    file.write_text(file.read_text() + "\nu1;i1;13/03/2025\n")
    with pytest.raises(InputError, match="like most others in time, found '13/03/2025'; correct"):
        prepare_table(file, USER, tmp_path, "out")
