"""Ids of items, sessions and users from a column."""

from __future__ import annotations

import polars as pl

from tron_cli.errors import InputError

# Integers below these are exact as floats.
_EXACT: dict[type, int] = {pl.Float16: 2**11, pl.Float32: 2**24, pl.Float64: 2**53}


def ids_of(column: pl.Series) -> pl.Series:
    """Return integers as Int64, also those stored as floats, and everything else as text."""
    if column.dtype == pl.Boolean:
        raise TypeError(column.dtype)
    if column.dtype.is_float():
        integers = column.cast(pl.Int64, strict=False)
        inexact = column.filter(column.is_finite() & (column.abs() >= _EXACT[type(column.dtype)]))
        if len(inexact):
            raise InputError(
                f"ids such as {inexact[0]:.0f} are not exact as {column.dtype}; store the ids as "
                "integers or as text"
            )
        return integers.set(integers != column, None)
    if column.dtype.is_integer() and column.dtype not in (pl.UInt64, pl.Int128, pl.UInt128):
        return column.cast(pl.Int64)
    ids = column.cast(pl.String)
    # The ids are stored one per line, and NUL is not allowed in text.
    return ids.set(ids.str.contains(r"^\s*$|[\r\n\x00]"), None)
