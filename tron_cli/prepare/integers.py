"""Text files that hold nothing but numbers: a session, or a user and an item, a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tron_cli.prepare.columns import BadLines, text_blocks

MAX_DIGITS = 18  # whatever has no more fits int64
_BLANKS = b" ,\t"


def read_integer_lines(
    file: Path, bad: BadLines, *, per_line: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Non-negative integers separated by blanks, commas or tabs, in blocks of whole lines.

    Yields (numbers int64 [n], how many each line that has any holds, int64 [lines]). per_line: how
    many every line must hold. Blank lines are stepped over; the file may be a gzip.
    """
    for block, first_line in text_blocks(file, quoted=False):
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        foreign = ~_is_digit(data) & ~np.isin(data, np.frombuffer(_BLANKS + b"\n", np.uint8))
        is_bad = np.zeros(len(ends), bool)
        for line in np.unique(np.searchsorted(ends, np.flatnonzero(foreign))).tolist():
            text = block[ends[line - 1] + 1 if line else 0 : ends[line]].decode(errors="replace")
            bad.reject(file, first_line + line, f"expected integers, found {text[:60]!r}")
            is_bad[line] = True
        numbers, digits, lines = _numbers(data, ends)
        for line in np.unique(lines[(digits > MAX_DIGITS) & ~is_bad[lines]]).tolist():
            problem = f"expected integers of at most {MAX_DIGITS} digits"
            bad.reject(file, first_line + line, problem)
            is_bad[line] = True
        counts = np.bincount(lines, minlength=len(ends))
        if per_line is not None:
            for line in np.flatnonzero((counts > 0) & (counts != per_line) & ~is_bad).tolist():
                problem = f"expected {per_line} integers, found {counts[line]}"
                bad.reject(file, first_line + line, problem)
                is_bad[line] = True
        yield numbers[~is_bad[lines]], counts[(counts > 0) & ~is_bad]


def _is_digit(data: np.ndarray) -> np.ndarray:
    return (data >= ord("0")) & (data <= ord("9"))


def _numbers(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of digits: their values, their lengths, and the line (from 0) of each."""
    edges = np.flatnonzero(np.diff(_is_digit(data), prepend=False))  # the text ends in a line end
    starts, digits = edges[::2], edges[1::2] - edges[::2]
    values = np.zeros(len(starts), np.int64)
    for place in range(min(int(digits.max(initial=0)), MAX_DIGITS)):
        longer = np.flatnonzero(digits > place)
        values[longer] = values[longer] * 10 + (data[starts[longer] + place] - ord("0"))
    return values, digits, np.searchsorted(ends, starts)
