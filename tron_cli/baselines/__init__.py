"""Simple methods that every model must beat, fitted in seconds and ranked exactly.

There is one file per algorithm, loaded on demand: only `ease` needs torch, and preparing data must
not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tron_cli.registry import BASELINES, load, settings_of

if TYPE_CHECKING:
    from tron_cli.baselines.base import Baseline
    from tron_cli.config import ExperimentConfig


def build_baseline(config: ExperimentConfig, num_items: int) -> Baseline:
    """Build the baseline that `config.model` names, not yet fitted."""
    entry = BASELINES[config.model]
    return load(entry)(**settings_of(entry, config, num_items=num_items))
