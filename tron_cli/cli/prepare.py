"""`tron prepare SOURCE`: one command per source; polars and NumPy load only when one runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tron_cli.cli.options import DATASETS, DataDir, given_path, with_groups

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset

app = typer.Typer(
    help="Turn raw data into a prepared dataset.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Raw = Annotated[
    Path | None,
    typer.Option(
        parser=given_path,
        metavar="PATH",
        help="The archive, its unpacked folder or the file in it (also .gz, .zst); default: "
        "download it.",
    ),
]
Name = Annotated[str, typer.Option(help="Name of the dataset.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a dataset of that name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print dataset.json instead of the tables.")]
Tables = list[Path] | None


def _val_users(given: object) -> int | Literal["all"]:
    """Parse a number of users, or all."""
    if given == "all":
        return "all"
    if not str(given).isdecimal():
        raise typer.BadParameter(f"expected all or a number of users, got {given}")
    return int(str(given))


LeaveOneOutUsers = Annotated[
    Any,
    typer.Option(
        parser=_val_users,
        metavar="all|N",
        help="With leave-one-out: users that validate on their second last event; default: at most "
        "--max-val-sessions, drawn with --seed.",
    ),
]


@dataclass(frozen=True)
class ReadingOptions:
    """Options of every source that reads files."""

    force: Force = False
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip and count lines that cannot be read.")
    ] = False
    catalogue: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT|DATASET",
            help="Keep the items of an earlier checkpoint or dataset and their numbers; events on "
            "other items are dropped and counted.",
        ),
    ] = None


@dataclass(frozen=True)
class SplitOptions(ReadingOptions):
    """Options of sources whose validation split is cut from the training data."""

    max_val_sessions: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Validate on a random sample of at most N sessions."),
    ] = 100_000
    seed: Annotated[int, typer.Option(min=0, help="Seed of the validation sample.")] = 42


@dataclass(frozen=True)
class OwnDataOptions(SplitOptions):
    """Options of sources that read a user's own files."""

    max_bad_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Fail if a larger share of all lines is skipped as bad; default: no limit.",
        ),
    ] = None


ValDays = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="N",
        help="Hold out the last N training days for validation; 0: no validation.",
    ),
]


@app.command()
@with_groups
def otto(
    *,
    raw: Raw = None,
    train: Annotated[
        Tables,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="Instead of --raw, with --test: JSON lines (also .gz, .zst) like the published: "
            "a file, a folder of parts or a quoted pattern; may be repeated.",
        ),
    ] = None,
    test: Annotated[
        Tables, typer.Option(parser=given_path, metavar="PATH", help="The test sessions.")
    ] = None,
    name: Name = "otto",
    data_dir: DataDir = DATASETS,
    val_days: ValDays = 2,
    options: SplitOptions,
    as_json: AsJson = False,
) -> None:
    """OTTO's clicks (Kaggle: otto/recsys-dataset)."""
    given = {"raw": raw, "name": name, "data_dir": data_dir, "val_days": val_days}
    _prepare("otto", as_json, train=train, test=test, **given, **vars(options))


def _add_click_log(source: str, description: str, default_val_days: float) -> None:
    """Add the command of a public log of clicks, which is split by time."""

    def prepare(
        *,
        raw: Raw = None,
        name: Name = source,
        data_dir: DataDir = DATASETS,
        val_days: ValDays = default_val_days,
        options: SplitOptions,
        as_json: AsJson = False,
    ) -> None:
        given = {"raw": raw, "name": name, "data_dir": data_dir, "val_days": val_days}
        _prepare(source, as_json, **given, **vars(options))

    app.command(source, help=description)(with_groups(prepare))


_add_click_log("yoochoose", "Yoochoose clicks (RecSys Challenge 2015).", 1)
_add_click_log("diginetica", "Diginetica item views (CIKM Cup 2016).", 7)


@app.command()
@with_groups
def ml1m(
    *,
    raw: Raw = None,
    name: Name = "ml1m",
    data_dir: DataDir = DATASETS,
    val_users: Annotated[
        Any,
        typer.Option(
            parser=_val_users,
            metavar="all|N",
            help="Users that validate: all on their second last event (as in Kang's split), or N "
            "drawn by gSASRec's rule.",
        ),
    ] = 512,
    options: ReadingOptions,
    as_json: AsJson = False,
) -> None:
    """MovieLens-1M in Kang's version, leave-one-out.

    The split is gSASRec's, unless all users validate.
    """
    given = {"raw": raw, "name": name, "data_dir": data_dir, "val_users": val_users}
    _prepare("ml1m", as_json, **given, **vars(options))


@app.command()
@with_groups
def sequences(
    *,
    train: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="Training sessions, in time order.",
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="PATH", help="Test sessions."),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="Instead of --train and --test: whole histories, to split leave-one-out.",
        ),
    ] = None,
    name: Name,
    val: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="Validation sessions; default: the last 5 % of the training lines.",
        ),
    ] = None,
    lines: Annotated[
        Literal["items", "user-items", "user-item"],
        typer.Option(
            help="Content of a line: a session, a user and a history, or a user and one event."
        ),
    ] = "items",
    val_users: LeaveOneOutUsers = None,
    data_dir: DataDir = DATASETS,
    options: OwnDataOptions,
    as_json: AsJson = False,
) -> None:
    """Text files with one session per line.

    A session is integer item ids, oldest first. With --input, leave-one-out.
    """
    files = {"train": train, "test": test, "input": input, "val": val}
    given = {"name": name, "data_dir": data_dir, "lines": lines, "val_users": val_users}
    _prepare("sequences", as_json, **files, **given, **vars(options))


@dataclass(frozen=True)
class ColumnOptions:
    """Options of `tron prepare table` that say where columns are and how they are read."""

    item_col: Annotated[str, typer.Option(help="Column of the item ids.")]
    time_col: Annotated[str, typer.Option(help="Column of the times.")]
    time_unit: Annotated[
        Literal["auto", "s", "ms", "us", "ns"],
        typer.Option(help="Unit of numeric times; auto: ISO 8601, or numbers of a guessed unit."),
    ] = "auto"
    time_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help='Format of other times, such as "%d/%m/%Y %H:%M"; %z reads offsets, .%f fractions '
            "of a second; UTC without %z.",
        ),
    ] = None
    session_col: Annotated[str | None, typer.Option(help="Column of the session ids.")] = None
    user_col: Annotated[
        str | None,
        typer.Option(
            help="Column of the user ids: instead of --session-col, or with it if session ids are "
            "unique only for each user.",
        ),
    ] = None
    session_gap: Annotated[
        str | None,
        typer.Option(help="A pause longer than this ends a user's session; default: 30m."),
    ] = None
    event_col: Annotated[str | None, typer.Option(help="Column of the event types.")] = None
    keep_events: Annotated[
        str | None, typer.Option(help="Event types to keep, such as view,click.")
    ] = None
    null_tokens: Annotated[
        str | None,
        typer.Option(
            help="Texts that are no session, user or item id; default: "
            '"NULL,null,None,NA,N/A,NaN,nan,\\N"; "" for none. Their lines are bad lines.'
        ),
    ] = None


@dataclass(frozen=True)
class TableOptions(OwnDataOptions):
    """Options of `tron prepare table` that say how its events are split and filtered."""

    val_users: LeaveOneOutUsers = None
    val_days: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Hold out the last N training days for validation (default: 1); 0: no validation.",
        ),
    ] = None
    test_days: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="N", help="Test on sessions from the last N days (default: 1)."
        ),
    ] = None
    val_from: Annotated[
        str | None,
        typer.Option(
            help="Instead of --val-days: validate on sessions that start on this date or later."
        ),
    ] = None
    test_from: Annotated[
        str | None,
        typer.Option(help="Instead of --test-days: an ISO date or time, UTC without a zone."),
    ] = None
    min_session_length: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Drop shorter sessions (leave-one-out: at least 3)."),
    ] = 2
    max_session_length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Drop longer sessions, such as a crawler's."),
    ] = None
    min_item_count: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Drop items with fewer events (default: 5; 1 with --train or --catalogue).",
        ),
    ] = None
    drop_duplicates: Annotated[
        bool,
        typer.Option("--drop-duplicates", help="Keep one of events of equal session, item, time."),
    ] = False
    collapse_repeats: Annotated[
        bool,
        typer.Option("--collapse-repeats", help="Drop events on the item of the event before."),
    ] = False


@app.command()
@with_groups
def table(
    *,
    input: Annotated[
        Tables,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="CSV, TSV, RecBole's .inter, JSON lines (also .gz, .zst) or Parquet: a file, a "
            "folder of parts or a quoted pattern; may be repeated.",
        ),
    ] = None,
    train: Annotated[
        Tables,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="Instead of --input, with --test: tables that are already split.",
        ),
    ] = None,
    val: Annotated[
        Tables,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="The validation table; default: the last days of --train.",
        ),
    ] = None,
    test: Annotated[
        Tables, typer.Option(parser=given_path, metavar="PATH", help="The test table.")
    ] = None,
    name: Name,
    data_dir: DataDir = DATASETS,
    columns: ColumnOptions,
    split: Annotated[
        Literal["time", "leave-one-out"],
        typer.Option(help="Test on the latest sessions, or on the last item of each session."),
    ] = "time",
    options: TableOptions,
    as_json: AsJson = False,
) -> None:
    """Your own data: a table with a row per event."""
    tables = {"input": input, "train": train, "val": val, "test": test}
    given = {"name": name, "data_dir": data_dir, "split": split}
    _prepare("table", as_json, **tables, **given, **vars(columns), **vars(options))


@app.command()
def synthetic(
    name: Name = "synthetic",
    force: Force = False,
    data_dir: DataDir = DATASETS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated shop.")] = 42,
    as_json: AsJson = False,
) -> None:
    """A generated shop whose best possible figures are known."""
    _prepare("synthetic", as_json, name=name, data_dir=data_dir, force=force, seed=seed)


def _prepare(source: str, as_json: bool, **options: Any) -> None:
    """Prepare as from Python, with the same checks, and print the result."""
    from tron_cli.api import preparation

    _report(preparation.prepare(source, **options), as_json)


def _report(dataset: Dataset, as_json: bool) -> None:
    from tron_cli.prepare.summary import print_summary

    if as_json:
        print(json.dumps(dataset.info))
    else:
        print_summary(dataset)
