"""Files of events in every format that `tron prepare table` reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from helpers.tables import DAY, START, Row, write_csv


def as_frame(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["user", "item", "time", "kind"], orient="row")


def gz(write: Callable[[Path, list[Row]], Any]) -> Callable[[Path, list[Row]], Any]:
    def write_compressed(path: Path, rows: list[Row]) -> None:
        plain = path.with_suffix("")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))

    return write_compressed


def write_jsonl(path: Path, rows: list[Row]) -> None:
    keys = ("kind", "time", "item", "user")
    lines = [
        json.dumps({**dict(zip(keys, row[::-1], strict=True)), "x": {"y": [1]}}) for row in rows
    ]
    path.write_text("\n".join(lines))


def write_inter(path: Path, rows: list[Row]) -> None:
    write_csv(path, rows, "\t")
    header = "user:token\titem:token\ttime:float\tkind:token"
    path.write_text("\n".join([header, *path.read_text().splitlines()[1:]]))


def write_quoted(path: Path, rows: list[Row]) -> None:
    as_frame(rows).write_csv(path, quote_style="always", line_terminator="\r\n")


def write_named(path: Path, rows: list[Row]) -> None:
    """Write fields with separators, quotes and line breaks in a column that is not read."""
    frame = as_frame(rows).with_columns(name=pl.lit('a "b",\nc'))
    frame.select("user", "name", "item", "time", "kind").write_csv(path)


CSV_HEAD = "user,item,time,kind\n"


CSV = f"{CSV_HEAD}u,i,{START},view\n".encode()


FORMATS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "events.csv": write_csv,
    "events.csv.gz": gz(write_csv),
    "semicolons.csv": lambda path, rows: write_csv(path, rows, ";"),
    "events.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "events.inter": write_inter,
    "quoted.csv": write_quoted,
    "named.csv": write_named,
    "events.jsonl": write_jsonl,
    "events.jsonl.gz": gz(write_jsonl),
    "events.ndjson": write_jsonl,
    "events.parquet": lambda path, rows: as_frame(rows).write_parquet(path),
    "categorical.parquet": lambda path, rows: (
        as_frame(rows).cast({"item": pl.Categorical, "user": pl.Categorical}).write_parquet(path)
    ),
    "datetime.parquet": lambda path, rows: (
        as_frame(rows).with_columns(pl.col("time").cast(pl.Datetime("ms"))).write_parquet(path)
    ),
    "zone.parquet": lambda path, rows: (
        as_frame(rows)
        .with_columns(
            pl.col("time").cast(pl.Datetime("ms", "UTC")).dt.convert_time_zone("Asia/Tokyo")
        )
        .write_parquet(path)
    ),
}


def few(ids: list[Any], dtype: pl.DataType | type[pl.DataType] | None = None) -> pl.DataFrame:
    """Return a table whose sessions hold all of `ids`."""
    return pl.DataFrame(
        [
            {"user": session, "item": item, "time": START + session * DAY // 10 + at}
            for session in range(50)
            for at, item in enumerate(ids)
        ],
        schema_overrides={"item": dtype} if dtype else None,
    )
