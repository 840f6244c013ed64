"""`tron config`: packaged configurations, and the resolved values of a configuration."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from typing import Annotated, Any

import typer

from tron_cli.cli.options import CONFIG_HELP, AsJson, Overrides, config_names
from tron_cli.text_table import format_table

app = typer.Typer(help="Inspect configurations.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help=CONFIG_HELP, autocompletion=config_names)],
    overrides: Overrides = None,
    as_json: AsJson = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Print default, allowed values and meaning of each setting."
        ),
    ] = False,
) -> None:
    """Print the resolved values of a configuration.

    Each is shown with its origin: default, config file or command line.
    """
    from tron_cli.config import FIELDS, load_config
    from tron_cli.config.setting import shown

    experiment, origins = load_config(config, overrides or [])
    values = dataclasses.asdict(experiment)
    if explain:
        print(_explained(values, as_json))
    elif as_json:
        print(json.dumps(values))
    else:
        rows = [[key, shown(values[key]), origins[key]] for key in FIELDS]
        print(format_table(["setting", "value", "from"], rows))


def _explained(values: dict[str, Any], as_json: bool) -> str:
    """Return a table with two rows for each setting, the second one wrapped, or a JSON object."""
    from tron_cli.config import FIELDS
    from tron_cli.config.setting import shown

    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    lines = [f"{'setting':30}{'value':30}default", f"{'-' * 28:30}{'-' * 28:30}{'-' * 28}"]
    facts = {}
    for name, setting in FIELDS.items():
        default = setting.shown_default
        meaning = ", ".join(setting.owners) + ": " * bool(setting.owners) + setting.help
        facts[name] = {
            "value": values[name], "default": default, "allowed": setting.allowed,
            "meaning": meaning,
        }  # fmt: skip
        lines.append(f"{name:30}{shown(values[name]):28}  {default}")
        lines += textwrap.wrap(
            f"{meaning} [{setting.allowed}]", width, initial_indent="  ", subsequent_indent="  "
        )
    return json.dumps(facts) if as_json else "\n".join(lines)


@app.command("list")
def list_packaged() -> None:
    """Print the names of the packaged configurations."""
    from tron_cli.config import packaged_configs

    print("\n".join(packaged_configs()))
