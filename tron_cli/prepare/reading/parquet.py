"""Parquet files to columns, block by block, with the number of every row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from tron_cli.errors import InputError
from tron_cli.prepare.reading.columns import Columns, find_columns, first_line

PARQUET_ROWS = 1 << 19  # in memory at a time


def read_parquet(file: Path, wanted: list[str]) -> Iterator[Columns]:
    """Yield the wanted columns of a Parquet file, in their own types; times with a zone in UTC.

    Read by Arrow, which raises where a damaged file makes polars panic, or abort the process.
    """
    import pyarrow as arrow  # slow to import, and not needed by other formats
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, page_checksum_verification=True) as table:
            rows = table.metadata.num_rows
            names = table.schema_arrow.names
            columns = [names[at] for at in find_columns(file, names, wanted)]
            bar = tqdm(total=rows, desc=file.name, unit=" rows", unit_scale=True, disable=None)
            with bar:
                for batch in table.iter_batches(PARQUET_ROWS, columns=columns):
                    batch.validate(full=True)
                    frame = pl.DataFrame(
                        {
                            name: _from_arrow(batch.column(column))
                            for name, column in zip(wanted, columns, strict=True)
                        }
                    )
                    lines = np.arange(bar.n + 1, bar.n + len(frame) + 1)
                    yield Columns(file, frame, lines, unit="row")
                    bar.update(len(frame))
    except (arrow.ArrowException, pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise InputError(
            f"{file} is not a readable Parquet file: {first_line(error).rstrip('.')}; get it again"
        ) from error
    if not rows:
        raise InputError(f"{file} holds no row")


def _from_arrow(column: Any) -> pl.Series:
    import pyarrow as arrow

    if arrow.types.is_timestamp(column.type):
        # The number is UTC whatever the zone, and polars knows no zone such as +05:30.
        column = column.cast(arrow.timestamp(column.type.unit))
    if arrow.types.is_decimal(column.type):  # of up to 76 digits, which are too many for polars
        column = column.cast(arrow.string())
    return pl.Series(column)
