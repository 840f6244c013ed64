"""Writers of item lists to files and streams: JSON lines, delimited text, Parquet."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl

from tron_cli.errors import InputError
from tron_cli.files import written_alone
from tron_cli.serving.recommender import Recommendation
from tron_cli.serving.session_files import format_of

Types = dict[str, Any]  # the columns of a table and their types
Write = Callable[[Sequence[str | int], Sequence[Recommendation]], None]


@contextmanager
def list_writer(
    path: Path | None,
    *,
    text_items: bool,
    of: str = "session",
    items: str = "item",
    scores: bool = False,
) -> Iterator[Write]:
    """Yield a function that writes lists of items, each with the id of its session or item.

    path: a file, whose suffix decides the format, and which appears only if the block ends without
    an error; None: JSON lines on stdout, at once. text_items: item ids are text, not integers. of,
    items: columns of a table for the ids and the items, besides rank and, if `scores`, score.
    """
    if path is None:
        yield _JsonLines(sys.stdout.buffer, of, scores=scores).write
        return
    kind, is_packed = format_of(path, "--output")
    types: Types = {of: pl.String, "rank": pl.Int64, items: pl.String if text_items else pl.Int64}
    if scores:
        types["score"] = pl.Float64
    with written_alone(path, "wb") as file, ExitStack() as stack:
        out: Any = file
        if is_packed:
            packed = gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0)
            out = stack.enter_context(packed)
        if kind == "jsonl":
            yield _JsonLines(out, of, scores=scores).write
        elif kind == "parquet":
            yield stack.enter_context(_Parquet(out, types)).write
        else:
            yield _Delimited(out, types, "," if kind == "csv" else "\t").write


class _JsonLines:
    """A line per list: {"session": ..., "items": [...], "scores": [...]}."""

    def __init__(self, out: IO[bytes], of: str, *, scores: bool) -> None:
        self._out, self._of, self._scores = out, of, scores

    def write(self, ids: Sequence[str | int], lists: Sequence[Recommendation]) -> None:
        lines = []
        for id_, found in zip(ids, lists, strict=True):
            content: dict[str, Any] = {self._of: id_, "items": found.items}
            if self._scores:
                content["scores"] = found.scores
            lines.append(json.dumps(content, ensure_ascii=False) + "\n")
        self._out.write("".join(lines).encode())
        self._out.flush()


class _Delimited:
    """A row per item, with a header line."""

    def __init__(self, out: IO[bytes], types: Types, separator: str) -> None:
        self._out, self._types, self._separator = out, types, separator
        self._put(pl.DataFrame(schema=types), header=True)

    def write(self, ids: Sequence[str | int], lists: Sequence[Recommendation]) -> None:
        self._put(_frame([*map(str, ids)], lists, self._types), header=False)

    def _put(self, frame: pl.DataFrame, *, header: bool) -> None:
        text = frame.write_csv(include_header=header, separator=self._separator)
        self._out.write(text.encode())


class _Parquet:
    """A row per item, a row group per call. Ids are integers if those of the first call are."""

    def __init__(self, out: IO[bytes], types: Types) -> None:
        self._out, self._types = out, types
        self._writer: Any = None

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._writer is None:
            self._put(pl.DataFrame(schema=self._types))
        if self._writer is not None:
            self._writer.close()

    def write(self, ids: Sequence[str | int], lists: Sequence[Recommendation]) -> None:
        of = next(iter(self._types))
        if self._writer is None and all(map(_is_int64, ids)):
            self._types = {**self._types, of: pl.Int64}
        if self._types[of] == pl.String:
            ids = [*map(str, ids)]
        odd = [id_ for id_ in ids if self._types[of] == pl.Int64 and not _is_int64(id_)]
        if odd:
            raise InputError(
                f"the first {of} ids are 64-bit integers, but {odd[0]!r} is not, and a column of a "
                "Parquet file has one type; write .jsonl or .csv, or make all ids text"
            )
        self._put(_frame(ids, lists, self._types))

    def _put(self, frame: pl.DataFrame) -> None:
        from pyarrow.parquet import ParquetWriter  # slow to import

        table = frame.to_arrow()
        if self._writer is None:
            self._writer = ParquetWriter(self._out, table.schema)
        self._writer.write_table(table)


def _is_int64(id_: str | int) -> bool:
    return isinstance(id_, int) and -(1 << 63) <= id_ < 1 << 63


def _frame(ids: Sequence[str | int], lists: Sequence[Recommendation], types: Types) -> pl.DataFrame:
    """Return a row per item of the lists."""
    sizes = [len(found.items) for found in lists]
    columns: list[list[Any]] = [
        [id_ for id_, size in zip(ids, sizes, strict=True) for _ in range(size)],
        [rank for size in sizes for rank in range(1, size + 1)],
        [item for found in lists for item in found.items],
        [score for found in lists for score in found.scores],
    ]
    return pl.DataFrame(dict(zip(types, columns, strict=False)), schema=types)
