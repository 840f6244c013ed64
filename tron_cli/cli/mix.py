"""`tron mix`: join networks, and session-kNN, in one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tron_cli.cli.options import DATASETS, AsJson, DataDir, Device, OutputDir, Plugins, given_path


def mix(
    parts: Annotated[
        list[Path],
        typer.Argument(
            parser=given_path,
            metavar="PART PART ...",
            help="Checkpoints or runs of networks, and of at most one model=session_knn.",
        ),
    ],
    weight: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Weight of session-kNN, from 0 to 256; default: chosen on validation. Final "
            "models need it.",
        ),
    ] = None,
    data_dir: DataDir = DATASETS,
    output_dir: OutputDir = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Join networks, and session-kNN, in one model.

    The scores of several networks are averaged. The votes of session-kNN are added to them, by the
    weight that scores highest on validation. The new checkpoint holds all parts, and costs as much
    time and memory as all of them.
    """
    from tron_cli.api.mixing import mix as mix_parts

    result = mix_parts(
        *parts, weight=weight, data_dir=data_dir, output_dir=output_dir, name=name, device=device
    )
    if not as_json:
        print(result.checkpoint)
        return
    shown = {
        "checkpoint": str(result.checkpoint),
        "weight": result.weight,
        "validation": result.metrics,
        "validation_by_weight": {
            f"{key:g}": each for key, each in result.metrics_by_weight.items()
        },
    }
    print(json.dumps(shown))
