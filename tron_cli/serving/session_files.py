"""Sessions from files and streams, some at a time: JSON lines, delimited text, Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tron_cli.errors import InputError
from tron_cli.prepare.fetching.raw import open_raw
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import Columns, Parser, read_delimited
from tron_cli.prepare.reading.header import find_separator, header_line
from tron_cli.prepare.reading.ids import ids_of
from tron_cli.prepare.reading.parquet import read_parquet
from tron_cli.prepare.reading.times import FormatParser, TimeParser

TEXT_FORMATS = ("csv", "tsv", "jsonl")
STDIN = "stdin"
_CHUNK_BYTES = 1 << 20
_MAX_LINE_BYTES = 1 << 26
_EXAMPLE = '{"session": "s1", "items": ["a", "b"]}'


@dataclass(frozen=True)
class Session:
    """A session to recommend for: its id, its items (oldest first), and its place in the input."""

    id: str | int
    items: list[Any]
    place: str


@dataclass(frozen=True)
class SessionColumns:
    """Columns of a table of sessions, a row per event.

    time: orders the events of a session; None: they are in order. time_format: of times that are
    neither ISO 8601 nor numbers, such as %d/%m/%Y. adjacent: the rows of a session
    follow each other, so that the table need not be in memory.
    """

    session: str = "session"
    item: str = "item"
    time: str | None = None
    time_format: str | None = None
    adjacent: bool = False


def format_of(path: Path, option: str) -> tuple[str, bool]:
    """Return csv, tsv, jsonl or parquet by the name of a file, and whether it ends with .gz."""
    name = path.name.lower()
    is_packed = name.endswith(".gz")
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind not in TEXT_FORMATS and (is_packed or kind != "parquet"):
        raise InputError(
            f"{option} {path}: expected a name that ends with .csv, .tsv, .jsonl (or one of these "
            "and .gz) or .parquet"
        )
    return kind, is_packed


def read_sessions(
    file: Path, columns: SessionColumns, batch_size: int, bad: BadLines
) -> Iterator[list[Session]]:
    """Yield the sessions of a file, at most batch_size at a time. Raises InputError.

    Those of a table come in the order of their first rows; JSON lines have no columns, and none of
    them may be bad.
    """
    kind, _ = format_of(file, "--input")
    if kind == "jsonl":
        with open_raw(file) as content:
            read = getattr(content, "read1", content.read)
            yield from read_json_sessions(read, str(file), batch_size)
        return
    wanted = [columns.session, columns.item, *([columns.time] if columns.time else [])]
    if len(set(wanted)) < len(wanted):
        raise InputError(f"expected different columns, got {', '.join(wanted)}")
    if kind == "parquet":
        blocks = read_parquet(file, wanted)
    else:
        separator = find_separator(file, header_line(file), wanted)
        blocks = read_delimited(file, wanted, bad, separator=separator, quoted=True)
    frames = _parsed(file, blocks, columns, bad)
    parts = _whole_sessions(frames) if columns.adjacent else [pl.concat(list(frames))]
    for rows in parts:
        for part in _grouped(rows, adjacent=columns.adjacent).iter_slices(batch_size):
            yield [
                Session(session, items, f"{file}, session {session!r}")
                for session, items in part.select("session", "item").iter_rows()
            ]


def _parsed(
    file: Path, blocks: Iterable[Columns], columns: SessionColumns, bad: BadLines
) -> Iterator[pl.DataFrame]:
    """Yield the columns session and item, int64 or text, and perhaps time, in milliseconds."""
    ids = Parser(ids_of, "an id")
    parsers: dict[str, Parser] = {columns.session: ids, columns.item: ids}
    times = FormatParser(columns.time_format) if columns.time_format else TimeParser("auto")
    if columns.time:
        parsers[columns.time] = times
    for block in blocks:
        frame = block.parse(parsers, bad).frame
        yield frame.rename(dict(zip(frame.columns, ("session", "item", "time"), strict=False)))
    times.check(file)


def _whole_sessions(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Cut the rows where sessions end instead of where blocks do."""
    rest: pl.DataFrame | None = None
    for frame in frames:
        rows = frame if rest is None else pl.concat([rest, frame])
        if not len(rows):
            continue
        others = (rows["session"] != rows["session"][-1]).arg_true()
        cut = others[-1] + 1 if len(others) else 0
        rest = rows[cut:]
        if cut:
            yield rows[:cut]
    if rest is not None:
        yield rest


def _grouped(frame: pl.DataFrame, *, adjacent: bool) -> pl.DataFrame:
    """Return a row per session, in the order of their first rows, with a list of its items."""
    items = pl.col("item")
    if "time" in frame.columns:
        items = items.sort_by("time", maintain_order=True)
    run = pl.col("session").rle_id() if adjacent else pl.col("session")
    grouped = frame.group_by(run.alias("run"), maintain_order=True)
    return grouped.agg(pl.col("session").first(), items)


def read_json_sessions(
    read: Callable[[int], bytes], name: str, batch_size: int
) -> Iterator[list[Session]]:
    """Yield sessions from JSON lines such as {"session": "s1", "items": ["a", "b"]}.

    read: returns at most that many bytes, none at the end. Sessions are yielded as soon as their
    lines are there, at most batch_size at a time, and those before a bad line before it is refused.
    A session without an id has the number of its line.
    """
    for lines, first in _lines(read, name):
        batch: list[Session] = []
        for number, line in enumerate(lines, start=first):
            if not line.strip():
                continue
            try:
                batch.append(_session(line, name, number))
            except InputError:
                if batch:
                    yield batch
                raise
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _lines(read: Callable[[int], bytes], name: str) -> Iterator[tuple[list[bytes], int]]:
    """Yield the whole lines that have come, and the number of the first."""
    rest: list[bytes] = []
    number, size = 1, 0
    while data := read(_CHUNK_BYTES):
        if number == 1 and not rest:
            data = data.removeprefix(b"\xef\xbb\xbf")
        head, end, tail = data.rpartition(b"\n")
        if end:
            lines = b"".join([*rest, head]).split(b"\n")
            yield lines, number
            number, rest, size = number + len(lines), [], 0
        rest.append(tail)
        size += len(tail)
        if size > _MAX_LINE_BYTES:
            raise InputError(f"{name}, line {number}: no line end in the {size:,} bytes from it")
    yield [b"".join(rest)], number


def _session(line: bytes, name: str, number: int) -> Session:
    """Return the session of a JSON line. Raises InputError, but not for what its items are."""
    place = f"{name}, line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise InputError(f"{place} is no JSON ({reason}); expected such as {_EXAMPLE}") from error
    if not isinstance(found, dict):
        hint = ", as jq -c '.[]' writes them" if isinstance(found, list) else ""
        raise InputError(f"{place}: expected an object per line{hint}, such as {_EXAMPLE}")
    if "items" not in found:
        keys = ", ".join(map(repr, found)) or "none"
        raise InputError(f"{place} has no key 'items', only {keys}; expected such as {_EXAMPLE}")
    session = found.get("session", number)
    if isinstance(session, bool) or not isinstance(session, str | int):
        raise InputError(f"{place}: expected text or an integer as session, got {session!r}")
    if not isinstance(found["items"], list):
        raise InputError(f"{place}: expected a list of item ids, got {found['items']!r}")
    if isinstance(session, str) and not _is_text(session):
        raise InputError(f"{place}: the session {session!a} is no valid text")
    return Session(session, found["items"], place)


def _is_text(value: str) -> bool:
    """Return False for half of a character, which JSON can write and no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_ids(file: Path) -> tuple[list[str], list[int]]:
    """Return the ids of a text file, one per line, and the numbers of their lines."""
    try:
        with open_raw(file) as content:
            lines = content.read().removeprefix(b"\xef\xbb\xbf").decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text; save it as UTF-8") from error
    numbered = [(line.rstrip("\r"), number) for number, line in enumerate(lines, start=1)]
    numbered = [(line, number) for line, number in numbered if line.strip()]
    return [line for line, _ in numbered], [number for _, number in numbered]
