"""`tron_cli.write_shard` and `join_shards`: preparation by the workers of any engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tron_cli.api.arguments import check
from tron_cli.api.preparation import (
    AnyPath,
    check_options,
    files_of,
    frames_folder,
    is_frame,
    keyword_options,
    options_of,
    table_columns,
)
from tron_cli.errors import InputError

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset


def write_shard(events: Any, folder: AnyPath, number: int, *, count: int, **options: Any) -> Path:
    """Write a part of a log of events as shard `number` (from 0) of `count` into a folder.

    events: files, or data frames of polars or pandas; any rows of the log, since `join_shards`
    gathers the sessions. options: those of `tron prepare table` that say how columns are read, the
    same for all shards: item_col, time_col, session_col or user_col, ... The file is written
    atomically and replaces an earlier one of that number, so that a task may be run again. Returns
    its path. Raises InputError.
    """
    from tron_cli.prepare.reading.inputs import check_distinct, input_files
    from tron_cli.prepare.shards import write

    check("folder", folder, AnyPath)
    check("count", count, int, 1)
    check("number", number, int, 0, count - 1)
    check_options("write_shard", _reading_options(), options)
    skip_bad_lines = options.pop("skip_bad_lines", False)
    columns = table_columns(**options)
    if columns.session is None and columns.user is None:
        raise InputError("expected session_col, user_col or both")
    with frames_folder() as frames:
        is_empty = is_frame(events) and not len(events)  # of an engine, which has empty ones
        files = [] if is_empty else files_of("events", events, frames, columns.wanted)
        files = input_files(files, "events")
        check_distinct(files)
        return write(files, columns, Path(folder), number, count, skip_bad_lines=skip_bad_lines)


def _reading_options() -> dict[str, tuple[Any, Any]]:
    """Return the options of write_shard: how columns are read, but not how sessions are cut."""
    known = {**keyword_options(table_columns), "skip_bad_lines": (bool, False)}
    del known["session_gap"]
    return known


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
    reading = _reading_options()
    for option in sorted(options.keys() & reading.keys()):
        raise InputError(f"{option} is given to write_shard, not to join_shards")
    known = options_of("table")
    for option in (*reading, "input", "train", "val", "test"):
        del known[option]
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
