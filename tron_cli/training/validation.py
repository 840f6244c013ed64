"""Validation: figures by which the best checkpoint of a run is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

from tron_cli.baselines.base import Baseline
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.evaluation.metrics import parse_measures, score
from tron_cli.evaluation.predict import of_all_processes, predict
from tron_cli.models.base import Model
from tron_cli.training.profile import phase


def with_measures(config: ExperimentConfig) -> tuple[ExperimentConfig, list[Any]]:
    """Return the measures to validate by, and the config with its val_metric named as they are."""
    val_metric = str(parse_measures(config.val_metric)[0])
    measures = parse_measures((*config.metrics, val_metric))
    return dataclasses.replace(config, val_metric=val_metric), measures


def validate(
    model: Model | Baseline,
    sessions: Sessions,
    dataset: Dataset,
    config: ExperimentConfig,
    measures: list[Any],
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Return figures on the validation sessions, ranked as in serving; empty without sessions.

    Each process ranks some of the events, and all return the figures of all events.
    """
    if not len(sessions):
        return {}
    with phase("validation"):
        found = predict(
            model,
            sessions,
            protocol=dataset.protocol,
            filter_rated=config.filter_rated,
            rank_limit=max(measure["cutoff"] for measure in measures),
            batch_size=config.eval_batch_size,
            progress="validation" if processes.is_first else None,
            share=processes.share,
        )
        found = of_all_processes(found, processes)
        figures = processes.of_first(lambda: score(found.rank_E, found.session_E, measures))
    return {name: figure.value for name, figure in figures.items()}
