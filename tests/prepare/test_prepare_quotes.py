"""Quotes in CSV files: quoted fields, inches, and quotes that are never closed."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.errors import InputError
from tron_cli.prepare.reading import columns
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import read_delimited
from tron_cli.prepare.reading.quotes import quoted_bytes

Row = tuple[str, ...]


def read(file: Path, bad: BadLines) -> tuple[list[Row], list[int]]:
    """The rows of columns a and b, and their line numbers."""
    rows: list[Row] = []
    lines: list[int] = []
    for block in read_delimited(file, ["a", "b"], bad, separator=",", quoted=True):
        rows += block.frame.fill_null("").rows()
        lines += block.lines.tolist()
    return rows, lines


def quoted_one_by_one(text: str) -> list[bool]:
    """RFC 4180, character by character."""
    quoted = [False] * len(text)
    for start in range(len(text)):
        if text[start] != '"' or quoted[start] or (start and text[start - 1] not in ",\n"):
            continue
        at = start + 1
        while at < len(text) and (text[at] != '"' or text[at + 1 : at + 2] == '"'):
            at += 2 if text[at] == '"' else 1
        if at < len(text) and text[at + 1 : at + 2] in ("", ",", "\r", "\n"):
            quoted[start : at + 1] = [True] * (at + 1 - start)
    return quoted


@settings(max_examples=2000, deadline=None)
@given(st.text('""",\na\r', max_size=40))
def test_quoted_fields_are_those_of_rfc_4180(text: str) -> None:
    found = quoted_bytes(text.encode(), ",", complete=True)
    assert found.tolist() == quoted_one_by_one(text)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.text('"5,\nä ', max_size=6)] * 2), min_size=1, max_size=12),
    raw=st.integers(0, 2**24 - 1),
    block_bytes=st.integers(5, 60),
)
def test_values_come_back_however_they_are_quoted(
    rows: list[Row], raw: int, block_bytes: int
) -> None:
    """A field without separator and line end that starts with no quote needs none."""
    expected, lines, text, line = [], [], "a,b\n", 2
    for row in rows:
        if not any(row):
            continue
        fields = []
        for value in row:
            raw, bare = raw >> 1, raw & 1 and not value.startswith('"')
            out = io.StringIO()
            csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="").writerow([value])
            fields.append(value if bare and not set(value) & set(",\n") else out.getvalue())
        text += ",".join(fields) + "\n"
        expected.append(row)
        lines.append(line)
        line += 1 + sum(value.count("\n") for value in row)
    if not expected:
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BLOCK_BYTES", block_bytes)
        file = Path(folder) / "a.csv"
        file.write_text(text)
        assert read(file, BadLines()) == (expected, lines)


def test_inches_are_characters(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1,5" nail\n2,"6"" nail, steel"\n3,"7"" and" 8"\n4,8" and 9"\n5,"x\ny"\n')
    bad = BadLines(skip=True)
    rows, lines = read(file, bad)
    assert rows == [("1", '5" nail'), ("2", '6" nail, steel'), ("4", '8" and 9"'), ("5", "x\ny")]
    assert lines == [2, 3, 5, 6]
    assert (bad.count, bad.first) == (
        1,
        "a.csv, line 4: a quote opens a field and does not close it",
    )


@pytest.mark.parametrize("block_bytes", [50, 1 << 24])
@pytest.mark.parametrize("patience", [500, 1 << 26])
def test_an_unclosed_quote_costs_its_line(
    tmp_path: Path, block_bytes: int, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no other quote follows, the end of the file or MAX_LINE_BYTES decides."""
    monkeypatch.setattr(columns, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(columns, "MAX_LINE_BYTES", patience)
    file = tmp_path / "a.csv"
    good = [f"{n},item{n}" for n in range(300)]
    broken = ['7,"broken', '"8,broken']
    file.write_text("\n".join(["a,b", *good[:100], *broken, *good[100:]]))
    bad = BadLines(skip=True)
    rows, lines = read(file, bad)
    assert rows == [tuple(line.split(",")) for line in good]
    assert lines == [*range(2, 102), *range(104, 304)]
    assert bad.count == 2
    with pytest.raises(InputError, match=r"a\.csv, line 102: a quote opens a field and does not"):
        read(file, BadLines())


def test_fields_that_the_csv_module_refuses(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    long = "x" * 200_000
    file.write_text(f'a,b\n1,5" {long}\n2,"{long}"\n3,c\n')
    bad = BadLines(skip=True)
    rows, lines = read(file, bad)
    assert np.array_equal(lines, [3, 4])
    assert rows == [("2", long), ("3", "c")]
    assert bad.count == 1
