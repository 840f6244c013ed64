"""`tron_cli.load_config`: a configuration by its name, with changes; code from outside tron."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from tron_cli.api.arguments import checked
from tron_cli.config import ExperimentConfig, checked_names
from tron_cli.config import load_config as resolved
from tron_cli.config.plugins import add_plugin


@checked
def load_config(
    config: str | os.PathLike[str] | ExperimentConfig, **settings: Any
) -> ExperimentConfig:
    """Return a configuration with some settings changed.

    config: the name of a packaged config, a Python file, one of otto-de/TRON's JSON files, or an
    ExperimentConfig. Raises InputError where it cannot be found, a setting is unknown or of a wrong
    type, or the settings do not fit together.

    >>> import tron_cli
    >>> config = tron_cli.load_config("config_diginetica", max_epochs=3)
    >>> config.model, config.max_epochs
    ('sasrec', 3)
    """
    if isinstance(config, ExperimentConfig):
        return dataclasses.replace(config, **checked_names(settings))
    return resolved(os.fspath(config), settings)[0]


def add_plugins(plugins: Iterable[str]) -> None:
    """Load code from outside tron, as `--plugin` does: FILE.py:NAME or package.module:NAME."""
    for plugin in plugins:
        add_plugin(plugin)
