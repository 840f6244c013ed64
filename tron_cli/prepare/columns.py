"""Text and Parquet files -> columns, block by block, with the line number of every row.

A text file is read in blocks of whole lines. The layout of a block (where its lines end, how many
fields each has) is found in one vectorized look at its bytes, so that blank lines are stepped over,
ragged ones are known by number, and polars parses only lines that have the right shape. All text
columns come out as strings: what they mean, and which value is bad, the source decides.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

from tron_cli.errors import InputError

BLOCK_BYTES = 1 << 24
MAX_LINE_BYTES = 1 << 26
PARQUET_ROWS = 1 << 21
_NEWLINE, _RETURN, _QUOTE = b"\n\r\""


@dataclass(frozen=True)
class Columns:
    """Rows of a file: one polars column per wanted name; lines int64 [rows], numbers from 1."""

    frame: pl.DataFrame
    lines: np.ndarray

    def filter(self, keep: np.ndarray) -> Columns:
        """The rows where `keep` (bool [rows]) holds."""
        return self if keep.all() else Columns(self.frame.filter(pl.Series(keep)), self.lines[keep])


class BadLines:
    """What happens to a line that cannot be read: an InputError, or skipped and counted."""

    def __init__(self, *, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0
        self.first: str | None = None

    def reject(self, file: Path, line: int, problem: str) -> None:
        """One bad line, numbered from 1."""
        if not self.skip:
            raise InputError(
                f"{file}, line {line}: {problem}; correct the file, or pass --skip-bad-lines"
            )
        self.count += 1
        self.first = self.first or f"{file.name}, line {line}: {problem}"

    def keep_valid(
        self, file: Path, columns: Columns, name: str, values: pl.Series, expected: str
    ) -> np.ndarray:
        """bool [rows]: where `values`, made from column `name`, is not null; the rest is rejected."""
        valid = values.is_not_null().to_numpy()
        for row in np.flatnonzero(~valid):
            found = columns.frame[name][int(row)]
            shown = "nothing" if found is None or found == "" else repr(found)[:80]
            self.reject(
                file, int(columns.lines[row]), f"expected {expected} in {name}, found {shown}"
            )
        return valid


def read_delimited(
    file: Path,
    *,
    separator: str,
    wanted: list[str],
    names: list[str] | None = None,
    quoted: bool = False,
    bad: BadLines,
) -> Iterator[Columns]:
    """The wanted columns of a delimited text file (plain or gzip), as strings.

    names: the file's columns where it has no header line. quoted: whether double quotes enclose
    fields (they may then hold separators and line breaks). Yields at least one row, or raises.
    """
    found = False
    positions: list[int] = []
    for block, first_line in _text_blocks(file, quoted=quoted):
        if names is None:
            header, block, first_line = _split_header(file, block, first_line, separator, quoted)
            names = header
        if not positions:
            positions = [find_column(file, names, name) for name in wanted]
        starts, ends, lines, fields = _layout(block, first_line, separator, quoted)
        whole = fields == len(names)
        for record in np.flatnonzero(~whole):
            bad.reject(
                file,
                int(lines[record]),
                f"expected {len(names)} fields separated by {separator!r}, found {fields[record]}",
            )
        lines = lines[whole]
        if not len(lines):
            continue
        if len(lines) < len(starts) or ends[-1] - starts[0] + 1 < len(block):
            block = b"".join(
                block[start : end + 1]
                for start, end in zip(starts[whole], ends[whole], strict=True)
            )
        for frame, part in _parse(file, block, lines, names, separator, quoted, bad):
            found = True
            yield Columns(frame[:, positions].rename(dict(zip(frame[:, positions].columns, wanted))), part)
    if not found:
        raise InputError(f"{file} holds no readable line: expected {', '.join(wanted)} in each")
