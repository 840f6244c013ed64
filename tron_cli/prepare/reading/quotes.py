"""Quotes in delimited text, by RFC 4180: one opens a field only at its start and closes it only at
its end, and two stand for one within. Any other is loose: a character of an unquoted field, such as
the inches of `1.5" nail`, and no reason to take the following lines for the same field.
"""

from __future__ import annotations

import csv
import io
import re

import numpy as np

_QUOTE = ord('"')


def quoted_bytes(text: bytes, separator: str, *, complete: bool) -> np.ndarray:
    """bool [bytes]: what belongs to quoted fields, their quotes included.

    The text starts with a record. complete: it also ends with one, so that a quote it never closes
    is loose; else the field goes on behind the text.
    """
    data = np.frombuffer(text, np.uint8)
    is_quote = data == _QUOTE
    quotes = np.flatnonzero(is_quote)
    opening, closing = quotes[::2], quotes[1::2]
    before, after = np.zeros((2, 256), bool)
    before[[ord(separator), ord("\n"), _QUOTE]] = True
    after[[ord(separator), ord("\r"), ord("\n"), _QUOTE]] = True
    if (
        not (complete and len(quotes) % 2)
        and (before[data[opening - 1]] | (opening == 0)).all()
        and after[data[np.minimum(closing + 1, len(data) - 1)]].all()
    ):
        # None is loose: every second quote closes, also the first of two that stand for one.
        # Their count may wrap in uint8, its parity does not.
        return (np.cumsum(is_quote, dtype=np.uint8) % 2 == 1) | is_quote
    spans = np.array([match.span() for match in _fields(separator, complete).finditer(text)])
    steps = np.zeros(len(data) + 1, np.int8)
    if len(spans):
        steps[spans[:, 0]], steps[spans[:, 1]] = 1, -1
    return np.cumsum(steps[:-1], dtype=np.int8) == 1


def loose_quotes(text: bytes, separator: str, quoted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (int64) of the loose quotes, and which of them (bool) stand at a field's start."""
    data = np.frombuffer(text, np.uint8)
    loose = np.flatnonzero((data == _QUOTE) & ~quoted)
    before = data[loose - 1]
    return loose, (before == ord(separator)) | (before == ord("\n")) | (loose == 0)


def requoted(record: bytes, separator: str) -> bytes:
    """A record with its line end, its fields with loose quotes quoted and these quotes doubled.

    One that the csv module does not read, because of a field of megabytes, say, stays as it is.
    """
    # Any bytes are Latin-1, and quotes and separators are the same there.
    try:
        fields = next(csv.reader([record.decode("latin-1")], delimiter=separator))
    except csv.Error:
        return record
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerow(fields)
    return text.getvalue().encode("latin-1")


def _fields(separator: str, complete: bool) -> re.Pattern[bytes]:
    """Finds the quoted fields."""
    mark = re.escape(separator)
    end = rf'"(?=[{mark}\r\n]|\Z)' if complete else rf'(?:"(?=[{mark}\r\n]|\Z)|\Z)'
    return re.compile(rf'(?:\A|(?<=[{mark}\n]))"[^"]*(?:""[^"]*)*{end}'.encode())
