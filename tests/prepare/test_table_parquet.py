"""Parquet: bad rows, columns of other types, zones, and damaged files."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as arrow
import pytest
from helpers.table_files import as_frame
from helpers.tables import START, USER, shop, write_csv
from pyarrow.parquet import write_table as write_arrow

from tron_cli.errors import InputError
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import INTEGER
from tron_cli.prepare.reading.parquet import read_parquet
from tron_cli.prepare.sources.table import prepare_table


def test_bad_rows_of_parquet(tmp_path: Path, rng: np.random.Generator) -> None:
    file = tmp_path / "events.parquet"
    frame = as_frame(shop(rng, users=150, days=4))
    bad = frame.with_row_index().with_columns(
        item=pl.when(pl.col("index") != 7).then(pl.col("item"))
    )
    bad.write_parquet(file)
    with pytest.raises(InputError, match=r"events.parquet, row 8: expected an id .* found nothing"):
        prepare_table(file, USER, tmp_path, "out")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"not a readable Parquet file"):
        prepare_table(file, USER, tmp_path, "out")


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("time", pl.Series([0] * 20, dtype=pl.Time), "a number in time, found the type Time"),
        (
            "user",
            pl.Series([{"id": 1}] * 20),
            r"an id without line breaks in user, found the type Struct",
        ),
        (
            "item",
            pl.Series([["i1"]] * 20),
            r"an id without line breaks in item, found the type List",
        ),
    ],
)
def test_columns_of_parquet_that_hold_something_else(
    tmp_path: Path, column: str, values: pl.Series, problem: str
) -> None:
    frame = as_frame([("u1", "i1", START, "view")] * 20).with_columns(values.alias(column))
    frame.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=problem):
        prepare_table(tmp_path / "a.parquet", USER, tmp_path, "out")


def with_fixed_offset(file: Path) -> None:
    """Replace the zone Israel in a Parquet file by +05:30, which polars cannot write."""
    content = file.read_bytes()
    found = re.search(rb"ARROW:schema.{1,6}?([A-Za-z0-9+/]{100,}={0,2})", content, re.DOTALL)
    assert found
    schema = base64.b64decode(found[1])
    assert schema.count(b"Israel") == 1
    schema = base64.b64encode(schema.replace(b"Israel", b"+05:30"))
    file.write_bytes(content.replace(found[1], schema))


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_zone_of_a_fixed_offset(tmp_path: Path, rng: np.random.Generator, unit: Any) -> None:
    rows = shop(rng, users=150, days=4)
    expected = prepare_table(write_csv(tmp_path / "plain.csv", rows), USER, tmp_path, "expected")
    zoned = pl.from_epoch("time", "ms").cast(pl.Datetime(unit, "UTC"))
    frame = as_frame(rows).with_columns(zoned.dt.convert_time_zone("Israel"))
    frame.write_parquet(tmp_path / "a.parquet")
    with_fixed_offset(tmp_path / "a.parquet")
    dataset = prepare_table(tmp_path / "a.parquet", USER, tmp_path, "out")
    assert dataset.info["splits"] == expected.info["splits"]


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_parquet_file_is_read_or_refused_in_a_sentence(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes are replaced anywhere: polars panicked on some of these files, and aborted on one."""
    file = tmp_path / "a.parquet"
    as_frame(shop(np.random.default_rng(0), users=20, days=4)).write_parquet(file)
    content = file.read_bytes()
    random = np.random.default_rng(seed)
    refused = 0
    for _ in range(50):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = random.integers(0, len(damaged), random.choice([1, 3, 10]))
        damaged[places] = random.integers(0, 256, len(places))
        file.write_bytes(damaged[: random.choice([None, -100], p=[0.9, 0.1])].tobytes())
        bad = BadLines(skip=True)
        try:
            for block in read_parquet(file, ["user", "item", "time"]):
                block.parse({"user": INTEGER, "item": INTEGER, "time": INTEGER}, bad)
        except InputError:
            refused += 1
    assert refused > 25
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        arrow.array([1, 2], arrow.duration("s")),
        arrow.array([1, 2], arrow.float16()),
        arrow.array([1, 2], arrow.decimal256(50)),
        arrow.array([b"\xff", b"1"], arrow.binary()),
        arrow.array([b"12", b"34"], arrow.binary(2)),
        arrow.array([None, None], arrow.null()),
        arrow.array([{"a": 1}, {"a": 2}]),
        arrow.array([[("a", 1)], []], arrow.map_(arrow.string(), arrow.int64())),
        arrow.array([True, False]),
        arrow.array(["a", "b"]).dictionary_encode(),
        arrow.array([1, 2], arrow.time32("s")),
    ],
    ids=lambda values: str(values.type).partition("<")[0],
)
@pytest.mark.parametrize("column", ["user", "item", "time"])
def test_any_type_of_parquet_is_read_or_refused(
    tmp_path: Path, column: str, values: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    columns = {"user": [1, 1], "item": [1, 2], "time": [START, START], column: values}
    write_arrow(arrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet|no session is left"):
        prepare_table(tmp_path / "a.parquet", USER, tmp_path, "out")
    assert "panicked" not in capfd.readouterr().err
