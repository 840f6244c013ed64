"""`tron import`: import a checkpoint of another tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from tron_cli.cli.options import (
    CONFIG_HELP,
    DATASETS,
    AsJson,
    DataDir,
    Overrides,
    config_names,
    given_path,
)
from tron_cli.errors import InputError


def import_(
    tool: Annotated[
        Literal["tron", "gsasrec"], typer.Argument(help="otto-de/TRON or gSASRec-pytorch.")
    ],
    file: Annotated[
        Path,
        typer.Argument(
            parser=given_path, metavar="FILE", help="TRON's .ckpt, or the .pt of gSASRec."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", parser=given_path, metavar="FILE", help="File to write (.pt)."
        ),
    ],
    overrides: Overrides = None,
    dataset: Annotated[
        str | None, typer.Option(help="Prepared dataset that has the checkpoint's items.")
    ] = None,
    item_ids: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Original ids of the items, one per line in the order of the checkpoint's rows, "
            "or the training sessions that TRON prepared (.jsonl).",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help=CONFIG_HELP, autocompletion=config_names)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    data_dir: DataDir = DATASETS,
    as_json: AsJson = False,
) -> None:
    """Import a checkpoint of otto-de/TRON or gSASRec-pytorch.

    The file is read without running its code.
    """
    if dataset == "":
        raise InputError("--dataset is empty; name a prepared dataset, or leave it out")
    from tron_cli.data.dataset import Dataset
    from tron_cli.importing.foreign import import_checkpoint

    found = import_checkpoint(
        tool,
        file,
        output,
        dataset=None if dataset is None else Dataset.open(data_dir / dataset),
        item_ids_file=item_ids,
        config_name=config,
        overrides=overrides or [],
        force=force,
    )
    print(json.dumps(found) if as_json else found["checkpoint"])
