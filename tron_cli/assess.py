"""Checkpoint + prepared dataset -> an evaluation report: figures, and everything they rest on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.checkpoint import Checkpoint, dataset_identity
from tron_cli.config import ExperimentConfig
from tron_cli.dataset import Dataset, Sessions
from tron_cli.errors import InputError
from tron_cli.evaluate import predict
from tron_cli.metrics import Figure, parse_measures, score
from tron_cli.models import Model
from tron_cli.registry import BASELINES
from tron_cli.trec import check_writable, write_qrels, write_run

TIE_RULE = "items that score the same as the target count as ranked above it"

log = logging.getLogger("tron")


@dataclass(frozen=True)
class EvaluationOptions:
    """What `tron evaluate` was asked; None means the checkpoint's or the dataset's own."""

    split: str = "test"
    protocol: str | None = None
    metrics: str | None = None
    filter_rated: bool | None = None
    full_sessions: bool = False
    one_pass: bool = False
    limit_sessions: int | None = None
    run: Path | None = None
    qrels: Path | None = None


def assess(
    checkpoint: Checkpoint, dataset: Dataset, options: EvaluationOptions, device: torch.device
) -> dict[str, Any]:
    """Evaluate and return the report that `tron evaluate --json` prints.

    Raises InputError where checkpoint, dataset and options do not fit together.
    """
    config = checkpoint.config
    protocol = options.protocol or dataset.protocol
    check_fit(checkpoint, dataset, protocol)
    _check(options)
    measures = parse_measures(config.metrics if options.metrics is None else options.metrics)
    filter_rated = config.filter_rated if options.filter_rated is None else options.filter_rated
    sessions = chosen_sessions(dataset, options)
    for path in (options.run, options.qrels):
        if path:
            check_writable(path)
    depth = max(config.recommendation_limit, *(measure["cutoff"] for measure in measures))
    model = checkpoint.build_model(device)
    if options.one_pass and isinstance(model, Model) and model.mask_item is not None:
        raise InputError(
            f"--one-pass is not for model={config.model}, which predicts from a mask behind each "
            "history, so that one pass predicts one event; leave it out"
        )
    predictions = predict(
        model,
        sessions,
        protocol=protocol,
        filter_rated=filter_rated,
        full_sessions=options.full_sessions,
        one_pass=options.one_pass,
        top_items=depth if options.run else 0,
        batch_size=config.eval_batch_size,
        progress=f"{options.split} split",
    )
    figures = score(predictions.rank_E, predictions.session_E, measures)
    item_ids = dataset.item_ids
    if options.qrels:
        write_qrels(options.qrels, predictions, item_ids)
    if options.run:
        write_run(options.run, predictions, item_ids)

    events = len(predictions.rank_E)
    absent = left_out(dataset, options.split, protocol, sessions, events)
    lost_as_misses = absent["lost_predictions"] if absent["earlier_events"] == 0 else 0
    report: dict[str, Any] = {
        "metrics": {
            name: _with_lost(figure, events, lost_as_misses) for name, figure in figures.items()
        },
        "protocol": protocol,
        "split": options.split,
        "events": events,
        "sessions": int(np.count_nonzero(np.bincount(predictions.session_E))),
        "items": dataset.num_items,
        "checkpoint": str(checkpoint.path),
        "dataset": dataset.name,
        "positions": _positions(config, options.one_pass),
        "tie_rule": TIE_RULE,
        "filter_rated": filter_rated,
        "left_out": absent,
        "missed_because_filtered": int((predictions.rank_E == 0).sum()),
    }
    references = dataset.info.get("references", {}).get(options.split)
    whole_split = absent["sessions_beyond_limit"] == 0
    if references and protocol == "every-step" and not filter_rated and whole_split:
        report["references"] = references
    return report


def check_fit(checkpoint: Checkpoint, dataset: Dataset, protocol: str) -> None:
    """Whether the checkpoint can be evaluated on the dataset under the protocol.

    Raises InputError where it cannot; other training sessions are a warning.
    """
    trained_on, found = checkpoint.dataset, dataset_identity(dataset)
    if trained_on["catalogue_fingerprint"] != found["catalogue_fingerprint"]:
        raise InputError(
            f"{checkpoint.path} was trained on a catalogue of {trained_on['num_items']:,} items "
            f"({trained_on['name']}), which is not that of {dataset.path} "
            f"({found['num_items']:,} items): their item ids differ; evaluate it on the dataset "
            "it was trained on"
        )
    if trained_on["train_fingerprint"] != found["train_fingerprint"]:
        log.warning(
            "%s was trained on other sessions than the training split of %s",
            checkpoint.path,
            dataset.path,
        )
    if protocol == "every-step" and dataset.protocol == "last-item":
        raise InputError(
            f"{dataset.name} is leave-one-out data: the earlier events of its histories are "
            "training data, so every-step would score what the model was trained on; use "
            "--protocol last-item"
        )


def chosen_sessions(dataset: Dataset, options: EvaluationOptions) -> Sessions:
    """The sessions of the split, up to limit_sessions. Raises InputError where there are none."""
    sessions = dataset.split(options.split)
    if not len(sessions):
        raise InputError(
            f"the {options.split} split of {dataset.path} is empty; prepare it with one, or "
            "choose another --split"
        )
    if options.limit_sessions is None:
        return sessions
    return Sessions(sessions.items, sessions.offsets[: options.limit_sessions + 1])


def left_out(
    dataset: Dataset, split: str, protocol: str, sessions: Sessions, events: int
) -> dict[str, int]:
    """What `events` predicted events of the chosen sessions do not cover, by reason."""
    possible = int((sessions.lengths - 1).clip(min=0).sum())
    beyond_limit = len(dataset.split(split)) - len(sessions)
    # Counted for the dataset's own protocol, over the whole sessions of the whole split.
    lost = 0
    if beyond_limit == 0 and protocol == dataset.protocol:
        lost = dataset.split_info(split)["lost_predictions"]
    return {
        "earlier_events": possible - events if protocol == "every-step" else 0,
        "sessions_beyond_limit": beyond_limit,
        "lost_predictions": lost,
    }


def _check(options: EvaluationOptions) -> None:
    if options.run is not None and options.run == options.qrels:
        raise InputError(f"--run and --qrels both name {options.run}; give each its own file")
    if options.one_pass and options.full_sessions:
        raise InputError(
            "--one-pass covers the last sequence_length events of a session only; leave out "
            "--full-sessions"
        )


def _with_lost(figure: Figure, events: int, lost: int) -> dict[str, float | None]:
    shown: dict[str, float | None] = {"value": figure.value, "stderr": figure.stderr}
    if lost:
        shown["value_with_lost_as_misses"] = figure.value * events / (events + lost)
    return shown


def _positions(config: ExperimentConfig, one_pass: bool) -> str:
    positions = "none" if config.model in BASELINES else config.positions
    if one_pass:
        return f"{positions}, one pass over the whole session"
    return f"{positions}, each event from its own history"
