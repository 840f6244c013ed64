"""Ids of items, sessions and users are kept exactly; what is no id is a bad line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as arrow
import pytest
from helpers.table_files import FORMATS, as_frame, few
from helpers.tables import DAY, SESSION, START, USER, shop, write_csv
from pyarrow.parquet import write_table as write_arrow

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.prepare.sources.table import prepare_table


@pytest.mark.parametrize("name", ["events.csv", "events.jsonl", "events.parquet", "float.parquet"])
def test_integer_ids_stay_integers(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    rows = [
        (user, int(item[1:]), at, kind) for user, item, at, kind in shop(rng, users=150, days=4)
    ]
    if name == "float.parquet":
        as_frame(rows).cast({"item": pl.Float64}).write_parquet(tmp_path / name)
    else:
        FORMATS[name](tmp_path / name, rows)
    dataset = prepare_table(tmp_path / name, USER, tmp_path, "out")
    assert dataset.item_ids.dtype == np.int64
    assert set(dataset.item_ids.tolist()) <= {item for _, item, _, _ in rows}


def test_ids_that_only_look_like_integers_stay_text(tmp_path: Path) -> None:
    rows = [
        (f"u{session}", item, START + session * DAY // 10 + at, "view")
        for session in range(50)
        for at, item in enumerate(["007", "7", "1e3", "ü 1", "7.0", "99999999999999999999"])
    ]
    dataset = prepare_table(write_csv(tmp_path / "a.csv", rows), USER, tmp_path, "out")
    assert dataset.item_ids.tolist() == ["007", "7", "1e3", "ü 1", "7.0", "99999999999999999999"]
    assert Dataset.open(tmp_path / "out").item_ids[1] == "7"


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (["5.0", "-7.0", "0.0"], [5, -7, 0]),
        (["5.0", "7"], ["5.0", "7"]),  # are 5.0 and 5 one item?
        (["5.0", "007.0"], ["5.0", "007.0"]),
        (["5.0", "7.5"], ["5.0", "7.5"]),
        (["5.0", "9007199254740994.0"], ["5.0", "9007199254740994.0"]),  # not exact as a float
    ],
)
def test_ids_that_pandas_wrote_as_floats_are_integers(
    tmp_path: Path, spelled: list[str], expected: list[int | str]
) -> None:
    """It does so where a value is missing in the column."""
    rows = [
        (f"{session}.0", item, START + session * DAY // 10 + at, "view")
        for session in range(50)
        for at, item in enumerate(spelled)
    ]
    dataset = prepare_table(write_csv(tmp_path / "a.csv", rows), USER, tmp_path, "out")
    assert dataset.item_ids.tolist() == expected
    assert dataset.user_ids("test") is None or dataset.user_ids("test").dtype == np.int64


BIG_IDS = [2**63 + 1, 2**63 + 2, 2**64 - 1, 2**53 + 1, 2**53 + 2]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("column", ["user", "item"])
def test_large_ids_are_exact(tmp_path: Path, name: str, column: str) -> None:
    frame = few(BIG_IDS, pl.UInt64)
    if column == "user":
        frame = frame.with_columns(
            user=pl.col("user").cast(pl.UInt64) + pl.lit(2**63 + 1, pl.UInt64)
        )
    write = {"a.csv": frame.write_csv, "a.jsonl": frame.write_ndjson}
    write.get(name, frame.write_parquet)(tmp_path / name)
    dataset = prepare_table(tmp_path / name, SESSION, tmp_path, "out")
    assert [int(item) for item in dataset.item_ids] == BIG_IDS
    assert (
        len(dataset.split("train")) + len(dataset.split("val")) + len(dataset.split("test")) == 50
    )


def test_ids_in_uint64_that_fit_int64_are_integers(tmp_path: Path) -> None:
    few([1, 2, 3]).cast({"item": pl.UInt64}).write_parquet(tmp_path / "a.parquet")
    dataset = prepare_table(tmp_path / "a.parquet", SESSION, tmp_path, "out")
    assert dataset.item_ids.dtype == np.int64


def test_decimal_ids_are_exact(tmp_path: Path) -> None:
    ids = [10**30 + 1, 10**30 + 2]
    columns = few([1, 2]).drop("item").to_arrow()
    items = arrow.array([Decimal(item) for item in ids * 50], arrow.decimal128(38))
    write_arrow(columns.append_column("item", items), tmp_path / "a.parquet")
    dataset = prepare_table(tmp_path / "a.parquet", SESSION, tmp_path, "out")
    assert [int(item) for item in dataset.item_ids] == ids


@pytest.mark.parametrize("column", ["user", "item"])
@pytest.mark.parametrize(("dtype", "limit"), [(pl.Float64, 2**53), (pl.Float32, 2**24)])
def test_ids_that_a_float_cannot_hold_are_refused(
    tmp_path: Path, column: str, dtype: Any, limit: int
) -> None:
    largest = few([limit - 1, limit - 2]).cast({column: dtype})
    largest.write_parquet(tmp_path / "a.parquet")
    prepare_table(tmp_path / "a.parquet", SESSION, tmp_path, "out")
    beyond = few([1, 2]).with_columns((pl.col(column) + limit).cast(dtype))
    beyond.write_parquet(tmp_path / "a.parquet")
    problem = rf"a\.parquet, column {column}: ids such as \d+ are not exact as {dtype.__name__}"
    with pytest.raises(InputError, match=problem):
        prepare_table(tmp_path / "a.parquet", SESSION, tmp_path, "refused", skip_bad_lines=True)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "categorical.parquet"])
@pytest.mark.parametrize("token", ["NULL", "null", "None", "NA", "N/A", "nan", "NaN", "\\N"])
def test_null_tokens_are_bad_lines(tmp_path: Path, name: str, token: str) -> None:
    frame = few(["a", "b", token]).with_columns(pl.format("u{}", "user").alias("user"))
    if name == "categorical.parquet":
        frame = frame.cast({"item": pl.Categorical})
    write = {"a.csv": frame.write_csv, "a.jsonl": frame.write_ndjson}
    write.get(name, frame.write_parquet)(tmp_path / name)
    with pytest.raises(InputError, match=r"(line [34]|row 3): .* which means a missing value"):
        prepare_table(tmp_path / name, SESSION, tmp_path, "out")
    dataset = prepare_table(tmp_path / name, SESSION, tmp_path, "out", skip_bad_lines=True)
    assert dataset.item_ids.tolist() == ["a", "b"]
    assert dataset.info["bad_lines"]["count"] == 50
    columns = replace(SESSION, null_tokens=("b", "u0"))
    dataset = prepare_table(tmp_path / name, columns, tmp_path, "other", skip_bad_lines=True)
    assert dataset.item_ids.tolist() == ["a", token]
    assert dataset.info["bad_lines"]["count"] == 52
    assert dataset.info["options"]["null_tokens"] == ["b", "u0"]


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_id_is_none_whatever_the_null_tokens(tmp_path: Path, empty: str | None) -> None:
    few(["a", "b", empty]).write_parquet(tmp_path / "a.parquet")
    columns = replace(SESSION, null_tokens=())
    with pytest.raises(
        InputError, match="row 3: expected an id without line breaks in item, found nothing"
    ):
        prepare_table(tmp_path / "a.parquet", columns, tmp_path, "out")


def test_null_tokens_on_the_command_line(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    few(["a", "NA", "none"]).write_csv(tmp_path / "a.csv")
    words = ["prepare", "table", "--input", tmp_path / "a.csv", "--item-col", "item"]
    words += ["--time-col", "time", "--session-col", "user", "--data-dir", tmp_path, "--json"]
    code, _, error = command(*words, "--name", "one")
    assert (code, "line 3: expected an id" in error) == (2, True)
    code, out, _ = command(*words, "--name", "two", "--null-tokens", "")
    assert (code, json.loads(out)["num_items"]) == (0, 3)
    words += ["--skip-bad-lines", "--null-tokens", "none, NA"]
    code, out, _ = command(*words, "--name", "three", "--min-session-length", 2)
    assert code == 2  # sessions of one event
    code, out, _ = command(*words[:-1], "none", "--name", "four")
    assert (code, json.loads(out)["num_items"]) == (0, 2)
