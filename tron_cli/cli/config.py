"""`tron config`: packaged configurations, and what a configuration resolves to."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from tron_cli.cli.options import CONFIG_HELP, AsJson, Overrides
from tron_cli.report import format_table

app = typer.Typer(help="Inspect configurations.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help=CONFIG_HELP)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the resolved values of a configuration and where each came from."""
    from tron_cli.config import FIELDS, load_config

    experiment, origins = load_config(config, overrides or [])
    values = dataclasses.asdict(experiment)
    if as_json:
        print(json.dumps(values))
        return
    rows = [[key, _shown(values[key]), origins[key]] for key in FIELDS]
    print(format_table(["setting", "value", "from"], rows))


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


@app.command("list")
def list_packaged() -> None:
    """Print the names of the packaged configurations."""
    from tron_cli.config import packaged_configs

    print("\n".join(packaged_configs()))
