"""`tron train`: train a model or fit a baseline, in a new run or a resumed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tron_cli.cli.options import (
    CONFIG_HELP,
    DATASETS,
    AsJson,
    DataDir,
    Device,
    OutputDir,
    Overrides,
    Plugins,
    config_names,
    given_path,
)


def train(
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help=CONFIG_HELP, autocompletion=config_names)
    ] = None,
    data_dir: DataDir = DATASETS,
    output_dir: OutputDir = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    resume: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="RUN", help="Run folder to resume.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="CKPT",
            help="Start from the weights of a checkpoint or run, matching items by original id.",
        ),
    ] = None,
    final: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="RUN",
            help="Run or best checkpoint: train with its settings, on validation sessions too, for "
            "as many steps as validation chose.",
        ),
    ] = None,
    profile: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Profile N steps after a short warm-up, print where the time goes, and stop: "
            "trace.json in the run's folder is a Chrome trace, and --resume continues the run.",
        ),
    ] = None,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model or fit a baseline.

    The checkpoint with the best validation figure is kept beside the last one.
    """
    from tron_cli.api.training import train as train_model
    from tron_cli.config import parse_overrides

    result = train_model(
        config,
        data_dir=data_dir,
        output_dir=output_dir,
        name=name,
        resume=resume,
        init_from=init_from,
        final=final,
        profile=profile,
        device=device,
        **parse_overrides(overrides or []),
    )
    saved = str(result.checkpoint)
    if result.profile is not None:
        shown = {"checkpoint": saved, "profile": result.profile.as_json()}
        print(json.dumps(shown) if as_json else result.profile.as_text())
    elif as_json:
        print(json.dumps({"checkpoint": saved, "validation": result.metrics}))
    else:
        print(saved)
