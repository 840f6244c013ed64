"""Quotes in delimited text, by RFC 4180.

A quote opens a field only at its start and closes it only at its end; two within a field stand for
one. Any other quote is loose: a character of an unquoted field, as in `1.5" nail`, which does not
make the following lines part of the field.
"""

from __future__ import annotations

import csv
import io
import re

import numpy as np

_QUOTE = ord('"')


def quoted_bytes(text: bytes, separator: str, *, complete: bool) -> np.ndarray:
    """Mark the bytes of quoted fields, their quotes included: bool [bytes].

    The text starts with a record. complete: it also ends with one, so that a quote that it never
    closes is loose; otherwise the field continues after the text.
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
        # No quote is loose: every second one closes, also the first of an escaped pair.
        return np.bitwise_xor.accumulate(is_quote.view(np.uint8)).view(bool) | is_quote
    spans = np.array([match.span() for match in _fields(separator, complete).finditer(text)])
    steps = np.zeros(len(data) + 1, np.int8)
    if len(spans):
        steps[spans[:, 0]], steps[spans[:, 1]] = 1, -1
    return np.cumsum(steps[:-1], dtype=np.int8) == 1


def loose_quotes(text: bytes, separator: str, quoted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (int64) of the loose quotes, and which (bool) are at a field's start."""
    data = np.frombuffer(text, np.uint8)
    loose = np.flatnonzero((data == _QUOTE) & ~quoted)
    before = data[loose - 1]
    return loose, (before == ord(separator)) | (before == ord("\n")) | (loose == 0)


def requoted(record: bytes, separator: str) -> bytes:
    """Quote the fields of a record that have loose quotes, and double these quotes.

    A record that the csv module does not read, for a field of megabytes, say, stays as it is.
    """
    # Latin-1 decodes any bytes, and keeps quotes and separators.
    try:
        fields = next(csv.reader([record.decode("latin-1")], delimiter=separator))
    except csv.Error:
        return record
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerow(fields)
    return text.getvalue().encode("latin-1")


def _fields(separator: str, complete: bool) -> re.Pattern[bytes]:
    """Return a pattern that finds the quoted fields."""
    mark = re.escape(separator)
    end = rf'"(?=[{mark}\r\n]|\Z)' if complete else rf'(?:"(?=[{mark}\r\n]|\Z)|\Z)'
    return re.compile(rf'(?:\A|(?<=[{mark}\n]))"[^"]*(?:""[^"]*)*{end}'.encode())
