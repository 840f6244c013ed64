"""Configurations: settings of an experiment, from files and from words of the command line."""

from tron_cli.config.experiment import FIELDS, ExperimentConfig
from tron_cli.config.gsasrec import GSASRecExperimentConfig
from tron_cli.config.load import (
    CONFIGS_DIR,
    checked_names,
    config_from_dict,
    load_config,
    packaged_configs,
    parse_overrides,
    requested_accelerator,
)

__all__ = [
    "CONFIGS_DIR",
    "FIELDS",
    "ExperimentConfig",
    "GSASRecExperimentConfig",
    "checked_names",
    "config_from_dict",
    "load_config",
    "packaged_configs",
    "parse_overrides",
    "requested_accelerator",
]
