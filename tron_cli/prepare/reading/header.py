"""The header of a delimited text file, and the separator that it shows."""

from __future__ import annotations

import csv
from contextlib import suppress
from functools import partial
from pathlib import Path

from tron_cli.errors import InputError
from tron_cli.prepare.fetching.raw import open_raw
from tron_cli.prepare.reading.columns import find_columns

_SEPARATORS = ",;\t|"


def header_line(file: Path) -> str:
    """Return the first line that is not blank, without its end."""
    with open_raw(file) as content:
        lines = iter(partial(content.readline, 1 << 16), b"")
        header = next((line for line in lines if line.strip(b"\r\n")), b"")
    return header.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").strip("\r\n")


def find_separator(file: Path, header: str, wanted: list[str]) -> str:
    """Return the separator that the header has most often of those that give the wanted columns."""
    by_count = sorted(_SEPARATORS, key=header.count, reverse=True)
    for separator in by_count:
        with suppress(InputError, csv.Error):
            find_columns(file, next(csv.reader([header], delimiter=separator)), wanted)
            return separator
    return by_count[0]
