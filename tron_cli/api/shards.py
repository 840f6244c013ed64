"""`tron_cli.write_shard` and `join_shards`: preparation by the workers of any engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tron_cli.api.arguments import check
from tron_cli.api.preparation import (
    AnyPath,
    Words,
    check_options,
    files_of,
    frames_folder,
    is_frame,
    options_of,
    table_columns,
)
from tron_cli.errors import InputError

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset


def write_shard(
    events: Any,
    folder: AnyPath,
    number: int,
    *,
    count: int,
    item_col: str,
    time_col: str,
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto",
    time_format: str | None = None,
    session_col: str | None = None,
    user_col: str | None = None,
    event_col: str | None = None,
    keep_events: Words | None = None,
    null_tokens: Words | None = None,
    skip_bad_lines: bool = False,
) -> Path:
    """Write a part of a log of events as shard `number` (from 0) of `count` into a folder.

    events: files, or data frames of polars or pandas; any rows of the log, since `join_shards`
    gathers the sessions. The other options are those of `tron prepare table`, the same for all
    shards. The file is written atomically and replaces an earlier one of that number, so that a
    task may be run again. Returns its path. Raises InputError.
    """
    from tron_cli.prepare.reading.inputs import check_distinct, input_files
    from tron_cli.prepare.shards import write

    check("folder", folder, AnyPath)
    check("count", count, int, 1)
    check("number", number, int, 0, count - 1)
    given: dict[str, Any] = {
        "item_col": item_col,
        "time_col": time_col,
        "time_unit": time_unit,
        "time_format": time_format,
        "session_col": session_col,
        "user_col": user_col,
        "event_col": event_col,
        "keep_events": keep_events,
        "null_tokens": null_tokens,
    }
    known = options_of("table")
    check_options("write_shard", {name: known[name] for name in given}, given)
    check("skip_bad_lines", skip_bad_lines, bool)
    columns = table_columns(**given)
    if session_col is None and user_col is None:
        raise InputError("expected session_col, user_col or both")
    wanted = [name for name in (item_col, time_col, session_col, user_col, event_col) if name]
    with frames_folder() as frames:
        is_empty = is_frame(events) and not len(events)  # of an engine, which has empty ones
        files = [] if is_empty else files_of("events", events, frames, wanted)
        files = input_files(files, "events")
        check_distinct(files)
        return write(files, columns, Path(folder), number, count, skip_bad_lines=skip_bad_lines)


_TABLES = {"input", "train", "val", "test"}
_NOT_OF_JOIN = {
    *("item_col", "time_col", "time_unit", "time_format"),
    *("session_col", "user_col", "event_col", "keep_events", "null_tokens", "skip_bad_lines"),
}


def join_shards(
    folder: AnyPath, *, name: str, data_dir: AnyPath = "datasets", **options: Any
) -> Dataset:
    """Prepare a dataset from all shards of a folder, in the order of their numbers.

    options: those of `tron prepare table` that say how sessions are cut, filtered and split. The
    arrays are byte for byte those that `tron prepare table` makes of a log with the rows of all
    shards one after another. Returns the opened dataset. Raises InputError, also where shards are
    missing, damaged, or written with different options.
    """
    from tron_cli.prepare.shards import ShardReader, find
    from tron_cli.prepare.sources.table import prepare_table

    check("folder", folder, AnyPath)
    check("name", name, str)
    check("data_dir", data_dir, AnyPath)
    known = {
        option: declared
        for option, declared in options_of("table").items()
        if option not in _NOT_OF_JOIN | _TABLES
    }
    for option in sorted(options.keys() & _NOT_OF_JOIN):
        raise InputError(f"{option} is given to write_shard, not to join_shards")
    check_options("join_shards", known, options)
    shards = find(Path(folder))
    reader = ShardReader(shards, max_bad_share=options.get("max_bad_share"))
    gap = options.pop("session_gap", None)
    return prepare_table(
        [shard.file for shard in shards],
        replace(reader.columns, session_gap=gap),
        Path(data_dir),
        name,
        leave_one_out=options.pop("split", "time") == "leave-one-out",
        skip_bad_lines=reader.bad.skip,
        reader=reader,
        **options,
    )
