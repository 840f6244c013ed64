"""Text files to columns, block by block, with the line number of every row.

A text file is read in blocks of whole lines. Where the lines of a block end and how many fields
each has is found by array operations on its bytes: blank lines are skipped, ragged ones are known
by number, and polars parses only lines of the right shape. The columns of a text file are strings;
a source turns them into values with `Columns.parse`, which names the line of a bad value.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from tron_cli.errors import InputError, counted
from tron_cli.prepare.fetching.raw import open_raw
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.quotes import loose_quotes, quoted_bytes, requoted

BLOCK_BYTES = 1 << 24
MAX_LINE_BYTES = 1 << 26
NOT_TEXT = "\0\0"  # marks a value of JSON that is not an id, and is not valid in one


@dataclass
class Parser:
    """Parser of the values of a column: `parse` returns null for values that are not `expected`.

    It raises TypeError for a column of an unsuitable type. null_tokens: texts that mean a missing
    value.
    """

    parse: Callable[[pl.Series], pl.Series]
    expected: str
    null_tokens: tuple[str, ...] = ()

    def advice(self, value: Any) -> str | None:
        """Return advice on a bad value, if correcting or skipping its line does not help."""
        return None


INTEGER = Parser(lambda column: column.cast(pl.Int64, strict=False), "an integer")


@dataclass(frozen=True)
class Columns:
    """Rows of a file: the wanted columns in `frame`, line numbers (int64, from 1) in `lines`."""

    file: Path
    frame: pl.DataFrame
    lines: np.ndarray
    unit: str = "line"

    def parse(self, parsers: dict[str, Parser], bad: BadLines) -> Columns:
        """Return the named columns with values parsed; rows with a bad value are rejected."""
        frame = pl.DataFrame({name: self._parsed(name, parsers[name]) for name in parsers})
        valid = {name: frame[name].is_not_null().to_numpy() for name in parsers}
        keep = np.logical_and.reduce(list(valid.values()))
        for row in np.flatnonzero(~keep).tolist():
            name = next(name for name in parsers if not valid[name][row])
            parser, value = parsers[name], self.frame[name][row]
            problem = f"expected {parser.expected} in {name}, found {_found(value, parser)}"
            is_missing = value is None or value == "" or value in parser.null_tokens
            bad.reject(
                self.file,
                int(self.lines[row]),
                problem,
                kind=f"{'missing' if is_missing else 'unreadable'} {name}",
                unit=self.unit,
                advice=None if bad.first else parser.advice(value),
            )
        return replace(self, frame=frame).where(keep)

    def where(self, keep: np.ndarray) -> Columns:
        """Return the rows where `keep` (bool [rows]) holds."""
        if keep.all():
            return self
        return replace(self, frame=self.frame.filter(pl.Series(keep)), lines=self.lines[keep])

    def _parsed(self, name: str, parser: Parser) -> pl.Series:
        column = self.frame[name]
        try:
            if parser.null_tokens and column.dtype in (pl.String, pl.Categorical):
                column = column.cast(pl.String)
                column = column.set(column.is_in(parser.null_tokens), None)
            if not column.dtype.is_nested():
                return parser.parse(column)
        except InputError as error:
            raise InputError(f"{self.file}, column {name}: {error}") from error
        except (pl.exceptions.PolarsError, TypeError):
            pass  # a Parquet type that cannot be converted
        raise InputError(
            f"{self.file}: expected {parser.expected} in {name}, found the type {column.dtype}; "
            "convert the column"
        )


def _found(value: Any, parser: Parser) -> str:
    if value is None or value == "":
        return "nothing"
    if value in parser.null_tokens:
        return f"{value!r}, which means a missing value (see --null-tokens)"
    return repr(value.removeprefix(NOT_TEXT) if isinstance(value, str) else value)[:60]


def read_delimited(
    file: Path,
    wanted: list[str],
    bad: BadLines,
    *,
    separator: str,
    names: list[str] | None = None,
    quoted: bool = False,
) -> Iterator[Columns]:
    """Yield the wanted columns of a delimited text file, plain or compressed, as strings.

    names: the columns of a file without header line. quoted: double quotes may enclose fields,
    which may then hold separators and line breaks. Raises InputError where no line can be read.
    """
    found = False
    columns: list[int] = []
    for block, start in text_blocks(file, separator if quoted else None):
        records = _records(block, start, separator, quoted)
        if names is None:
            if not records.fields.any():
                continue  # only blank lines
            header = int(np.argmax(records.fields > 0))
            names = _header(file, records.text(header), separator)
            records.fields[header] = 0
        columns = columns or find_columns(file, names, wanted)
        is_bad = (records.fields != len(names)) | records.unclosed
        for record in np.flatnonzero(is_bad & (records.fields > 0)).tolist():
            problem = f"expected {counted(len(names), 'field')} separated by {separator!r}"
            problem += f", found {records.fields[record]}"
            kind = "wrong number of fields"
            if records.unclosed[record]:
                problem, kind = "a quote opens a field and does not close it", "unclosed quote"
            bad.reject(file, int(records.lines[record]), problem, kind=kind)
        schema = {f"column_{index}": pl.String() for index in range(len(names))}
        parse = _CsvParser(schema, separator, quoted)
        for frame, lines in _parse(file, records.where(~is_bad).requoted(separator), parse, bad):
            found = True
            selected = frame[:, columns]
            selected.columns = wanted
            yield Columns(file, selected, lines)
    if not found:
        raise InputError(f"{file} holds no readable line: expected the columns {', '.join(wanted)}")


def read_json_lines(
    file: Path, wanted: list[str], bad: BadLines, ids: Collection[str] = ()
) -> Iterator[Columns]:
    """Yield the wanted keys of a file of JSON lines, one object each, as strings.

    The file may be compressed. ids: columns in which a value that is neither text nor an exact
    number begins with NOT_TEXT.
    """
    keys: list[str] = []
    found = False
    for block, start in text_blocks(file):
        records = _records(block, start, "\n", quoted=False)
        records = records.where(records.fields > 0)
        if not found and records.block.lstrip().startswith(b"["):
            raise InputError(
                f"{file} is a JSON array: expected one object per line, such as jq -c '.[]' writes"
            )
        if not found and re.match(rb"\s*\{\s*\n", records.block):
            raise InputError(
                f"{file} has objects of several lines: expected one per line, as jq -c . writes"
            )
        keys = keys or _json_keys(file, records.block, wanted)
        parse = _JsonParser(dict(zip(keys, wanted, strict=True)), ids)
        for frame, lines in _parse(file, records, parse, bad):
            found = True
            yield Columns(file, frame, lines)
    if not found:
        raise InputError(f"{file} holds no readable line: expected JSON objects, one per line")


def _json_keys(file: Path, block: bytes, wanted: list[str]) -> list[str]:
    """Find the keys that fit the wanted names, in the first lines, then in the whole block."""
    lines = block.split(b"\n")
    names: dict[str, None] = {}
    for part in (lines[:1000], lines[1000:]):
        for line in part:
            with suppress(ValueError, RecursionError):
                found_in_line = json.loads(line)
                if isinstance(found_in_line, dict):
                    names |= dict.fromkeys(found_in_line)
        try:
            found = find_columns(file, list(names), wanted)
        except InputError as error:
            problem = error
        else:
            return [list(names)[at] for at in found]
    if not names:
        return wanted  # no line can be read
    raise problem


# Polars writes lists and objects as text, and rounds numbers with a point.
_DOUBTFUL = r"^(?:[\[{]|-?\d{16,}$|-?\d+\.\d+$|-0$|(?:true|false)$)"
_ESCAPED_KEY = re.compile(rb'\\u[^"\n]*"[ \t]*:')


@dataclass(frozen=True)
class _JsonParser:
    names: dict[str, str]
    ids: Collection[str]

    def __call__(self, text: bytes) -> pl.DataFrame:
        frame = pl.read_ndjson(text, schema=dict.fromkeys(self.names, pl.String()))
        frame.columns = list(self.names.values())
        lines: list[bytes] = []
        has_escaped_key = _ESCAPED_KEY.search(text) is not None
        for key, name in self.names.items():
            if has_escaped_key or text.count(f'"{key}"'.encode()) > len(frame):
                self._check_once(text, key)
            if name in self.ids:
                for row in frame[name].str.contains(_DOUBTFUL).arg_true():
                    lines = lines or text.split(b"\n")
                    value = _from_json(lines[row], parse_float=Decimal)[key]
                    if isinstance(value, (list, dict, bool, Decimal)):
                        frame[row, name] = NOT_TEXT + str(value)
        return frame

    def _check_once(self, text: bytes, key: str) -> None:
        """Raise ComputeError where a key occurs twice in an object: polars takes the first."""

        def once(pairs: list[tuple[str, Any]]) -> bool:
            return sum(name == key for name, _ in pairs) == 1

        for line in text.split(b"\n"):
            is_doubtful = line.count(f'"{key}"'.encode()) > 1 or _ESCAPED_KEY.search(line)
            # The outermost object comes last.
            if is_doubtful and not _from_json(line, object_pairs_hook=once):
                raise pl.exceptions.ComputeError(f"the key {key!r} occurs more than once")


def _from_json(line: bytes, **options: Any) -> Any:
    try:
        return json.loads(line, **options)
    except (ValueError, RecursionError) as error:  # in what polars skips
        raise pl.exceptions.ComputeError(str(error)) from error


def first_line(error: Exception) -> str:
    """Return the first line of a library's message."""
    return str(error).partition("\n")[0] or type(error).__name__


def find_columns(file: Path, names: list[str], wanted: list[str]) -> list[int]:
    """Return the positions of columns, all of them different."""
    found = [find_column(file, names, name) for name in wanted]
    for at in found:
        if found.count(at) > 1:
            same = " and ".join(repr(w) for w, f in zip(wanted, found, strict=True) if f == at)
            raise InputError(f"{file}: {same} are both the column {names[at]!r}; name two columns")
    return found


def find_column(file: Path, names: list[str], wanted: str) -> int:
    """Find a column by its name, or by its name before a RecBole type (`item_id:token`).

    Case and underscores are ignored if nothing fits exactly (`sessionId` is `session_id`).
    """
    for spelling in (str, _without_type, _plain):
        fitting = [at for at, name in enumerate(names) if spelling(name) == spelling(wanted)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InputError(f"{file} has {len(fitting)} columns named {wanted!r}: rename them")
    raise InputError(f"{file} has no column {wanted!r}: its columns are {', '.join(names)}")


def _without_type(name: str) -> str:
    return name.split(":")[0].strip()


def _plain(name: str) -> str:
    return _without_type(name).replace("_", "").lower()


def text_blocks(file: Path, separator: str | None = None) -> Iterator[tuple[bytes, int]]:
    """Yield (whole lines that end with \\n, number of the first line) until the end of the file.

    separator: of fields that may be quoted; then whole records, whose fields may hold line ends.
    """
    line, rest = 1, b""
    with (
        open_raw(file) as content,
        tqdm(
            total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        compressed = getattr(content, "fileobj", content)  # its position is that in the file
        while data := content.read(BLOCK_BYTES):
            bar.update(compressed.tell() - bar.n)
            if line == 1 and not rest:
                if b"\r" in data and b"\n" not in data:
                    raise InputError(f"{file} ends its lines with \\r; save it with \\n or \\r\\n")
                data = data.removeprefix(b"\xef\xbb\xbf")
            rest += data
            # A quote that is still open after this many bytes is taken for a loose one.
            cut = _last_end(rest, separator, complete=len(rest) > MAX_LINE_BYTES) + 1
            if cut:
                yield rest[:cut].replace(b"\r\n", b"\n"), line
                line += rest.count(b"\n", 0, cut)
                rest = rest[cut:]
            elif len(rest) > MAX_LINE_BYTES:
                break
    if rest.strip():
        if len(rest) > MAX_LINE_BYTES:
            raise InputError(f"{file}, line {line}: no line end in the {len(rest):,} bytes from it")
        yield rest.replace(b"\r\n", b"\n") + b"\n", line
    elif line == 1:
        raise InputError(f"{file} is empty")


def _last_end(text: bytes, separator: str | None, *, complete: bool) -> int:
    """Return the position of the last line end outside quotes, -1 if there is none."""
    if separator is None or b'"' not in text:
        return text.rfind(b"\n")
    is_end = np.frombuffer(text, np.uint8) == ord("\n")
    ends = np.flatnonzero(is_end & ~quoted_bytes(text, separator, complete=complete))
    return int(ends[-1]) if len(ends) else -1


@dataclass(frozen=True)
class _Records:
    """Records of a block of text. All arrays are [R].

    sizes: bytes with the line end; lines: line numbers; fields: how many, 0 in a blank line;
    loose: has loose quotes; unclosed: one of them opens a field.
    """

    block: bytes
    sizes: np.ndarray
    lines: np.ndarray
    fields: np.ndarray
    loose: np.ndarray
    unclosed: np.ndarray

    def text(self, record: int) -> bytes:
        start = int(self.sizes[:record].sum())
        return self.block[start : start + self.sizes[record]]

    def where(self, keep: np.ndarray) -> _Records:
        """Return the records where `keep` (bool [R]) holds."""
        if keep.all():
            return self
        block = np.frombuffer(self.block, np.uint8)[np.repeat(keep, self.sizes)].tobytes()
        rest = (self.sizes, self.lines, self.fields, self.loose, self.unclosed)
        return _Records(block, *(of_each[keep] for of_each in rest))

    def requoted(self, separator: str) -> _Records:
        """Quote the fields with loose quotes, which polars does not read."""
        if not self.loose.any():
            return self
        stops = np.cumsum(self.sizes)
        sizes = self.sizes.copy()
        parts, done = [], 0
        for record in np.flatnonzero(self.loose).tolist():
            start, stop = int(stops[record] - sizes[record]), int(stops[record])
            text = requoted(self.block[start:stop], separator)
            parts += [self.block[done:start], text]
            sizes[record], done = len(text), stop
        return replace(self, block=b"".join([*parts, self.block[done:]]), sizes=sizes)


def _records(block: bytes, first_line: int, separator: str, quoted: bool) -> _Records:
    data = np.frombuffer(block, np.uint8)
    is_end, is_separator = data == ord("\n"), data == ord(separator)
    line_ends = ends = np.flatnonzero(is_end)
    loose = unclosed = np.zeros(0, np.int64)
    if quoted and b'"' in block:
        within = quoted_bytes(block, separator, complete=True)
        ends = np.flatnonzero(is_end & ~within)
        is_separator &= ~within
        loose, opens = loose_quotes(block, separator, within)
        unclosed = loose[opens]
    sizes = np.diff(ends, prepend=-1)
    separators = np.searchsorted(np.flatnonzero(is_separator), ends)
    fields = np.diff(separators, prepend=0) + 1
    fields[sizes == 1] = 0
    return _Records(
        block,
        sizes,
        first_line + np.searchsorted(line_ends, ends - sizes + 1),
        fields,
        np.bincount(np.searchsorted(ends, loose), minlength=len(ends)) > 0,
        np.bincount(np.searchsorted(ends, unclosed), minlength=len(ends)) > 0,
    )


@dataclass(frozen=True)
class _CsvParser:
    schema: dict[str, pl.String]
    separator: str
    quoted: bool

    def __call__(self, text: bytes) -> pl.DataFrame:
        return pl.read_csv(
            text,
            has_header=False,
            schema=self.schema,
            separator=self.separator,
            quote_char='"' if self.quoted else None,
        )


def _parse(
    file: Path, records: _Records, parse: Callable[[bytes], pl.DataFrame], bad: BadLines
) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
    """Yield parsed records with their line numbers.

    A block that cannot be parsed is halved until the bad lines are alone; these are rejected.
    """
    lines = records.lines
    if not len(lines):
        return
    try:
        frame = parse(records.block)
    except pl.exceptions.PolarsError as error:
        reason = first_line(error)
    else:
        if len(frame) == len(lines):
            yield frame, lines
            return
        reason = f"{len(frame)} records in it"
    if len(lines) == 1:
        problem, kind = f"the line cannot be parsed ({reason})", "unreadable line"
        if not _is_utf_8(records.block):
            problem, kind = "the line is not UTF-8 (save the file as UTF-8)", "not UTF-8"
        bad.reject(file, int(lines[0]), problem, kind=kind)
        return
    first = np.arange(len(lines)) < len(lines) // 2
    yield from _parse(file, records.where(first), parse, bad)
    yield from _parse(file, records.where(~first), parse, bad)


def _is_utf_8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _header(file: Path, line: bytes, separator: str) -> list[str]:
    if not _is_utf_8(line) or b"\0" in line:
        raise InputError(f"{file} is not UTF-8 text; save it as UTF-8")
    try:
        return next(csv.reader([line.decode().rstrip("\n")], delimiter=separator))
    except (StopIteration, csv.Error) as error:
        raise InputError(f"{file}: the header cannot be read ({error}); correct it") from error
