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
    given_path,
    with_groups,
)
from tron_cli.cli.report import comparison_text


@with_groups
def compare(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            parser=given_path, metavar="CKPT CKPT ...", help=".pt files, or folders of runs."
        ),
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
    from tron_cli.api.evaluation import compare as compare_checkpoints

    result = compare_checkpoints(
        checkpoints,
        dataset=dataset,
        **vars(events),
        reference=reference,
        cutoff=cutoff,
        data_dir=data_dir,
        device=device,
    )
    print(json.dumps(result.report) if as_json else comparison_text(result.report))
