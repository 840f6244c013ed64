"""Evaluation report of a checkpoint on a prepared dataset: figures and what they are based on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.baselines.base import Baseline
from tron_cli.checkpoint import Checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.catalogue import RenumberedDataset
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.data.histories import Predictions, ranges
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.errors import InputError, counted
from tron_cli.evaluation.beyond_accuracy import (
    ItemCounts,
    beyond_accuracy,
    check_cutoff,
    count_items,
)
from tron_cli.evaluation.metrics import figures, parse_measures, values_by_rank
from tron_cli.evaluation.predict import of_all_processes, predict
from tron_cli.evaluation.sharded import divided_model
from tron_cli.evaluation.slices import KINDS, sliced_figures
from tron_cli.evaluation.trec import Ids, write_qrels, write_run
from tron_cli.files import check_writable
from tron_cli.models.base import Model
from tron_cli.registry import REGISTERED, settings_of

SAMPLE_SEED = 42
TABLE_SUFFIXES = (".parquet", ".csv")
TIE_RULE = "items that score the same as the target count as ranked above it"

log = logging.getLogger("tron")


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `tron evaluate`; None means the checkpoint's or the dataset's own."""

    split: str = "test"
    protocol: str | None = None
    metrics: str | None = None
    filter_rated: bool | None = None
    full_sessions: bool = False
    one_pass: bool = False
    limit_sessions: int | None = None
    sample_sessions: int | None = None
    seed: int | None = None  # for sample_sessions; None: SAMPLE_SEED
    run: Path | None = None
    qrels: Path | None = None
    per_event: Path | None = None
    by: tuple[str, ...] = ()  # keys of slices.KINDS
    cutoff: int = 0  # length of the lists for the beyond-accuracy figures; 0: omit these
    drop_unknown: bool = False  # leave out events on items that the checkpoint does not know
    table_sharding: str = "none"  # rows: processes hold equal parts of the item tables


@dataclass(frozen=True)
class _Inputs:
    """Inputs of an evaluation, all read before ranking, which can take hours: files may change.

    number_S: int64 [S], numbers of the sessions in the split. session_ids, user_ids: original ids
    of all sessions of the split, and of their users. lost_S: from `Dataset.lost_of_sessions`.
    depth: length of the lists that a run file holds. train_counts: where the first process needs
    them.
    """

    checkpoint: Checkpoint
    model: Model | Baseline
    dataset: Dataset
    options: EvaluationOptions
    protocol: str
    filter_rated: bool
    value_of: dict[str, np.ndarray]
    depth: int
    sessions: Sessions
    number_S: np.ndarray
    session_ids: Ids
    user_ids: Ids
    lost_S: np.ndarray | None
    train_counts: ItemCounts | None


def assess(
    checkpoint: Checkpoint,
    dataset: Dataset,
    options: EvaluationOptions,
    device: torch.device,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Evaluate and return the report that `tron evaluate --json` prints.

    Each process ranks some of the events; the first writes the files, and all return its report.
    Raises InputError where checkpoint, dataset and options do not fit together.
    """
    inputs = _read(checkpoint, dataset, options, device, processes)
    predictions = predict(
        inputs.model,
        inputs.sessions,
        protocol=inputs.protocol,
        filter_rated=inputs.filter_rated,
        full_sessions=options.full_sessions,
        one_pass=options.one_pass,
        top_items=max(inputs.depth if options.run else 0, options.cutoff),
        rank_limit=None if options.per_event else inputs.depth,
        batch_size=checkpoint.config.eval_batch_size,
        progress=f"{options.split} split" if processes.is_first else None,
        share=processes.share,
    )
    predictions = of_all_processes(predictions, processes)

    def written() -> dict[str, Any]:
        _write_files(inputs, predictions)
        return _report(inputs, predictions)

    return processes.of_first(written)


def _read(
    checkpoint: Checkpoint,
    dataset: Dataset,
    options: EvaluationOptions,
    device: torch.device,
    processes: Processes,
) -> _Inputs:
    config = checkpoint.config
    protocol = options.protocol or dataset.protocol
    dataset = fitted(checkpoint, dataset, protocol, options)
    _check(options, checkpoint)
    measures = parse_measures(config.metrics if options.metrics is None else options.metrics)
    sessions, number_S = chosen_sessions(dataset, options)
    processes.of_first(lambda: _check_files(options))
    model = (
        divided_model(checkpoint, device, processes)
        if options.table_sharding == "rows" and processes.count > 1
        else checkpoint.build_model(device)
    )
    if options.one_pass and model.mask_item is not None:
        raise InputError(
            f"--one-pass does not apply to model={config.model}, which predicts from a mask after "
            "each history, so that one pass predicts one event; leave it out"
        )
    if options.one_pass and any(each.block == "bsarec" for each in checkpoint.configs):
        raise InputError(
            "--one-pass does not apply to block=bsarec, whose filter shows each event the later "
            "ones, which are to be predicted; leave it out"
        )
    with_counts = processes.is_first and (options.cutoff or "popularity" in options.by)
    return _Inputs(
        checkpoint=checkpoint,
        model=model,
        dataset=dataset,
        options=options,
        protocol=protocol,
        filter_rated=(
            config.filter_rated if options.filter_rated is None else options.filter_rated
        ),
        value_of=values_by_rank(measures),
        depth=max(config.recommendation_limit, *(measure["cutoff"] for measure in measures)),
        sessions=sessions,
        number_S=number_S,
        session_ids=dataset.session_ids(options.split),
        user_ids=dataset.user_ids(options.split),
        lost_S=dataset.lost_of_sessions(options.split),
        train_counts=train_item_counts(dataset) if with_counts else None,
    )


def _check_files(options: EvaluationOptions) -> None:
    for path in (options.run, options.qrels, options.per_event):
        if path:
            check_writable(path)


def _report(inputs: _Inputs, predictions: Predictions) -> dict[str, Any]:
    options = inputs.options
    report = coverage(
        inputs.dataset,
        options,
        inputs.sessions,
        predictions,
        protocol=inputs.protocol,
        filter_rated=inputs.filter_rated,
    )
    report = {
        "metrics": _metrics(inputs, predictions, report["left_out"]),
        "checkpoint": str(inputs.checkpoint.path),
        "positions": _positions(inputs.checkpoint.configs, options.one_pass),
        **report,
    }
    if inputs.checkpoint.origin:
        report["origin"] = inputs.checkpoint.origin
    if options.by:
        report["slices"] = _slices(inputs, predictions)
    if options.cutoff:
        report["cutoff"], report["beyond_accuracy"] = _beyond_accuracy(inputs, predictions)
    references = inputs.dataset.info.get("references", {}).get(options.split)
    whole_split = report["left_out"]["sessions_beyond_limit"] == 0
    is_same = whole_split and not any(report.get("catalogue", {}).values())
    if references and inputs.protocol == "every-step" and not inputs.filter_rated and is_same:
        report["references"] = references
    return report


def _metrics(
    inputs: _Inputs, predictions: Predictions, left_out: dict[str, int]
) -> dict[str, dict[str, float | None]]:
    """Return value and standard error of each measure.

    Where preparation lost predictions of the evaluated events, also those that count them as
    misses. Their standard error, clustered by session, is None where the dataset does not record
    which sessions lost them.
    """
    rank_E, session_E = predictions.rank_E, predictions.session_E
    metrics: dict[str, dict[str, float | None]] = {
        name: asdict(figure) for name, figure in figures(inputs.value_of, rank_E, session_E).items()
    }
    if not left_out["lost_predictions"] or left_out["earlier_events"]:
        return metrics
    lost_S = inputs.lost_S
    if lost_S is None:  # the mean does not depend on the session
        lost_S = np.array([left_out["lost_predictions"]])
    for name, figure in figures(inputs.value_of, rank_E, session_E, lost_S).items():
        known = inputs.lost_S is not None
        metrics[name]["value_with_lost_as_misses"] = figure.value
        metrics[name]["stderr_with_lost_as_misses"] = figure.stderr if known else None
    return metrics


def _slices(inputs: _Inputs, predictions: Predictions) -> dict[str, dict[str, Any]]:
    counts = inputs.train_counts
    events_I = None if counts is None else counts.events_I
    return {
        kind: {
            "definition": KINDS[kind],
            "slices": sliced_figures(kind, inputs.value_of, predictions, inputs.sessions, events_I),
        }
        for kind in inputs.options.by
    }


def _beyond_accuracy(inputs: _Inputs, predictions: Predictions) -> tuple[int, dict[str, Any]]:
    """Return the length of the lists, at most that of the catalogue, and their figures."""
    assert inputs.train_counts is not None
    assert predictions.top_EK is not None
    top_EK = predictions.top_EK[:, : inputs.options.cutoff]
    beyond = asdict(beyond_accuracy(top_EK, predictions.target_E, inputs.train_counts))
    del beyond["intersection"]  # there is no other model
    return top_EK.shape[1], beyond


def train_item_counts(dataset: Dataset) -> ItemCounts:
    """Return how often and beside which items each item occurs in training."""
    return count_items(dataset.checked_split("train"), dataset.num_items, progress="popularity")


def coverage(
    dataset: Dataset,
    options: EvaluationOptions,
    sessions: Sessions,
    predictions: Predictions,
    *,
    protocol: str,
    filter_rated: bool,
) -> dict[str, Any]:
    """Return a report's entries about the ranked events and those that were left out."""
    entries = {
        "protocol": protocol,
        "split": options.split,
        "dataset": dataset.name,
        "events": len(predictions.rank_E),
        "sessions": int(np.count_nonzero(np.bincount(predictions.session_E))),
        "items": dataset.num_items,
        "tie_rule": TIE_RULE,
        "filter_rated": filter_rated,
        "missed_because_filtered": int((predictions.rank_E == 0).sum()),
        "left_out": _left_out(dataset, options.split, protocol, sessions, len(predictions.rank_E)),
    }
    if isinstance(dataset, RenumberedDataset):
        entries["catalogue"] = _catalogue_entry(dataset)
    if options.sample_sessions is not None:
        entries["sample"] = _sample_entry(dataset, options)
    return entries


def fitted(
    checkpoint: Checkpoint, dataset: Dataset, protocol: str, options: EvaluationOptions
) -> Dataset:
    """Return the dataset with the item numbers of the checkpoint, matched by original id.

    Raises InputError where the checkpoint cannot be evaluated on the dataset under the protocol, or
    lacks items of the split without `drop_unknown`; warns of other training sessions.
    """
    if protocol == "every-step" and dataset.protocol == "last-item":
        raise InputError(
            f"{dataset.name} is leave-one-out data: the earlier events of its histories are "
            "training data, so every-step would score what the model was trained on; use "
            "--protocol last-item"
        )
    trained_on = checkpoint.dataset
    if trained_on["catalogue_fingerprint"] != dataset.catalogue_fingerprint:
        return _renumbered(checkpoint, dataset, protocol, options)
    trained_splits = [split for split in ("train", "val") if f"{split}_fingerprint" in trained_on]
    seen = {
        split: trained_on[f"{split}_fingerprint"] == dataset.split_info(split)["fingerprint"]
        for split in trained_splits
    }
    if seen.get(options.split):
        raise InputError(
            f"{checkpoint.path} is a final model, trained on the {options.split} split of "
            f"{dataset.path} too, so that figures on it would mean nothing; evaluate it on the test"
            " split, or evaluate the run that it came from"
        )
    if not all(seen.values()):
        log.warning(
            "%s was not trained on the training split of %s, but on other sessions",
            checkpoint.path,
            dataset.path,
        )
    return dataset


def _renumbered(
    checkpoint: Checkpoint, dataset: Dataset, protocol: str, options: EvaluationOptions
) -> RenumberedDataset:
    split = options.split
    found = RenumberedDataset(
        dataset, checkpoint.decoded_item_ids(), split=split, protocol=protocol
    )
    events = dataset.split_info(split)["events"]
    lacks = (
        f"{checkpoint.path} ({found.num_items:,} items, trained on {checkpoint.dataset['name']}) "
        f"lacks {counted(found.unknown_items, 'item')} of the {split} split of {dataset.path}, "
        f"{found.unknown_events:,} of its {counted(events, 'event')}"
    )
    if found.unknown_events and not found.predictions:
        raise InputError(
            f"{lacks}, and nothing is left to predict; expected data with the same item ids"
        )
    if found.unknown_events and not options.drop_unknown:
        raise InputError(
            f"{lacks}; pass --drop-unknown to leave them out and count them as lost, or prepare "
            "the data with --catalogue"
        )
    if found.unknown_events:
        log.warning("%s: they are left out", lacks)
    return found


def _catalogue_entry(dataset: RenumberedDataset) -> dict[str, int]:
    """Return the report's entry about a dataset with another catalogue than the checkpoint's.

    It counts the items that only one of them has and the events that are left out for that.
    """
    shared = int(np.count_nonzero(dataset.number_I))
    return {
        "only_in_checkpoint": dataset.num_items - shared,
        "only_in_dataset": len(dataset.number_I) - 1 - shared,
        "events_on_unknown_items": dataset.unknown_events,
    }


def chosen_sessions(dataset: Dataset, options: EvaluationOptions) -> tuple[Sessions, np.ndarray]:
    """Return the sessions to evaluate, and the number of each in the split, int64 [S].

    These are all sessions, the first limit_sessions, or a sample of sample_sessions without
    replacement, in the order of the split. Raises InputError if there are none or both are given.
    """
    if options.limit_sessions is not None and options.sample_sessions is not None:
        raise InputError(
            "--limit-sessions takes the first sessions and --sample-sessions a random sample; pass "
            "one of them"
        )
    if options.seed is not None and options.sample_sessions is None:
        raise InputError("--seed is the seed of --sample-sessions; pass both or neither")
    sessions = dataset.checked_split(options.split)
    if not len(sessions):
        raise InputError(
            f"the {options.split} split of {dataset.path} is empty; choose another "
            "--split, or prepare the dataset with one"
        )
    if options.sample_sessions is None:
        number_S = np.arange(len(sessions))[: options.limit_sessions]
        return Sessions(sessions.items, sessions.offsets[: len(number_S) + 1]), number_S
    count, seed = options.sample_sessions, SAMPLE_SEED if options.seed is None else options.seed
    if count >= len(sessions):
        return sessions, np.arange(len(sessions))
    number_S = np.sort(np.random.default_rng(seed).choice(len(sessions), count, replace=False))
    begin_S, end_S = sessions.offsets[number_S], sessions.offsets[number_S + 1]
    _, place_N = ranges(begin_S, end_S)
    offsets = np.concatenate([[0], np.cumsum(end_S - begin_S)])
    return Sessions(sessions.items[place_N], offsets), number_S


def _sample_entry(dataset: Dataset, options: EvaluationOptions) -> dict[str, int]:
    """Return the report's entry about a sample: its size, that of the split, and its seed."""
    assert options.sample_sessions is not None
    population = dataset.split_info(options.split)["sessions"]
    return {
        "sessions": min(options.sample_sessions, population),
        "of": population,
        "seed": SAMPLE_SEED if options.seed is None else options.seed,
    }


def _left_out(
    dataset: Dataset, split: str, protocol: str, sessions: Sessions, events: int
) -> dict[str, int]:
    """Count the events and sessions that the `events` predicted ones do not cover, by reason."""
    possible = int((sessions.lengths - 1).clip(min=0).sum())
    beyond_limit = len(dataset.split(split)) - len(sessions)
    # Preparation counted them for the dataset's own protocol, over whole sessions.
    lost = 0
    if beyond_limit == 0 and protocol == dataset.protocol:
        lost = dataset.split_info(split)["lost_predictions"]
    return {
        "earlier_events": possible - events if protocol == "every-step" else 0,
        "sessions_beyond_limit": beyond_limit,
        "lost_predictions": lost,
    }


def _check(options: EvaluationOptions, checkpoint: Checkpoint) -> None:
    files: dict[Path, str] = {checkpoint.path.resolve(): "the checkpoint"}
    for name in ("run", "qrels", "per_event"):
        path = getattr(options, name)
        if path is None:
            continue
        option = f"--{name.replace('_', '-')}"
        other = files.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{other} and {option} both name {path}; give each its own file")
    if options.per_event and options.per_event.suffix.lower() not in TABLE_SUFFIXES:
        raise InputError(
            f"--per-event must name a file that ends in {' or '.join(TABLE_SUFFIXES)}, "
            f"got {options.per_event}"
        )
    unknown = [kind for kind in options.by if kind not in KINDS]
    if unknown:
        raise InputError(f"--by must be one of {', '.join(KINDS)}, got {unknown[0]!r}")
    check_cutoff(options.cutoff)
    if options.table_sharding == "rows" and (options.run or options.cutoff):
        raise InputError(
            "--run and --cutoff list the best items, for which each process needs the whole item "
            "table; leave them out, or leave out --table-sharding"
        )
    if options.one_pass and options.full_sessions:
        raise InputError(
            "--one-pass covers the last sequence_length events of a session only; leave out "
            "--full-sessions"
        )


def _write_files(inputs: _Inputs, predictions: Predictions) -> None:
    """Write the requested files, with lists of up to `depth` items."""
    options, dataset = inputs.options, inputs.dataset
    top_EK = predictions.top_EK
    predictions = replace(
        predictions,
        session_E=inputs.number_S[predictions.session_E],
        top_EK=None if top_EK is None else top_EK[:, : inputs.depth],
    )
    if isinstance(dataset, RenumberedDataset):
        predictions = dataset.at_original_places(predictions)
    item_ids, session_ids, user_ids = dataset.item_ids, inputs.session_ids, inputs.user_ids
    named_by = user_ids if session_ids is None else session_ids
    if options.qrels:
        write_qrels(options.qrels, predictions, item_ids, named_by)
    if options.run:
        write_run(options.run, predictions, item_ids, named_by)
    if options.per_event:
        from tron_cli.evaluation.event_table import write_event_table  # loads polars

        write_event_table(options.per_event, predictions, item_ids, session_ids, user_ids)


def _positions(configs: Sequence[ExperimentConfig], one_pass: bool) -> str:
    entries = [REGISTERED["model"][config.model] for config in configs]
    settings = [
        settings_of(entry, config, num_items=0)
        for entry, config in zip(entries, configs, strict=True)
    ]
    positions = " and ".join(dict.fromkeys(each.get("positions", "none") for each in settings))
    if one_pass:
        return f"{positions}, one pass over the whole session"
    return f"{positions}, each event from its own history"
