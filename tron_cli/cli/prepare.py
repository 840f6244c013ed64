"""`tron prepare SOURCE`: one command per source; polars and numpy load only when one runs."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset

app = typer.Typer(
    name="prepare",
    help="Turn raw data into a prepared dataset: filters, splits, memory-mapped arrays.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Raw = Annotated[
    Path | None,
    typer.Option(
        help="The archive, its unpacked folder or the file (also .gz, .zst); else downloaded."
    ),
]
Name = Annotated[str, typer.Option(help="Name of the dataset.")]
DataDir = Annotated[Path, typer.Option(help="Folder of the prepared datasets.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a dataset of that name.")]
ValDays = Annotated[
    float, typer.Option(min=0, help="Days of training that validate; 0 leaves validation empty.")
]
MaxValSessions = Annotated[
    int, typer.Option(min=1, help="Validation is a sample of at most so many sessions.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the validation sample.")]
SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Skip and count lines that cannot be read.")
]
MaxBadShare = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Fail where a larger share of all lines is skipped as bad."),
]
Catalogue = Annotated[
    str | None,
    typer.Option(
        metavar="CKPT|DATASET",
        help="Keep the items of an earlier checkpoint or dataset and their numbers; events on "
        "others are dropped and counted.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print dataset.json instead of the tables.")]

DATASETS = Path("datasets")
MAX_VAL_SESSIONS = 100_000
SEED = 42


class TableSplit(str, Enum):
    """Ways to split a table."""

    time = "time"
    leave_one_out = "leave-one-out"


class TimeUnit(str, Enum):
    """The unit of numeric times."""

    auto = "auto"
    s = "s"
    ms = "ms"
    us = "us"
    ns = "ns"


@app.command()
def otto(
    raw: Raw = None,
    name: Name = "otto",
    force: Force = False,
    data_dir: DataDir = DATASETS,
    val_days: ValDays = 2,
    max_val_sessions: MaxValSessions = MAX_VAL_SESSIONS,
    seed: Seed = SEED,
    skip_bad_lines: SkipBadLines = False,
    catalogue: Catalogue = None,
    as_json: AsJson = False,
) -> None:
    """OTTO's clicks (Kaggle: otto/recsys-dataset)."""
    from tron_cli.prepare.sources.otto import prepare_otto

    dataset = prepare_otto(
        raw,
        data_dir,
        name,
        force=force,
        val_days=val_days,
        max_val_sessions=max_val_sessions,
        seed=seed,
        skip_bad_lines=skip_bad_lines,
        catalogue=catalogue,
    )
    _report(dataset, as_json)


@app.command()
def yoochoose(
    raw: Raw = None,
    name: Name = "yoochoose",
    force: Force = False,
    data_dir: DataDir = DATASETS,
    val_days: ValDays = 1,
    max_val_sessions: MaxValSessions = MAX_VAL_SESSIONS,
    seed: Seed = SEED,
    skip_bad_lines: SkipBadLines = False,
    catalogue: Catalogue = None,
    as_json: AsJson = False,
) -> None:
    """Yoochoose clicks (RecSys Challenge 2015)."""
    from tron_cli.prepare.sources.yoochoose import prepare_yoochoose

    dataset = prepare_yoochoose(
        raw,
        data_dir,
        name,
        force=force,
        val_days=val_days,
        max_val_sessions=max_val_sessions,
        seed=seed,
        skip_bad_lines=skip_bad_lines,
        catalogue=catalogue,
    )
    _report(dataset, as_json)


@app.command()
def diginetica(
    raw: Raw = None,
    name: Name = "diginetica",
    force: Force = False,
    data_dir: DataDir = DATASETS,
    val_days: ValDays = 7,
    max_val_sessions: MaxValSessions = MAX_VAL_SESSIONS,
    seed: Seed = SEED,
    skip_bad_lines: SkipBadLines = False,
    catalogue: Catalogue = None,
    as_json: AsJson = False,
) -> None:
    """Diginetica item views (CIKM Cup 2016)."""
    from tron_cli.prepare.sources.diginetica import prepare_diginetica

    dataset = prepare_diginetica(
        raw,
        data_dir,
        name,
        force=force,
        val_days=val_days,
        max_val_sessions=max_val_sessions,
        seed=seed,
        skip_bad_lines=skip_bad_lines,
        catalogue=catalogue,
    )
    _report(dataset, as_json)


@app.command()
def ml1m(
    raw: Raw = None,
    name: Name = "ml1m",
    force: Force = False,
    data_dir: DataDir = DATASETS,
    skip_bad_lines: SkipBadLines = False,
    catalogue: Catalogue = None,
    as_json: AsJson = False,
) -> None:
    """MovieLens-1M in Kang's version, leave-one-out, with gSASRec's split."""
    from tron_cli.prepare.sources.ml1m import prepare_ml1m

    dataset = prepare_ml1m(
        raw, data_dir, name, force=force, skip_bad_lines=skip_bad_lines, catalogue=catalogue
    )
    _report(dataset, as_json)


@app.command()
def sequences(
    train: Annotated[Path, typer.Option(help="Training sessions, one a line, in time order.")],
    test: Annotated[Path, typer.Option(help="Test sessions, one a line.")],
    name: Name,
    val: Annotated[
        Path | None,
        typer.Option(help="Validation sessions; else the last 5 % of the training lines."),
    ] = None,
    force: Force = False,
    data_dir: DataDir = DATASETS,
    max_val_sessions: MaxValSessions = MAX_VAL_SESSIONS,
    seed: Seed = SEED,
    skip_bad_lines: SkipBadLines = False,
    max_bad_share: MaxBadShare = None,
    catalogue: Catalogue = None,
    as_json: AsJson = False,
) -> None:
    """Text files with one session a line: integer item ids, oldest first."""
    from tron_cli.prepare.sources.sequences import prepare_sequences

    dataset = prepare_sequences(
        train,
        test,
        data_dir,
        name,
        val=val,
        force=force,
        max_val_sessions=max_val_sessions,
        seed=seed,
        skip_bad_lines=skip_bad_lines,
        catalogue=catalogue,
        max_bad_share=max_bad_share,
    )
    _report(dataset, as_json)


@app.command()
def table(
    item_col: Annotated[str, typer.Option(help="Column of the item ids.")],
    time_col: Annotated[str, typer.Option(help="Column of the times.")],
    name: Name,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            help="CSV, TSV, RecBole's .inter, JSON lines (also .gz, .zst) or Parquet: a file, a "
            "folder of parts or a quoted pattern; may be given again.",
        ),
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of --input, with --test: tables that are already split."),
    ] = None,
    val: Annotated[
        list[Path] | None,
        typer.Option(help="The validation table; else the last days of --train validate."),
    ] = None,
    test: Annotated[list[Path] | None, typer.Option(help="The test table.")] = None,
    time_unit: Annotated[
        TimeUnit, typer.Option(help="auto: ISO 8601, or numbers of a guessed unit.")
    ] = TimeUnit.auto,
    session_col: Annotated[str | None, typer.Option(help="Column of the session ids.")] = None,
    user_col: Annotated[
        str | None,
        typer.Option(
            help="Column of the user ids, instead of --session-col; or with it, where session ids "
            "are a user's own."
        ),
    ] = None,
    session_gap: Annotated[
        str | None,
        typer.Option(help="A user's session ends at a pause longer than this (30m by default)."),
    ] = None,
    event_col: Annotated[str | None, typer.Option(help="Column of the kinds of events.")] = None,
    keep_events: Annotated[
        str | None, typer.Option(help="The kinds to keep, such as view,click.")
    ] = None,
    null_tokens: Annotated[
        str | None,
        typer.Option(
            help='Texts that are no session, user or item id, instead of "NULL,null,None,NA,N/A,'
            'NaN,nan,\\N"; "" for none. Their lines are bad lines.'
        ),
    ] = None,
    split: Annotated[TableSplit, typer.Option(help="How to split.")] = TableSplit.time,
    val_days: Annotated[
        float | None,
        typer.Option(min=0, help="Days of training that validate (1 by default); 0: none."),
    ] = None,
    test_days: Annotated[
        float | None,
        typer.Option(min=0, help="Sessions that start in the last so many days test (default 1)."),
    ] = None,
    val_from: Annotated[
        str | None,
        typer.Option(help="Instead of --val-days: sessions that start from this date on validate."),
    ] = None,
    test_from: Annotated[
        str | None,
        typer.Option(help="Instead of --test-days: an ISO date or time, UTC without a zone."),
    ] = None,
    min_session_length: Annotated[
        int, typer.Option(min=2, help="Drop sessions of fewer events (leave-one-out: at least 3).")
    ] = 2,
    min_item_count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Drop items with fewer events (5 by default; 1 with --train or --catalogue).",
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates", help="Drop further events of the same session, item and time."
        ),
    ] = False,
    collapse_repeats: Annotated[
        bool,
        typer.Option("--collapse-repeats", help="Drop events with the item of the event before."),
    ] = False,
    max_session_length: Annotated[
        int | None, typer.Option(min=2, help="Drop sessions of more events, such as a crawler's.")
    ] = None,
    force: Force = False,
    data_dir: DataDir = DATASETS,
    max_val_sessions: MaxValSessions = MAX_VAL_SESSIONS,
    seed: Seed = SEED,
    skip_bad_lines: SkipBadLines = False,
    max_bad_share: MaxBadShare = None,
    catalogue: Catalogue = None,
    as_json: AsJson = False,
) -> None:
    """Your own data: a table with a row per event."""
    from tron_cli.errors import InputError
    from tron_cli.prepare.sources.table import NULL_TOKENS, TableColumns, prepare_table

    if bool(inputs) == bool(train) or bool(train) != bool(test):
        raise InputError("expected --input, or --train and --test for tables already split")
    dataset = prepare_table(
        inputs or train or [],
        TableColumns(
            item=item_col,
            time=time_col,
            session=session_col,
            user=user_col,
            time_unit=time_unit.value,
            session_gap=session_gap,
            event=event_col,
            keep_events=_words(keep_events or ""),
            null_tokens=NULL_TOKENS if null_tokens is None else _words(null_tokens),
        ),
        data_dir,
        name,
        leave_one_out=split is TableSplit.leave_one_out,
        val=val or [],
        test=test or [],
        val_days=val_days,
        test_days=test_days,
        val_from=val_from,
        test_from=test_from,
        min_session_length=min_session_length,
        min_item_count=min_item_count,
        max_val_sessions=max_val_sessions,
        seed=seed,
        force=force,
        skip_bad_lines=skip_bad_lines,
        catalogue=catalogue,
        max_bad_share=max_bad_share,
        drop_duplicates=drop_duplicates,
        collapse_repeats=collapse_repeats,
        max_session_length=max_session_length,
    )
    _report(dataset, as_json)


@app.command()
def synthetic(
    name: Name = "synthetic",
    force: Force = False,
    data_dir: DataDir = DATASETS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated shop.")] = SEED,
    as_json: AsJson = False,
) -> None:
    """A generated shop whose best possible figures are known."""
    from tron_cli.evaluation.reference import reference_figures
    from tron_cli.prepare.sources.synthetic import prepare_synthetic

    _report(prepare_synthetic(data_dir, name, reference_figures, force=force, seed=seed), as_json)


def _words(listing: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listing.split(",") if word.strip())


def _report(dataset: Dataset, as_json: bool) -> None:
    from tron_cli.prepare.summary import print_summary

    if as_json:
        print(json.dumps(dataset.info))
    else:
        print_summary(dataset)
