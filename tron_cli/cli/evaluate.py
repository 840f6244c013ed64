"""`tron evaluate`: exact figures of one checkpoint."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from tron_cli.cli.options import (
    DATASETS,
    AsJson,
    CheckpointPath,
    DataDir,
    Device,
    Plugins,
    PredictedEvents,
    given_path,
    with_groups,
)
from tron_cli.cli.report import evaluation_text


class SliceKind(str, Enum):
    """Kinds of slices of --by."""  # typer takes no list of a Literal

    length = "length"
    position = "position"
    popularity = "popularity"
    repeat = "repeat"


@with_groups
def evaluate(
    checkpoint: CheckpointPath,
    events: PredictedEvents,
    dataset: Annotated[
        str | None, typer.Option(help="Prepared dataset; default: the checkpoint's.")
    ] = None,
    one_pass: Annotated[
        bool,
        typer.Option(help="Rank a session's events in one pass, as TRON did, not as serving does."),
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            parser=given_path, metavar="FILE", help="Write the predictions as a TREC run."
        ),
    ] = None,
    qrels: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FILE", help="Write the targets as TREC qrels."),
    ] = None,
    per_event: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Write session, event, target and rank as .parquet or .csv.",
        ),
    ] = None,
    by: Annotated[
        list[SliceKind] | None,
        typer.Option(help="Also report figures for each slice of the events; may be repeated."),
    ] = None,
    cutoff: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Also make lists of K items, and report their coverage, popularity, novelty and "
            "serendipity; 0: no lists, which saves time.",
        ),
    ] = 0,
    table_sharding: Annotated[
        Literal["none", "rows"],
        typer.Option(
            help="Under torchrun, hold the whole item tables in each process, or an equal part of "
            "their rows, for tables larger than one device; without --run and --cutoff."
        ),
    ] = "none",
    data_dir: DataDir = DATASETS,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Report exact figures of one checkpoint.

    Each target is ranked among the whole catalogue, and each figure has a standard error.
    """
    from tron_cli.api.evaluation import evaluate as evaluate_checkpoint

    result = evaluate_checkpoint(
        checkpoint,
        dataset=dataset,
        **vars(events),
        one_pass=one_pass,
        run=run,
        qrels=qrels,
        per_event=per_event,
        by=[kind.value for kind in by or ()],
        cutoff=cutoff,
        table_sharding=table_sharding,
        data_dir=data_dir,
        device=device,
    )
    print(json.dumps(result.report) if as_json else evaluation_text(result.report))
