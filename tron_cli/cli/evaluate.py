"""`tron evaluate`: exact figures of one checkpoint."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tron_cli.cli.options import (
    DATASETS,
    AsJson,
    DataDir,
    Device,
    Plugins,
    PredictedEvents,
    with_groups,
)
from tron_cli.cli.report import evaluation_text
from tron_cli.ops.device import chosen_device

if TYPE_CHECKING:
    from tron_cli.evaluation.evaluate import EvaluationOptions


class SliceKind(str, Enum):
    """Kinds of slices of --by."""  # typer takes no list of a Literal

    length = "length"
    position = "position"
    popularity = "popularity"
    repeat = "repeat"


@with_groups
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file, or the folder of a run.")],
    events: PredictedEvents,
    dataset: Annotated[
        str | None, typer.Option(help="Prepared dataset; default: the checkpoint's.")
    ] = None,
    one_pass: Annotated[
        bool,
        typer.Option(help="Rank a session's events in one pass, as TRON did, not as serving does."),
    ] = False,
    run: Annotated[Path | None, typer.Option(help="Write the predictions as a TREC run.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Write the targets as TREC qrels.")] = None,
    per_event: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write session, event, target and rank as .parquet or .csv."
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
    data_dir: DataDir = DATASETS,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Report exact figures of one checkpoint.

    Each target is ranked among the whole catalogue, and each figure has a standard error.
    """
    from tron_cli.evaluation.evaluate import EvaluationOptions

    options = EvaluationOptions(
        **vars(events),
        one_pass=one_pass,
        run=run,
        qrels=qrels,
        per_event=per_event,
        by=tuple(dict.fromkeys(kind.value for kind in by or ())),
        cutoff=cutoff,
    )
    report = run_evaluation(checkpoint, dataset, options, data_dir, device)
    print(json.dumps(report) if as_json else evaluation_text(report))


def run_evaluation(
    path: Path,
    dataset_name: str | None,
    options: EvaluationOptions,
    data_dir: Path,
    device_name: str,
) -> dict[str, Any]:
    """Evaluate as `tron evaluate` does; return the report."""
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.data.dataset import Dataset
    from tron_cli.evaluation.evaluate import assess

    checkpoint = load_checkpoint(path)
    dataset = Dataset.open(data_dir / (dataset_name or checkpoint.dataset["name"]))
    return assess(checkpoint, dataset, options, chosen_device(device_name))
