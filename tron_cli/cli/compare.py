"""`tron compare`: several checkpoints on the same events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
from tron_cli.cli.report import comparison_text
from tron_cli.ops.device import chosen_device


@with_groups
def compare(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT CKPT ...", help=".pt files, or folders of runs.")
    ],
    events: PredictedEvents,
    dataset: Annotated[
        str | None, typer.Option(help="Prepared dataset; default: the reference's.")
    ] = None,
    reference: Annotated[
        int,
        typer.Option(metavar="N", help="Compare the others with the N-th checkpoint."),
    ] = 1,
    cutoff: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Items per list for coverage, popularity, novelty, serendipity and intersection; "
            "default: the reference's recommendation_limit; 0: leave these figures out.",
        ),
    ] = None,
    data_dir: DataDir = DATASETS,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare models on the same events.

    Differences are paired, event by event, and have confidence intervals.
    """
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.data.dataset import Dataset
    from tron_cli.evaluation.compare import check_choice
    from tron_cli.evaluation.compare import compare as compare_models
    from tron_cli.evaluation.evaluate import EvaluationOptions

    check_choice(len(checkpoints), reference)
    loaded = [load_checkpoint(path) for path in checkpoints]
    report = compare_models(
        loaded,
        Dataset.open(data_dir / (dataset or loaded[reference - 1].dataset["name"])),
        EvaluationOptions(**vars(events)),
        chosen_device(device),
        reference=reference - 1,
        cutoff=cutoff,
    )
    print(json.dumps(report) if as_json else comparison_text(report))
