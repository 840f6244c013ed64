"""Simple methods that every model must beat: fitted in seconds, ranked as exactly as the models.

One file an algorithm, loaded when it is asked for: only `ease` needs torch, and whoever prepares
data does without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tron_cli.registry import BASELINES, load, settings_of

if TYPE_CHECKING:
    from tron_cli.baselines.base import Baseline
    from tron_cli.config import ExperimentConfig


def build_baseline(config: ExperimentConfig, num_items: int) -> Baseline:
    """The baseline that `config.model` names; it knows nothing yet."""
    entry = BASELINES[config.model]
    return load(entry)(**settings_of(entry, config, num_items=num_items))
