"""`tron export`: a checkpoint for other runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from tron_cli.cli.options import AsJson, CheckpointPath, Plugins, given_path
from tron_cli.text_table import format_table


def export(
    checkpoint: CheckpointPath,
    format: Annotated[
        Literal["onnx", "safetensors", "torch"],
        typer.Option(
            help="An ONNX model; weights as safetensors; a torch.export program (.pt2).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=given_path,
            metavar="FOLDER",
            help="New folder to write; default: METHOD-DATASET-FORMAT.",
        ),
    ] = None,
    table: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Number format in which the file holds the item tables."),
    ] = "float32",
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export in that folder.")
    ] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained network for other runtimes.

    Its item ids, their popularity and the settings are written beside it.
    """
    from tron_cli.serving.export import export as write

    written = write(checkpoint, format=format, output=output, table=table, force=force)
    if as_json:
        print(json.dumps(written))
        return
    rows = [[name, f"{file['bytes']:,}"] for name, file in written["files"].items()]
    print(format_table(["file", "bytes"], rows))
    print(f"\nfolder {written['folder']}")
