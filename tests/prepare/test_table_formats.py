"""A table gives the same dataset in every format, and is read as what it is under any name."""

from __future__ import annotations

import gzip
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tables import SESSION, START, USER, Row, shop, write_csv

from tron_cli.errors import InputError
from tron_cli.prepare.reading import columns
from tron_cli.prepare.sources.table import prepare_table

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from helpers.table_files import CSV, CSV_HEAD, FORMATS, as_frame, few, gz, write_inter, write_jsonl


def write_csv_row(path: Path) -> None:
    path.write_bytes(CSV)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_dataset(
    tmp_path: Path, rng: np.random.Generator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = shop(rng, users=150, days=4)
    expected = prepare_table(write_csv(tmp_path / "plain.csv", rows), USER, tmp_path, "expected")
    FORMATS[name](tmp_path / name, rows)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.BLOCK_BYTES", 2000)
    monkeypatch.setattr("tron_cli.prepare.reading.parquet.PARQUET_ROWS", 50)
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    text = "üser,item,time,kind\n" + "u1,i1,1700000000000,view\n" * 5
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"a\.csv is (UTF-16|not UTF-8) text; save it as UTF-8"):
        prepare_table(tmp_path / "a.csv", USER, tmp_path, "out")


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
