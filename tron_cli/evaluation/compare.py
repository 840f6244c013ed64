"""Comparison of checkpoints on the same events: figures, paired differences, list properties.

A difference is taken event by event, so what makes an event hard or easy for both models cancels;
events of one session are not independent, so its standard error is clustered by session.

Shapes: E predicted events, K places of a recommendation list.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from tron_cli.checkpoint import Checkpoint
from tron_cli.data.catalogue import numbers_among
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.data.histories import Predictions
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.errors import InputError, counted
from tron_cli.evaluation.beyond_accuracy import ItemCounts, beyond_accuracy, check_cutoff
from tron_cli.evaluation.evaluate import (
    EvaluationOptions,
    chosen_sessions,
    coverage,
    fitted,
    train_item_counts,
)
from tron_cli.evaluation.metrics import (
    MAX_CUTOFF,
    clustered_stderr,
    figures,
    parse_measures,
    values_by_rank,
)
from tron_cli.evaluation.predict import of_all_processes, predict

CONFIDENCE = 0.95
INTERVALS = (
    "paired by event, clustered by session, Student's t with sessions - 1 degrees of freedom; "
    "each holds by itself: not adjusted for the number of models and measures"
)
# In simulations 95 % intervals contain the true difference in 92 to 93 % of cases with 20 to 50
# sessions of very unequal lengths, and in 94 to 95 % with 100 or more.
FEW_SESSIONS = 50

log = logging.getLogger("tron")


@dataclass(frozen=True)
class Difference:
    """Mean over events of a model's value minus the reference's, with its confidence interval.

    stderr, low and high are None for a single session, which says nothing about others.
    within_noise: True if the interval contains 0, None if there is no interval.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    within_noise: bool | None


def paired_difference(
    values_E: np.ndarray, reference_E: np.ndarray, session_E: np.ndarray
) -> Difference:
    """Return the mean difference of two models' values (float [E]) of the same events.

    session_E: int [E], session of each event. With G sessions the interval is the mean plus and
    minus the standard error (clustered by session, as metrics.score gives it) times the quantile of
    Student's t with G - 1 degrees of freedom: the standard error rests on G independent totals, and
    normal quantiles, which t approaches as G grows, would make the intervals of few sessions too
    narrow (Cameron and Miller, 2015, "A Practitioner's Guide to Cluster-Robust Inference").
    """
    difference_E = values_E - reference_E
    mean = float(difference_E.mean())
    stderr = clustered_stderr(difference_E, session_E, mean)
    if stderr is None:
        return Difference(mean, None, None, None, None)
    num_sessions = np.count_nonzero(np.bincount(session_E))
    half_width = float(stdtrit(num_sessions - 1, (1 + CONFIDENCE) / 2)) * stderr
    low, high = mean - half_width, mean + half_width
    return Difference(mean, stderr, low, high, low <= 0 <= high)


def compare(
    checkpoints: Sequence[Checkpoint],
    dataset: Dataset,
    options: EvaluationOptions,
    device: torch.device,
    *,
    reference: int = 0,
    cutoff: int | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Evaluate all checkpoints on the same events; return the report of `tron compare --json`.

    reference: index of the checkpoint that the others are compared with, from 0; measures and
    cutoff default to its own. cutoff: length of the lists for the beyond-accuracy figures; 0 omits
    these and saves the time to make the lists. Models are loaded one after the other, and of
    their predictions only those of the reference are kept. Each process ranks some of the events,
    and all return the report of the first.
    Raises InputError where the checkpoints cannot be compared on this dataset.
    """
    config = checkpoints[reference].config
    protocol = options.protocol or dataset.protocol
    depth = _list_length(checkpoints[reference], dataset, cutoff)
    numbers = [_numbers(checkpoint, checkpoints[reference]) for checkpoint in checkpoints]
    # Each dataset has the item numbers of its checkpoint; the report has the reference's.
    datasets = [fitted(checkpoint, dataset, protocol, options) for checkpoint in checkpoints]
    sessions, _ = chosen_sessions(datasets[reference], options)
    _check_same_events(checkpoints, reference, sessions, protocol, options.full_sessions)
    measures = parse_measures(config.metrics if options.metrics is None else options.metrics)
    values_of = values_by_rank(measures)
    filter_rated = _filter_rated(checkpoints, options)
    labels = short_labels([checkpoint.path for checkpoint in checkpoints])
    counts = train_item_counts(datasets[reference]) if depth and processes.is_first else None

    models: dict[str, dict[str, Any]] = {label: {} for label in labels}
    of_reference: Predictions | None = None
    for place in sorted(range(len(checkpoints)), key=lambda place: place != reference):
        predictions = predict(
            checkpoints[place].build_model(device),
            chosen_sessions(datasets[place], options)[0],
            protocol=protocol,
            filter_rated=filter_rated,
            full_sessions=options.full_sessions,
            top_items=depth,
            rank_limit=max(depth, *(measure["cutoff"] for measure in measures)),
            batch_size=checkpoints[place].config.eval_batch_size,
            progress=labels[place] if processes.is_first else None,
            share=processes.share,
        )
        predictions = of_all_processes(_renumbered(predictions, numbers[place]), processes)
        if processes.is_first:
            models[labels[place]] = {
                "checkpoint": str(checkpoints[place].path),
                **_figures(predictions, of_reference, values_of, counts),
            }
            of_reference = of_reference or predictions
        del predictions  # free the memory before the next model's arrive

    def report() -> dict[str, Any]:
        assert of_reference is not None
        covered = coverage(
            datasets[reference],
            options,
            sessions,
            of_reference,
            protocol=protocol,
            filter_rated=filter_rated,
        )
        return _report(models, labels[reference], depth, covered)

    return processes.of_first(report)


def _report(
    models: dict[str, dict[str, Any]], reference: str, depth: int, covered: dict[str, Any]
) -> dict[str, Any]:
    if covered["sessions"] < FEW_SESSIONS:
        log.warning(
            "only %d sessions: the intervals are too narrow if sessions differ much in length",
            covered["sessions"],
        )
    return {
        "models": models,
        "reference": reference,
        "confidence": CONFIDENCE,
        "intervals": INTERVALS,
        "cutoff": depth,
        **covered,
    }


def _list_length(reference: Checkpoint, dataset: Dataset, cutoff: int | None) -> int:
    if cutoff is not None:
        check_cutoff(cutoff)
    limit = reference.config.recommendation_limit
    length = min(limit if cutoff is None else cutoff, dataset.num_items)
    if length > MAX_CUTOFF:
        raise InputError(
            f"{reference.path} has recommendation_limit={limit}: pass --cutoff, from 0 to "
            f"{MAX_CUTOFF}, for shorter lists"
        )
    return length


def _renumbered(predictions: Predictions, number_I: np.ndarray | None) -> Predictions:
    """Return predictions with the item numbers that `_numbers` gives."""
    if number_I is None:
        return predictions
    top_EK = predictions.top_EK
    return replace(
        predictions,
        target_E=number_I[predictions.target_E],
        top_EK=None if top_EK is None else number_I[top_EK],
    )


def _figures(
    predictions: Predictions,
    of_reference: Predictions | None,
    values_of: dict[str, np.ndarray],
    counts: ItemCounts | None,
) -> dict[str, Any]:
    """Return a model's entries in the report; those of the reference itself without differences.

    counts: of the training split; None omits the beyond-accuracy figures.
    """
    found = figures(values_of, predictions.rank_E, predictions.session_E)
    entries: dict[str, Any] = {"metrics": {name: asdict(figure) for name, figure in found.items()}}
    if of_reference is not None:
        entries["differences"] = _differences(predictions, of_reference, values_of)
    if counts is not None:
        assert predictions.top_EK is not None
        reference_EK = None if of_reference is None else of_reference.top_EK
        entries["beyond_accuracy"] = asdict(
            beyond_accuracy(predictions.top_EK, predictions.target_E, counts, reference_EK)
        )
    return entries


def _numbers(checkpoint: Checkpoint, reference: Checkpoint) -> np.ndarray | None:
    """Return the reference's number of each item of a checkpoint, int32 [I + 1]; None if all agree.

    Raises InputError where the two do not have the same items.
    """
    if len({each.dataset["catalogue_fingerprint"] for each in (checkpoint, reference)}) == 1:
        return None
    known = reference.decoded_item_ids()
    numbers = numbers_among(known, checkpoint.decoded_item_ids())
    shared = int(np.count_nonzero(numbers))
    alone = len(known) + len(numbers) - 2 * shared
    if alone:
        raise InputError(
            f"{checkpoint.path} and {reference.path} rank different catalogues, with "
            f"{counted(alone, 'item')} in only one of them; compare models of the same items"
        )
    return np.append(np.int32(0), numbers)


def check_choice(checkpoints: int, reference: int) -> None:
    """Raise InputError for fewer than two checkpoints, or a reference (from 1) out of range."""
    if checkpoints < 2:
        raise InputError(f"expected at least two checkpoints to compare, got {checkpoints}")
    if not 1 <= reference <= checkpoints:
        raise InputError(
            f"--reference is a checkpoint's number: expected 1 to {checkpoints}, got {reference}"
        )


def short_labels(paths: Sequence[Path]) -> list[str]:
    """Return a short, distinct label for each checkpoint.

    Labels come from the name of the run folder, or of the file if it is in no run folder. After the
    first word, words between dashes that all names share are left out. Equal names are preceded by
    the names of their folders.
    """
    above = 0
    names = [_name(path, above) for path in paths]
    while len(set(names)) < len(names) and above < max(len(path.parts) for path in paths):
        above += 1
        names = [_name(path, above) for path in paths]
    words = [re.split("[-/]", name) for name in names]
    shared = set.intersection(*map(set, words))
    short = ["-".join([row[0], *(word for word in row[1:] if word not in shared)]) for row in words]
    labels = short if len(set(short)) == len(short) else names
    if len(set(labels)) < len(labels):  # the same file twice
        labels = [f"{place}:{label}" for place, label in enumerate(labels, start=1)]
    return labels


def _name(path: Path, above: int) -> str:
    """Return the name of a checkpoint's run or file, preceded by those of `above` parents."""
    named = path.parent if (path.parent / "config.json").exists() else path.with_suffix("")
    return "/".join(named.absolute().parts[1:][-1 - above :])


def _check_same_events(
    checkpoints: Sequence[Checkpoint],
    reference: int,
    sessions: Sessions,
    protocol: str,
    full_sessions: bool,
) -> None:
    if protocol == "last-item" or full_sessions:
        return
    most = int(sessions.lengths.max()) - 1
    base = checkpoints[reference]
    for checkpoint in checkpoints:
        window, expected = checkpoint.config.sequence_length, base.config.sequence_length
        if min(window, most) != min(expected, most):
            raise InputError(
                f"{checkpoint.path} predicts the last {window} events of a session "
                f"(its sequence_length), {base.path} the last {expected}: these are not the same "
                "events; add --full-sessions, with which all of them predict every event"
            )


def _filter_rated(checkpoints: Sequence[Checkpoint], options: EvaluationOptions) -> bool:
    if options.filter_rated is not None:
        return options.filter_rated
    first = checkpoints[0]
    for checkpoint in checkpoints:
        if checkpoint.config.filter_rated != first.config.filter_rated:
            raise InputError(
                f"{first.path} has filter_rated={first.config.filter_rated}, {checkpoint.path} "
                f"filter_rated={checkpoint.config.filter_rated}; pass --filter-rated or "
                "--no-filter-rated for all of them"
            )
    return first.config.filter_rated


def _differences(
    predictions: Predictions, of_reference: Predictions, values_of: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return the paired difference of each measure; ranks beyond its values by rank are misses."""
    # Entries are paired by position, so they must be the same events.
    assert np.array_equal(predictions.session_E, of_reference.session_E)
    assert np.array_equal(predictions.event_E, of_reference.event_E)
    differences = {}
    for name, value_of in values_of.items():
        depth = len(value_of) - 1
        values_E, reference_E = (
            value_of[np.where(rank_E > depth, 0, rank_E)]
            for rank_E in (predictions.rank_E, of_reference.rank_E)
        )
        differences[name] = asdict(paired_difference(values_E, reference_E, predictions.session_E))
    return differences
