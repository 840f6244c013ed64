"""Configurations from files and from key=value words, which override the files."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from tron_cli.config import tron_json
from tron_cli.config.experiment import FIELDS, ExperimentConfig
from tron_cli.config.plugins import check_named
from tron_cli.config.setting import TOOLS
from tron_cli.errors import InputError, described, place_of

CONFIGS_DIR = Path(__file__).parents[1] / "configs"

log = logging.getLogger("tron")


def load_config(
    name: str, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[ExperimentConfig, dict[str, str]]:
    """Resolve a config file and overrides, as key=value words or as values by name.

    `name` is a path to a Python file or to one of otto-de/TRON's JSON files, or else the name of a
    packaged config (with or without `.py`). Returns the config and, for each field, where its value
    comes from. Raises InputError.
    """
    path = _find_config(name)
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides)
    changes = checked_names(overrides)
    if path.suffix == ".json":
        config, named = _from_tron(path, changes)
    else:
        from_file = _execute(path)
        config = dataclasses.replace(from_file, **changes)
        named = {key for key in FIELDS if getattr(from_file, key) != FIELDS[key].default}
    origins = {key: path.name if key in named else "default" for key in FIELDS}
    return config, {**origins, **dict.fromkeys(changes, "command line")}


def requested_accelerator(name: str) -> str:
    """Return the device that a config asks for: gpu, cpu or auto; only TRON's JSON files ask."""
    path = _find_config(name)
    return tron_json.tron_accelerator(path) if path.suffix == ".json" else "auto"


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return settings by name: `["lr=1e-3", "loss=ce"]` -> {"lr": 0.001, "loss": "ce"}."""
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"expected key=value after the options, got {word!r}")
        _check_key(key)
        if key in changes:
            raise InputError(f"{key} is given twice on the command line; keep one")
        changes[key] = FIELDS[key].parsed(text)
    return changes


def config_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Return the inverse of `dataclasses.asdict`, for configs stored in checkpoints.

    Raises UnnamedCodeError where it needs code from outside that nobody has named.
    """
    check_named(values)
    return ExperimentConfig(**checked_names(values))


def checked_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by setting. Raises InputError for a name that is not a setting."""
    for key in values:
        _check_key(key)
    return dict(values)


def packaged_configs() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS_DIR.glob("config_*.py"))


def _find_config(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    packaged = CONFIGS_DIR / f"{name.removesuffix('.py')}.py"
    if path.name == name and packaged.is_file():
        return packaged
    near = difflib.get_close_matches(name.removesuffix(".py"), packaged_configs(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"packaged are {', '.join(packaged_configs())}"
    raise InputError(f"no config {name!r}: neither a file nor a packaged config; {hint}")


def _from_tron(path: Path, changes: dict[str, Any]) -> tuple[ExperimentConfig, set[str]]:
    """Return the config of one of TRON's JSON files, and the settings that the file decides."""
    settings, notes = tron_json.tron_settings(path, changes)
    try:
        config = ExperimentConfig(**{**settings, **changes})
    except InputError as error:
        raise tron_json.blame(path, error, changes) from error
    for note in notes:
        log.info("%s: %s", path.name, note)
    log.info("%s: what tron does otherwise, and TRON's way:", path.name)
    for difference in tron_json.differences_from_tron(config):
        log.info("  %s", difference)
    return config, set(settings)


def _execute(path: Path) -> ExperimentConfig:
    scope: dict[str, Any] = {"__name__": "tron_config", "__file__": str(path)}
    try:
        # From bytes Python reads UTF-8, whatever the locale, with or without a byte order mark.
        with redirect_stdout(sys.stderr):  # stdout is for results
            exec(compile(path.read_bytes(), str(path), "exec"), scope)
    except (Exception, SystemExit) as error:
        raise InputError(f"{place_of(path, error)}: {_reason(error)}") from error
    config = scope.get("config")
    if not isinstance(config, ExperimentConfig):
        raise InputError(f"{path} must define `config = ExperimentConfig(...)`, got {config!r}")
    return config


def _reason(error: BaseException) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        return _unknown_key(unknown.group(1))
    return described(error)


def _unknown_key(key: str) -> str:
    near = [_names_elsewhere()[key]] if key in _names_elsewhere() else []
    near = near or difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else "; `tron config show` lists them all"
    return f"unknown setting {key!r}{hint}"


def _check_key(key: str) -> None:
    if key not in FIELDS:
        raise InputError(_unknown_key(key))


def _names_elsewhere() -> dict[str, str]:
    """Return settings by their names in other tools, and by the words of these names."""
    found = {"accelerator": "--device"}
    for setting in FIELDS.values():
        for tool in TOOLS:
            for name in setting.names_elsewhere(tool):
                for part in (name, *re.findall(r"\w+", name.removeprefix("not "))):
                    found.setdefault(part, setting.name)
    return found
