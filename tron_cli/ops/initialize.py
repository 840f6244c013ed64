"""Initial values of tables and layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_SMALL = 0.02  # standard deviation
# Rows drawn at once where only some are kept. torch draws normal numbers in groups of 16, and the
# last group anew where it is not full, so that all blocks but the last are a multiple of 16.
_ROWS_AT_ONCE = 1 << 14

_kept: tuple[int, int] | None = None


@contextmanager
def keeping_rows(first: int, last: int) -> Iterator[None]:
    """Let the functions below return only rows first to last - 1 of the table that they draw.

    The random numbers are those of the whole table, of which only some rows exist at a time.
    """
    global _kept
    _kept = first, last
    try:
        yield
    finally:
        _kept = None


def xavier_uniform(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] evenly from +- sqrt(6 / (rows + columns)), torch's xavier_uniform_."""
    bound = math.sqrt(3.0) * math.sqrt(2.0 / (rows + columns))  # rounded as torch does
    return _drawn(rows, columns, lambda table: table.uniform_(-bound, bound))


def standard_normal(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from N(0, 1)."""
    return _drawn(rows, columns, lambda table: table.normal_())


def _drawn(rows: int, columns: int, draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a table filled by `draw`, or the rows of it to keep."""
    if _kept is None:
        return draw(torch.empty(rows, columns))
    first, last = _kept
    kept = torch.empty(last - first, columns)
    for low in range(0, max(1, rows - _ROWS_AT_ONCE + 1), _ROWS_AT_ONCE):
        is_last = rows - low < 2 * _ROWS_AT_ONCE
        high = rows if is_last else low + _ROWS_AT_ONCE
        block = draw(torch.empty(high - low, columns))
        begin, end = max(first, low), min(last, high)
        if begin < end:
            kept[begin - first : end - first] = block[begin - low : end - low]
    return kept


def small_normal(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from N(0, 0.02), RecBole's choice after BERT's."""
    return standard_normal(rows, columns).mul_(_SMALL)


def small_normal_weights(module: nn.Module) -> None:
    """Draw the matrix of a linear layer from N(0, 0.02) and set its bias to zero; skip others."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_SMALL)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
