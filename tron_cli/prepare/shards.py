"""Shards: a log of events in Parquet files that several workers wrote, each a part of the rows.

A shard holds what reading a part of the log gives: the events of the kept kinds, with original ids
and times in milliseconds, in the order of the rows. Its footer says which part it is, how it was
read, and which lines were bad.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tron_cli.errors import InputError, counted
from tron_cli.files import remove_older
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import Columns, first_line
from tron_cli.prepare.reading.parquet import read_parquet
from tron_cli.prepare.sources.table_reader import TableColumns, TableReader

VERSION = 1
_KEY = b"tron_shard"
_NAME = re.compile(r"shard-(\d+)-of-(\d+)\.parquet")


@dataclass(frozen=True)
class Shard:
    """File of a shard and its footer.

    events: rows of the file; rows: readable rows of all kinds; time_unit: of the times as they were
    read; options: columns, and whether bad lines are skipped; bad: as `BadLines.info` returns it.
    """

    file: Path
    events: int
    rows: int
    kinds: list[str]
    time_unit: str | None
    options: dict[str, Any]
    bad: dict[str, Any]

    @property
    def columns(self) -> TableColumns:
        """Columns of the log."""
        given = {name: value for name, value in self.options.items() if name != "skip_bad_lines"}
        lists = {name: tuple(given[name]) for name in ("keep_events", "null_tokens")}
        return TableColumns(**{**given, **lists})


def write(
    files: Sequence[Path],
    columns: TableColumns,
    folder: Path,
    number: int,
    count: int,
    *,
    skip_bad_lines: bool,
) -> Path:
    """Read a part of a log and write it atomically as shard `number` of `count`.

    A shard of that number is replaced. Raises InputError as `prepare_table` does for its inputs.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    place = folder / f"shard-{number:05d}-of-{count:05d}.parquet"
    partial = folder / f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    bad = BadLines(skip=skip_bad_lines)
    reader = TableReader(columns, bad)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_older(folder, ".shard-*.partial")
        writer: ParquetWriter | None = None
        for block in reader.parsed(files):
            table = block.frame.select(reader.columns_read).to_arrow()
            if writer is None:
                writer = ParquetWriter(
                    partial, table.schema, compression="zstd", write_page_checksum=True
                )
            elif table.schema != writer.schema:
                raise InputError(
                    f"{block.file}: ids are integers in one file or column and text in another; "
                    "store the ids of all files alike"
                )
            writer.write_table(table)
        if files:
            reader.check_times(files[0])  # not the kinds, which a part of the log may lack
        if writer is None:
            empty = pyarrow.schema([(name, pyarrow.int64()) for name in reader.columns_read])
            writer = ParquetWriter(partial, empty)
        footer = {
            "version": VERSION,
            "rows": reader.rows,
            "kinds": sorted(reader.kinds),
            "time_unit": reader.time_unit,
            "options": {**asdict(columns), "skip_bad_lines": skip_bad_lines},
            "bad": bad.info(),
        }
        writer.add_key_value_metadata({_KEY: json.dumps(footer).encode()})
        writer.close()
        partial.replace(place)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return place


def find(folder: Path) -> list[Shard]:
    """Return the shards of a folder by number; raise InputError unless they are all and alike."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of shards, which write_shard writes")
    found: dict[int, Path] = {}
    counts: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue  # of a worker that was killed, or is writing
        match = _NAME.fullmatch(file.name)
        if match is None:
            raise InputError(f"{file} is not a shard: join_shards takes a folder of nothing else")
        found[int(match[1])] = file
        counts.setdefault(int(match[2]), file)
    if not found:
        raise InputError(f"{folder} holds no shard, which write_shard writes")
    if len(counts) > 1:
        one, other = list(counts.values())[:2]
        raise InputError(
            f"{one} and {other.name} are of different numbers of shards: remove those of an "
            "earlier run"
        )
    (count,) = counts
    missing = sorted(set(range(count)) - found.keys())
    if missing:
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{folder} lacks {len(missing)} of {counted(count, 'shard')} (number {named}): write "
            f"{'it' if len(missing) == 1 else 'them'} again"
        )
    shards = [_read_footer(found[number]) for number in range(count)]
    _check_alike(shards)
    return shards


def _read_footer(file: Path) -> Shard:
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        described = read_metadata(file)
        footer = json.loads((described.metadata or {})[_KEY])
        version = footer.pop("version")
        if version != VERSION:
            raise InputError(
                f"{file} is a shard of version {version}, this tron reads {VERSION}; write it again"
            )
        return Shard(file, described.num_rows, **footer)
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise InputError(f"{file} is not a readable shard ({reason}); write it again") from error


def _check_alike(shards: list[Shard]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        for option, value in shard.options.items():
            if value != first.options.get(option):
                raise InputError(
                    f"{shard.file} was written with {option} {value!r} and {first.file.name} with "
                    f"{first.options.get(option)!r}: write all shards with the same options"
                )
    units = {shard.time_unit: shard.file for shard in shards if shard.time_unit is not None}
    if len(units) > 1:
        (unit, file), (other, other_file) = list(units.items())[:2]
        raise InputError(
            f"the times of {file} were read as {unit} and those of {other_file.name} as {other}: "
            "name their unit with time_unit when the shards are written"
        )


class ShardReader(TableReader):
    """Reader of shards, with the counts that their workers took of the log."""

    def __init__(self, shards: list[Shard], *, max_bad_share: float | None) -> None:
        bad = BadLines(skip=shards[0].options["skip_bad_lines"], max_share=max_bad_share)
        super().__init__(shards[0].columns, bad)
        self._events = {shard.file: shard.events for shard in shards}
        for shard in shards:
            self.rows += shard.rows
            self.kinds.update(shard.kinds)
            bad.kinds.update(shard.bad["kinds"])
            bad.first = bad.first or shard.bad["first"]

    def parsed(self, files: Sequence[Path]) -> Iterator[Columns]:
        """Yield the columns of the shards that hold any event."""
        for file in files:
            if self._events[file]:
                yield from read_parquet(file, self.columns_read)
