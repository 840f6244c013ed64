"""Text files of numbers: one session, or a user and an item, per line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import text_blocks

MAX_DIGITS = 19  # numbers of so many digits fit uint64
LARGEST = 2**63 - 1
_BLANKS = b" ,\t"
_HOLE = re.compile(rb",[ \t]*,")  # a missing number


def read_integer_lines(
    file: Path, bad: BadLines, *, per_line: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield non-negative integers separated by blanks, commas or tabs, in blocks of whole lines.

    Each block is (numbers int64 [n], numbers per line int64 [lines], line numbers from 1 int64
    [lines]). per_line: the count that every line must hold. Blank lines are skipped; the file may
    be compressed.
    """
    for block, first_line in text_blocks(file):
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        is_foreign = ~_is_digit(data) & ~np.isin(data, np.frombuffer(_BLANKS + b"\n", np.uint8))
        foreign = np.bincount(
            np.searchsorted(ends, np.flatnonzero(is_foreign)), minlength=len(ends)
        )
        numbers, digits, lines = _numbers(data, ends)
        is_large = (digits > MAX_DIGITS) | (
            numbers < 0
        )  # a negative number has wrapped: it exceeds int64
        holes = [match.start() for match in _HOLE.finditer(block)]
        hole = np.bincount(np.searchsorted(ends, np.array(holes, np.int64)), minlength=len(ends))
        large = np.bincount(lines[is_large], minlength=len(ends))
        counts = np.bincount(lines, minlength=len(ends))
        is_bad = (foreign > 0) | (large > 0) | (hole > 0)
        if per_line is not None:
            is_bad |= (counts > 0) & (counts != per_line)
        for line in np.flatnonzero(is_bad).tolist():
            text = block[ends[line - 1] + 1 if line else 0 : ends[line]].decode(errors="replace")
            expected = "integers" if per_line is None else f"{per_line} integers"
            problem = f"expected {expected} from 0 to {LARGEST}, found {text[:60]!r}"
            bad.reject(file, first_line + line, problem)
        kept = np.flatnonzero((counts > 0) & ~is_bad)
        yield numbers[~is_bad[lines]], counts[kept], first_line + kept


def _is_digit(data: np.ndarray) -> np.ndarray:
    return (data >= ord("0")) & (data <= ord("9"))


def _numbers(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return value, number of digits and line (from 0) of each run of digits."""
    edges = np.flatnonzero(np.diff(_is_digit(data), prepend=False))  # the text ends in a line end
    starts, digits = edges[::2], edges[1::2] - edges[::2]
    values = np.zeros(len(starts), np.int64)
    for place in range(min(int(digits.max(initial=0)), MAX_DIGITS)):
        longer = np.flatnonzero(digits > place)
        values[longer] = values[longer] * 10 + (data[starts[longer] + place] - ord("0"))
    return values, digits, np.searchsorted(ends, starts)
