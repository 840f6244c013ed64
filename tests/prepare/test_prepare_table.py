"""A user's own table: the same result from every format, and an honest split."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as arrow
import pytest
from helpers.tables import DAY, MINUTE, SESSION, START, USER, Row, Session, shop, unpack, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table as write_arrow

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.prepare.reading import columns
from tron_cli.prepare.reading.columns import INTEGER, BadLines, read_parquet
from tron_cli.prepare.sources.table import TableColumns, prepare_table

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")


def brute_force(
    rows: list[Row],
    *,
    gap: int | None,
    leave_one_out: bool,
    min_length: int,
    min_count: int,
    val_days: float,
    test_days: float,
) -> dict[str, Any]:
    numbered: dict[str, list[tuple[int, int, str]]] = {}
    for number, (user, item, at, _) in enumerate(rows):
        numbered.setdefault(user, []).append((at, number, item))
    sessions: list[list[tuple[int, int, str]]] = []
    for events in numbered.values():
        events.sort()
        current = [events[0]]
        for event in events[1:]:
            if gap is not None and event[0] - current[-1][0] > gap:
                sessions.append(current)
                current = []
            current.append(event)
        sessions.append(current)
    sessions.sort(key=lambda events: min(number for _, number, _ in events))  # as in the file
    least = max(min_length, 3) if leave_one_out else min_length
    sessions = [events for events in sessions if len(events) >= least]
    support = Counter(item for events in sessions for _, _, item in events)
    sessions = [[e for e in events if support[e[2]] >= min_count] for events in sessions]
    sessions = [events for events in sessions if len(events) >= least]
    plain = [[(at, item) for at, _, item in events] for events in sessions]
    if leave_one_out:
        held = 2 if val_days > 0 else 1
        period = [events[:-1] for events in plain]
        train = [events[:-held] for events in plain if len(events) - held >= 2]
        val = period if val_days > 0 else []
        known = {item for events in period for _, item in events}
        test = [events for events in plain if events[-1][1] in known]
        lost = len(plain) - len(test)
    else:

        def divide(whole: list[Session], days: float) -> tuple[list[Session], list[Session]]:
            if not whole:
                return [], []
            limit = max(events[0][0] for events in whole) - days * DAY
            late = [events for events in whole if events[0][0] >= limit]
            start = min(events[0][0] for events in late)
            early = [[e for e in s if e[0] < start] for s in whole if s[0][0] < limit]
            return [events for events in early if len(events) >= 2], late

        period, test = divide(plain, test_days)
        train, val = divide(period, val_days) if val_days > 0 else (period, [])
        known = {item for events in period for _, item in events}
        before = sum(len(events) - 1 for events in test)
        test = [[e for e in events if e[1] in known] for events in test]
        test = [events for events in test if len(events) >= 2]
        lost = before - sum(len(events) - 1 for events in test)
    splits = {"train": train, "val": val, "test": test}
    ordered = {name: sorted(part, key=lambda s: s[0][0]) for name, part in splits.items()}
    return {**ordered, "lost": lost, "items": len(known)}


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 60),
    gap=st.booleans(),
    leave_one_out=st.booleans(),
    min_length=st.integers(2, 3),
    min_count=st.integers(1, 5),
    val_days=st.sampled_from([0, 0.5, 1]),
)
def test_table_equals_brute_force(
    seed: int,
    users: int,
    gap: bool,
    leave_one_out: bool,
    min_length: int,
    min_count: int,
    val_days: float,
) -> None:
    rows = shop(np.random.default_rng(seed), users=users, days=4)
    expected = brute_force(
        rows,
        gap=30 * MINUTE if gap and not leave_one_out else None,
        leave_one_out=leave_one_out,
        min_length=min_length,
        min_count=min_count,
        val_days=val_days,
        test_days=1,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_csv(folder / "events.csv", rows)

        def prepare() -> Dataset:
            return prepare_table(
                file,
                USER if gap else SESSION,
                folder,
                "out",
                leave_one_out=leave_one_out,
                min_session_length=min_length,
                min_item_count=min_count,
                val_days=val_days,
            )

        if not expected["train"] or not expected["test"]:
            with pytest.raises(InputError, match="no session is left"):
                prepare()
            return
        dataset = prepare()
        for split in ("train", "val", "test"):
            assert unpack(dataset, split) == expected[split]
        assert dataset.split_info("test")["lost_predictions"] == expected["lost"]
        assert dataset.num_items == expected["items"]
        assert dataset.protocol == ("last-item" if leave_one_out else "every-step")
        if not leave_one_out:
            ends = [[s[-1][0] for s in expected[split]] for split in ("train", "val")]
            starts = [[s[0][0] for s in expected[split]] for split in ("val", "test")]
            for before, after in zip(ends, starts, strict=True):
                assert max(before, default=0) < min(after, default=2**62)


def test_long_sessions_do_not_carry_the_test_period_into_training(tmp_path: Path) -> None:
    """One user is active every hour of ten days; training must end before the first test event."""
    rows = [("always", f"i{hour % 5}", START + hour * 60 * MINUTE, "view") for hour in range(240)]
    for day in range(10):
        rows += [(f"u{day}", f"i{n}", START + day * DAY + n, "view") for n in range(5)]
    dataset = prepare_table(write_csv(tmp_path / "a.csv", rows), SESSION, tmp_path, "out")
    train, val, test = (unpack(dataset, split) for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [7, 2, 2]
    longest = max(train, key=len)
    assert longest[-1][0] < min(session[0][0] for session in val)
    assert len(longest) == 6 * 24
    (late,) = [step for step in dataset.info["filters"] if step["step"] == "late events"]
    assert (late["dropped_sessions"], late["dropped_events"]) == (0, 240 - len(longest))


# Formats --------------------------------------------------------------------------------------


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


def write_csv_row(path: Path) -> None:
    path.write_bytes(CSV)


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


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_dataset(
    tmp_path: Path, rng: np.random.Generator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = shop(rng, users=150, days=4)
    expected = prepare_table(write_csv(tmp_path / "plain.csv", rows), USER, tmp_path, "expected")
    FORMATS[name](tmp_path / name, rows)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.BLOCK_BYTES", 2000)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.PARQUET_ROWS", 50)
    dataset = prepare_table(tmp_path / name, USER, tmp_path, "out")
    assert dataset.info["splits"] == expected.info["splits"]
    assert dataset.item_ids.tolist() == expected.item_ids.tolist()


CONTENTS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "A.CSV": write_csv,
    "a.txt": lambda path, rows: write_csv(path, rows, "\t"),
    "a.log": lambda path, rows: write_csv(path, rows, "|"),
    "a.tsv": write_csv,
    "a": write_jsonl,
    "a.JSONL": write_jsonl,
    "json.csv": write_jsonl,
    "a.json": write_jsonl,
    "a.tsv.gz": gz(lambda path, rows: write_csv(path, rows, "\t")),
    "gzip.csv": lambda path, rows: path.write_bytes(
        gzip.compress(as_frame(rows).write_csv().encode())
    ),
    "a.csv.zst": lambda path, rows: path.write_bytes(
        zstd.compress(as_frame(rows).write_csv().encode())
    ),
    "zstd.jsonl": lambda path, rows: path.write_bytes(
        zstd.compress(as_frame(rows).write_ndjson().encode())
    ),
    "blank.csv": lambda path, rows: path.write_text("\n\r\n" + as_frame(rows).write_csv()),
    "mark.csv": lambda path, rows: path.write_text("\ufeff" + as_frame(rows).write_csv()),
    "mark.jsonl": lambda path, rows: path.write_text("\ufeff" + as_frame(rows).write_ndjson()),
    "a.pq": lambda path, rows: as_frame(rows).write_parquet(path),
    "parquet.csv": lambda path, rows: as_frame(rows).write_parquet(path),
    # More of another separator in the header than of its own.
    "names.csv": lambda path, rows: as_frame(rows).rename({"kind": "a;b;c;d;e"}).write_csv(path),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_read_as_what_it_is(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    rows = shop(rng, users=50, days=4)
    expected = prepare_table(write_csv(tmp_path / "plain", rows), USER, tmp_path, "expected")
    CONTENTS[name](tmp_path / name, rows)
    dataset = prepare_table(tmp_path / name, USER, tmp_path, "out")
    assert dataset.info["splits"] == expected.info["splits"]


def test_recboles_header_says_that_nothing_is_quoted(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    rows = shop(rng, users=50, days=4)
    write_inter(tmp_path / "a.txt", [(user, f'"{item}', at, kind) for user, item, at, kind in rows])
    items = prepare_table(tmp_path / "a.txt", USER, tmp_path, "out").item_ids.tolist()
    assert all(item.startswith('"i') for item in items)


def tar(path: Path, mode: str) -> None:
    plain = write_csv(path.with_name("plain.csv"), [("u", "i", START, "view")])
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(plain)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", CSV_HEAD)


@pytest.mark.parametrize(
    ("name", "write", "problem"),
    [
        ("a.tar", lambda path: tar(path, "w"), "is a tar archive: unpack it"),
        ("a.tar.gz", lambda path: tar(path, "w:gz"), "is a tar archive: unpack it"),
        ("a.csv.gz", lambda path: tar(path, "w:gz"), "is a tar archive: unpack it"),
        ("a.tar.bz2", lambda path: tar(path, "w:bz2"), "is compressed by bzip2: decompress it"),
        ("a.tar.xz", lambda path: tar(path, "w:xz"), "is compressed by xz: decompress it"),
        ("a.csv", zipped, "is a zip archive"),
        ("a.xlsx", zipped, "export CSV"),
        (
            "a.lz4",
            lambda path: path.write_bytes(b"\x04\x22\x4d\x18" + CSV),
            "compressed by lz4: dec",
        ),
        (
            "a.Z",
            lambda path: path.write_bytes(b"\x1f\x9d" + CSV),
            "compressed by compress: decompre",
        ),
        ("a.utf32", lambda path: path.write_bytes(CSV.decode().encode("utf-32")), "is UTF-32 text"),
        ("2.gz", lambda path: path.write_bytes(gzip.compress(gzip.compress(CSV))), "ssed twice"),
        ("2.zst", lambda path: path.write_bytes(zstd.compress(gzip.compress(CSV))), "ssed twice"),
        ("a.parquet", write_csv_row, "is not a readable Parquet file"),
        ("a.gz", lambda path: path.write_bytes(gzip.compress(b"")), "is empty"),
        ("b.gz", lambda path: path.write_bytes(gzip.compress(CSV * 99)[:-9]), "corrupt gzip file"),
        ("b.zst", lambda path: path.write_bytes(zstd.compress(CSV * 99)[:-9]), "corrupt zstd file"),
        ("c.zst", lambda path: path.write_bytes(zstd.compress(CSV)[:9] + b"x" * 9), "corrupt zstd"),
    ],
)
def test_files_that_must_be_unpacked_first_say_what_they_are(
    tmp_path: Path, name: str, write: Callable[[Path], Any], problem: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=problem) as error:
        prepare_table(tmp_path / name, USER, tmp_path, "out")
    assert str(tmp_path / name) in str(error.value)


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


BIG_IDS = [2**63 + 1, 2**63 + 2, 2**64 - 1, 2**53 + 1, 2**53 + 2]


def few(ids: list[Any]) -> pl.DataFrame:
    """A table whose sessions hold all of `ids`."""
    return pl.DataFrame(
        [
            {"user": session, "item": item, "time": START + session * DAY // 10 + at}
            for session in range(50)
            for at, item in enumerate(ids)
        ],
        schema_overrides={"item": pl.UInt64} if ids is BIG_IDS else None,
    )


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("column", ["user", "item"])
def test_large_ids_are_exact(tmp_path: Path, name: str, column: str) -> None:
    frame = few(BIG_IDS)
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


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('{"id": 1}', "found \"{'id': 1}\""),
        ("[1, 2]", "found '[1, 2]'"),
        ("[]", "found '[]'"),
        ('"\\ud800"', "found"),
        ('"a\\u0000b"', "found"),
        ("9007199254740993.0", "found '9007199254740993.0'"),
        ("0.12345678901234567891", "found '0.12345678901234567891'"),
        ("1.5", "found '1.5'"),
        ("-0.0", "found '-0.0'"),
        ("1e20", "found '1E+20'"),
        ("true", "found 'True'"),
        ("false", "found 'False'"),
        ("null", "found nothing"),
        ('""', "found nothing"),
        ('" \u00a0\\t"', "found"),
        ('"NULL"', "found 'NULL', which stands for nothing (see --null-tokens)"),
    ],
)
@pytest.mark.parametrize("column", ["user", "item"])
def test_values_of_json_that_are_no_ids(
    tmp_path: Path, column: str, value: str, found: str
) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in few([1, 2, 3]).to_dicts()]
    bad = f'{{"{column}": {value}, "{"item" if column == "user" else "user"}": 1, "time": {START}}}'
    file.write_text("\n".join([*lines[:4], bad, *lines[4:]]))
    with pytest.raises(InputError, match=r"a\.jsonl, line 5: expected an id in one line") as error:
        prepare_table(file, SESSION, tmp_path, "out")
    assert found in str(error.value)
    dataset = prepare_table(file, SESSION, tmp_path, "out", skip_bad_lines=True)
    assert dataset.info["bad_lines"]["count"] == 1
    assert sorted(dataset.item_ids.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("first", ["5", '["user"]', "[[1]]", '"user"', "null"])
def test_lines_of_json_that_are_no_objects_have_no_keys(tmp_path: Path, first: str) -> None:
    file = tmp_path / "a.jsonl"
    few([1, 2, 3]).write_ndjson(file)
    file.write_text(file.read_text() + first + "\n")
    with pytest.raises(InputError, match=r"no column 'thing': its columns are user, item, time$"):
        prepare_table(file, replace(SESSION, item="thing"), tmp_path, "out", skip_bad_lines=True)


def test_a_key_within_another_value_does_not_stand_twice(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"more": {"item": 8, "x": [{"item": 9}]}, **row, "é": '"item":', "a": "item"})
        for row in few([1, 2, 3]).to_dicts()
    ]
    file.write_text("\n".join(line.replace(": ", ":") for line in lines))
    assert prepare_table(file, SESSION, tmp_path, "out").item_ids.tolist() == [1, 2, 3]


def test_texts_of_json_that_look_like_lists_are_ids(tmp_path: Path) -> None:
    ids = [
        "1.5",
        "-0",
        "[new]",
        "{sale}",
        '{"id": 1}',
        "12345678901234567890",
        "-1",
        "true",
        "False",
    ]
    file = tmp_path / "a.jsonl"
    few(ids).write_ndjson(file)
    assert prepare_table(file, SESSION, tmp_path, "out").item_ids.tolist() == ids


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "categorical.parquet"])
@pytest.mark.parametrize("token", ["NULL", "null", "None", "NA", "N/A", "nan", "NaN", "\\N"])
def test_null_tokens_are_bad_lines(tmp_path: Path, name: str, token: str) -> None:
    frame = few(["a", "b", token]).with_columns(pl.format("u{}", "user").alias("user"))
    if name == "categorical.parquet":
        frame = frame.cast({"item": pl.Categorical})
    write = {"a.csv": frame.write_csv, "a.jsonl": frame.write_ndjson}
    write.get(name, frame.write_parquet)(tmp_path / name)
    with pytest.raises(InputError, match=r"(line [34]|row 3): .* which stands for nothing"):
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
        InputError, match="row 3: expected an id in one line in item, found nothing"
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


# Kinds of events, bad input -------------------------------------------------------------------


def test_only_the_kinds_to_keep(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = shop(rng, users=200, days=4)
    views = [row for row in rows if row[3] == "view"]
    columns = TableColumns("item", "time", user="user", event="kind", keep_events=("view",))
    dataset = prepare_table(write_csv(tmp_path / "all.csv", rows), columns, tmp_path, "kept")
    expected = prepare_table(write_csv(tmp_path / "views.csv", views), USER, tmp_path, "views")
    assert dataset.info["splits"] == expected.info["splits"]
    first, second = dataset.info["filters"][:2]
    assert (first["events"], second["events"]) == (len(rows), len(views))
    assert second["dropped_events"] == len(rows) - len(views)
    wrong = TableColumns("item", "time", user="user", event="kind", keep_events=("buy", "sell"))
    with pytest.raises(InputError, match="no event of the kind buy or sell: its kind holds cart, "):
        prepare_table(tmp_path / "all.csv", wrong, tmp_path, "none")


def test_every_kind_to_keep_must_occur(tmp_path: Path, rng: np.random.Generator) -> None:
    file = write_csv(tmp_path / "all.csv", shop(rng, users=200, days=4))
    wrong = TableColumns("item", "time", user="user", event="kind", keep_events=("view", "crat"))
    with pytest.raises(InputError, match=r"all\.csv has no event of the kind crat: .* cart, view;"):
        prepare_table(file, wrong, tmp_path, "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_rows_of_other_kinds_need_nothing_but_their_line(
    tmp_path: Path, rng: np.random.Generator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches without item, pages without time, events of no kind: dropped, and no bad lines."""
    rows = [row for row in shop(rng, users=150, days=4) if row[3] == "view"]
    expected = prepare_table(write_csv(tmp_path / "views.csv", rows), USER, tmp_path, "views")
    others = [("u1", "", START, "search"), ("u2", "i1", "", "page"), ("u3", "", START, "")]
    frame = pl.DataFrame(
        [[str(value) or None for value in row] for row in [*others * 100, *rows, *others]],
        schema=["user", "item", "time", "kind"],
        orient="row",
    )
    write = {"a.csv": frame.write_csv, "a.jsonl": frame.write_ndjson}
    write.get(name, frame.write_parquet)(tmp_path / name)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.BLOCK_BYTES", 500)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.PARQUET_ROWS", 50)
    columns = TableColumns("item", "time", user="user", event="kind", keep_events=("view",))
    dataset = prepare_table(tmp_path / name, columns, tmp_path, "out")
    assert dataset.info["splits"] == expected.info["splits"]
    first, second = dataset.info["filters"][:2]
    assert (first["events"], second["dropped_events"]) == (len(rows) + 303, 303)
    wrong = TableColumns("item", "time", user="user", event="kind", keep_events=("buy",))
    with pytest.raises(InputError, match="its kind holds nothing, page, search, view"):
        prepare_table(tmp_path / name, wrong, tmp_path, "none")


def test_what_is_left_of_the_kinds_is_told_where_nothing_is(tmp_path: Path) -> None:
    rows = [(f"u{n // 3}", f"i{n % 3}", START + n, "view") for n in range(30)]
    columns = TableColumns("item", "time", session="user", event="kind", keep_events=("view",))
    problem = r"no session is left for the train split \(10 sessions came; short "
    with pytest.raises(InputError, match=problem):
        prepare_table(write_csv(tmp_path / "a.csv", rows), columns, tmp_path, "out", test_days=30)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (TableColumns("item", "time"), "expected --session-col, --user-col or both"),
        (TableColumns("item", "time", session="user", user="user"), "expected different columns"),
        (TableColumns("item", "time", user="user", event="kind"), "go together"),
        (TableColumns("item", "time", user="user", keep_events=("view",)), "go together"),
        (TableColumns("item", "time", session="user", session_gap="30m"), "goes with --user-col"),
        (TableColumns("item", "when", user="user"), "no column 'when': its columns are user, item"),
        (TableColumns("item", "item", user="user"), "expected different columns"),
        (TableColumns("", "time", user="user"), "a column for --item-col and --time-col"),
        (TableColumns("item", "", user="user"), "a column for --item-col and --time-col"),
        (TableColumns("item", "time", user="user", time_unit="h"), "--time-unit 'h'"),
        (TableColumns("item", "time", user="user", session_gap="x"), "expected a duration"),
        (
            TableColumns("item", "time", user="user", session_gap="9" * 400 + "d"),
            "longer than a thousand years",
        ),
    ],
)
def test_wrong_options(tmp_path: Path, columns: TableColumns, problem: str) -> None:
    file = write_csv(tmp_path / "events.csv", [("u", "i", START, "view")])
    with pytest.raises(InputError, match=problem):
        prepare_table(file, columns, tmp_path, "out")
    assert [path.name for path in tmp_path.iterdir()] == ["events.csv"]


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("a.csv", "u1,i1,2024-01-01", "expected 4 fields separated by ',', found 3"),
        ("a.csv", "u1,,1700000000000,view", "expected an id in one line in item, found nothing"),
        ("a.csv", ",i1,1700000000000,view", "expected an id in one line in user, found nothing"),
        ("a.csv", "u1,i1,yesterday,view", "in time, found 'yesterday'"),
        ("a.csv", '"u1"x,i1,1700000000000,view', "a quote opens a field and does not close it"),
        ("a.csv", '"u1","i\n1",1700000000000,view', "expected an id in one line in item"),
        ("a.jsonl", '{"user": "u1", "item": "i1"', "cannot be parsed"),
        ("a.jsonl", '{"user": "u1", "item": "i1"}', "in time, found nothing"),
        ("a.jsonl", '["u1", "i1", 1700000000000]', ""),
        ("a.jsonl", '{"user": "u1", "item": "i1", "time": "soon"}', "in time, found 'soon'"),
        ("a.jsonl", '{"user": "u1", "item": "i1", "item": "i2", "time": 1}', "the key 'item'"),
        ("a.jsonl", '{"user": "u1", "time": 1, "item": "i1","time": 2}', "the key 'time'"),
        ("a.jsonl", '{"user" :"u1", "user" : "u2", "item": "i1", "time": 1}', "the key 'user'"),
        ("a.jsonl", '{"user": "u1", "item": "i1", "\\u0069tem": 1, "time": 1}', "the key 'item'"),
        (
            "a.jsonl",
            '{"item": [1], "user": 1, "time": 1, "x": ' + "[" * 1010 + "]" * 1010 + "}",
            "",
        ),
        ("a.jsonl", "7", ""),
        ("a.jsonl", '"user"', ""),
        ("a.jsonl", '[["u1"], {}]', ""),
        ("a.csv", "  ,i1,1700000000000,view", "expected an id in one line in user, found '  '"),
    ],
)
def test_bad_lines_are_named_or_skipped(
    tmp_path: Path, rng: np.random.Generator, name: str, line: str, problem: str
) -> None:
    file = tmp_path / name
    FORMATS["events" + file.suffix](file, shop(rng, users=150, days=4))
    clean = prepare_table(file, USER, tmp_path, "clean")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:20], line, *lines[20:], line, lines[-1]]))
    with pytest.raises(InputError) as error:
        prepare_table(file, USER, tmp_path, "bad")
    assert f"{name}, line 21: " in str(error.value)
    assert problem in str(error.value)
    assert not (tmp_path / "bad").exists()
    file.write_text("\n".join([*lines[:20], line, *lines[20:], line]))
    skipped = prepare_table(file, USER, tmp_path, "skipped", skip_bad_lines=True)
    assert skipped.info["splits"] == clean.info["splits"]
    assert skipped.info["bad_lines"]["count"] == 2


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
        ("user", pl.Series([{"id": 1}] * 20), r"an id in one line in user, found the type Struct"),
        ("item", pl.Series([["i1"]] * 20), r"an id in one line in item, found the type List"),
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


def test_one_column_is_not_two(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [("u1", "i1", START, "view")])
    with pytest.raises(InputError, match="'Item' and 'item' are both the column 'item'"):
        prepare_table(file, TableColumns("item", "time", session="Item"), tmp_path, "out")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    text = "üser,item,time,kind\n" + "u1,i1,1700000000000,view\n" * 5
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"a\.csv is (UTF-16|not UTF-8) text; save it as UTF-8"):
        prepare_table(tmp_path / "a.csv", USER, tmp_path, "out")


def test_a_wrong_column_is_named_before_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV + b"u,i\n")
    with pytest.raises(InputError, match="no column 'thing': its columns are user, item, time"):
        prepare_table(tmp_path / "a.csv", replace(USER, item="thing"), tmp_path, "out")


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    few([1, 2, 3]).write_ndjson(file)
    blocks = columns.text_blocks

    def growing(path: Path) -> Any:
        for number, block in enumerate(blocks(path)):
            yield block
            if number == 0:  # once: a reader that follows would never end
                with path.open("ab") as log:
                    log.write(block[0])

    monkeypatch.setattr(columns, "text_blocks", growing)
    monkeypatch.setattr(columns, "BLOCK_BYTES", 1000)
    with pytest.raises(InputError, match=r"a\.jsonl changed while it was read: prepare a copy"):
        prepare_table(file, SESSION, tmp_path, "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(CSV_HEAD)
    (tmp_path / "c.csv").touch()
    (tmp_path / "blank.csv").write_text("\n\n\r\n")
    (tmp_path / "mac.csv").write_bytes(CSV.replace(b"\n", b"\r"))
    (tmp_path / "mac.jsonl").write_bytes(b'{"user": 1, "item": 2, "time": 3}\r' * 5)
    for name, problem in (
        ("b.csv", "no readable line"),
        ("c.csv", "c.csv is empty"),
        ("blank.csv", "blank.csv holds no readable line"),
        ("mac.csv", r"mac.csv ends its lines with \\r; save it with \\n"),
        ("mac.jsonl", r"mac.jsonl ends its lines with \\r"),
        ("d.csv", "is not a file"),
    ):
        with pytest.raises(InputError, match=problem):
            prepare_table(tmp_path / name, USER, tmp_path, "out")


# Real data ------------------------------------------------------------------------------------


@needs_shared
def test_recbole_movielens_100k(tmp_path: Path) -> None:
    file = SHARED / "ml100k" / "ml-100k.inter.gz"
    columns = TableColumns("item_id", "timestamp", user="user_id")
    dataset = prepare_table(file, columns, tmp_path, "ml", leave_one_out=True, min_item_count=1)
    read = dataset.info["filters"][0]
    assert (read["sessions"], read["events"], read["items"]) == (943, 100_000, 1_682)
    with gzip.open(file, "rt") as lines:
        rows = [line.split("\t") for line in lines.read().splitlines()[1:]]
    parsed = [(user, int(item), int(at) * 1000, "") for user, item, _, at in rows]
    expected = brute_force(
        parsed, gap=None, leave_one_out=True, min_length=2, min_count=1, val_days=1, test_days=1
    )
    for split in ("train", "val", "test"):
        assert unpack(dataset, split) == expected[split]
    test = dataset.split_info("test")
    assert test["sessions"] + test["lost_predictions"] == 943


def test_a_json_array_is_named_in_a_short_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for indent in (None, 1):
        file.write_text(json.dumps(few([1, 2, 3]).to_dicts() * 500, indent=indent))
        with pytest.raises(InputError, match=r"a\.jsonl is a JSON array: expected one object per"):
            prepare_table(file, SESSION, tmp_path, "out", skip_bad_lines=True)


def test_objects_of_json_over_several_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row, indent=2) for row in few([1, 2, 3]).to_dicts()))
    with pytest.raises(InputError, match=r"a\.jsonl has objects of several lines: .* as jq -c"):
        prepare_table(file, SESSION, tmp_path, "out")


def test_columns_of_json_are_found_as_those_of_csv(tmp_path: Path) -> None:
    frame = few([1, 2, 3]).select(
        pl.col("user").alias("sessionId"), pl.col("item").alias("item_id:token"), pl.col("time")
    )
    frame.write_ndjson(tmp_path / "a.jsonl")
    columns = TableColumns("item_id", "Time", session="session_id")
    assert prepare_table(tmp_path / "a.jsonl", columns, tmp_path, "out").num_items == 3
    wrong = TableColumns("item", "time", session="sessionId")
    problem = "no column 'item': its columns are sessionId, item_id:token, time"
    with pytest.raises(InputError, match=problem):
        prepare_table(tmp_path / "a.jsonl", wrong, tmp_path, "wrong")


def test_keys_of_json_that_the_first_lines_lack(tmp_path: Path) -> None:
    """Events without an item may lack its key."""
    file = tmp_path / "a.jsonl"
    page = json.dumps({"user": 1, "time": START, "kind": "page"}) + "\n"
    few([1, 2, 3]).with_columns(kind=pl.lit("view")).write_ndjson(file)
    file.write_text(page * 3000 + file.read_text())
    columns = replace(SESSION, event="kind", keep_events=("view",))
    assert prepare_table(file, columns, tmp_path, "out").num_items == 3


def test_test_days_go_with_a_split_by_time(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    few([1, 2, 3, 1]).write_csv(tmp_path / "a.csv")
    words = ["prepare", "table", "--input", tmp_path / "a.csv", "--item-col", "item"]
    words += ["--time-col", "time", "--user-col", "user", "--data-dir", tmp_path]
    words += ["--name", "out", "--split", "leave-one-out"]
    code, _, error = command(*words, "--test-days", 1)
    assert (code, "--test-days has no effect with --split leave-one-out" in error) == (2, True)
    assert command(*words)[0] == 0


def test_a_wrong_latest_time_is_named_where_it_leaves_test_empty(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    rows = shop(rng, users=200, days=4)
    file = write_csv(tmp_path / "a.csv", rows)
    year_9999 = [("u", f"i{n}", 253_402_300_000_000 + n, "view") for n in (3, 6, 9)]
    write_csv(file, [*rows[:10], *year_9999, *rows[10:]])
    problem = (
        r"a\.csv, line 14: the latest time, 9999-12-31 23:46, is 7,976 years after the "
        r"other sessions, so that 1 of \d+ would be held out; correct it or remove it"
    )
    with pytest.raises(InputError, match=problem):
        prepare_table(file, SESSION, tmp_path, "out")
    # A session that begins as others do, and a gap that is no longer than the log, are no errors.
    write_csv(file, [*rows, (rows[0][0], rows[0][1], 253_402_300_000_000, "view")])
    prepare_table(file, SESSION, tmp_path, "long")


def test_last_items_that_the_histories_lack_are_named(tmp_path: Path) -> None:
    rows = [(f"u{user}", f"{user}-{n}", START + n, "view") for user in range(5) for n in range(4)]
    problem = "of the 5 different last items of its 5 sessions, training has 0; give longer hist"
    with pytest.raises(InputError, match=problem):
        prepare_table(
            write_csv(tmp_path / "a.csv", rows),
            USER,
            tmp_path,
            "out",
            leave_one_out=True,
            min_item_count=1,
        )


def test_test_items_that_training_lacks_are_named(tmp_path: Path) -> None:
    rows = [
        (f"u{day}{user}", f"{'old' if day < 3 else 'new'}{n}", START + day * DAY + n, "view")
        for day in range(5)
        for user in range(5)
        for n in range(3)
    ]
    problem = "for the test split: of the 3 different items of its 10 sessions, training has 0;"
    with pytest.raises(InputError, match=problem):
        prepare_table(write_csv(tmp_path / "a.csv", rows), SESSION, tmp_path, "out")
