"""Figures from ranks: ir-measures' own numbers, with standard errors clustered by session.

With one relevant item per prediction a measure depends on the rank of that item alone. So
ir-measures scores one synthetic query per rank 1..K (K = the largest cutoff) and one miss, and the
figure is the mean of those values over the histogram of ranks: exactly ir-measures' figure, at any
size.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np
from ir_measures import Measure, Qrel, ScoredDoc

from tron_cli.errors import InputError

# The synthetic queries hold cutoff^2 documents, which takes a second at this depth.
MAX_CUTOFF = 1000

# Common names for recall with one relevant item that ir-measures does not know.
_RECALL_NAMES = {"hit", "hits", "hitrate", "hitratio", "hr"}


@dataclass(frozen=True)
class Figure:
    """Mean over events and its standard error, clustered by session (None for one session)."""

    value: float
    stderr: float | None


def parse_measures(names: Sequence[str] | str) -> list[Measure]:
    """Parse "R@20 RR@20 nDCG@10", "R@20,RR@20" or a list of names; keep each measure once.

    Any ir-measures measure with a cutoff that the rank of one relevant item determines is accepted.
    Raises InputError, with a suggestion, for anything else.
    """
    # Do not split at a comma between the parameters of a measure.
    words = re.split(r"[\s,]+(?![^(]*\))", names) if isinstance(names, str) else list(names)
    words = [word for word in words if word]
    if not words:
        raise InputError("no measure given: expected names such as R@20 RR@20 nDCG@10")
    return list(dict.fromkeys(_parse_measure(word) for word in words))


def score(
    ranks: np.ndarray, sessions: np.ndarray, measures: Sequence[Measure]
) -> dict[str, Figure]:
    """Return the mean of each measure over all events, by its name in ir-measures.

    measures: from `parse_measures`. ranks, sessions and errors are those of `figures`.
    """
    return figures(values_by_rank(measures), ranks, sessions)


def values_by_rank(measures: Sequence[Measure]) -> dict[str, np.ndarray]:
    """Compute each measure for a target of rank 0 (a miss), 1, ..., the largest cutoff.

    Returns float64 [largest cutoff + 1] by name of the measure.
    """
    depth = max(measure["cutoff"] for measure in measures)
    return values_of_ranks(measures, range(depth + 1), depth)


def figures(
    value_of: dict[str, np.ndarray],
    ranks: np.ndarray,
    sessions: np.ndarray,
    lost: np.ndarray | None = None,
) -> dict[str, Figure]:
    """Return the mean of each measure over events; ranks beyond its values by rank are misses.

    value_of: from `values_by_rank`. ranks: int [N], 1 = best, 0 = a miss in every measure.
    sessions: int [N], index of the session of each event, in any order.
    lost: int [G], further events of each session, all misses; a session may have no others.

    The standard error treats the sessions as the independent sample: with G sessions of n_s events
    that sum to y_s, and mean m over N events, it is sqrt(G/(G-1) * sum_s (y_s - n_s*m)^2) / N.
    Raises InputError where there is no event to average over.
    """
    assert ranks.shape == sessions.shape
    if len(ranks) == 0:
        raise InputError("there is no event to score: the split holds no session with a prediction")
    if lost is not None:
        ranks = np.concatenate([ranks, np.zeros(lost.sum(), dtype=ranks.dtype)])
        sessions = np.concatenate([sessions, np.repeat(np.arange(len(lost)), lost)])
    found = {}
    for name, values in value_of.items():
        shown = np.where(ranks < len(values), ranks, 0)
        mean = float(np.bincount(shown, minlength=len(values)) @ values) / len(ranks)
        found[name] = Figure(mean, clustered_stderr(values[shown], sessions, mean))
    return found


def clustered_stderr(values: np.ndarray, sessions: np.ndarray, mean: float) -> float | None:
    """Return the standard error of a mean of values (float [N]), clustered by session.

    sessions: int [N], index of the session of each value. `figures` states the formula. None for a
    single session.
    """
    events_of_session = np.bincount(sessions)
    num_sessions = np.count_nonzero(events_of_session)
    if num_sessions < 2:
        return None
    totals = np.bincount(sessions, weights=values)
    squares = np.square(totals - events_of_session * mean).sum()
    return float(np.sqrt(num_sessions / (num_sessions - 1) * squares)) / len(values)


def values_of_ranks(
    measures: Sequence[Measure], ranks: Sequence[int], depth: int
) -> dict[str, np.ndarray]:
    """Score one synthetic query per rank with ir-measures.

    Its list of `depth` items has the target at that rank, or nowhere for rank 0. Returns float64
    [len(ranks)] by name of the measure. Raises KeyError if a measure has no value for some query.
    """

    def documents() -> Iterator[ScoredDoc]:
        for rank in ranks:
            for place in range(1, depth + 1):
                item = "target" if place == rank else str(place)
                yield ScoredDoc(str(rank), item, float(depth - place))

    relevant = [Qrel(str(rank), "target", 1) for rank in ranks]
    value_of = {
        (str(metric.measure), metric.query_id): metric.value
        for metric in ir_measures.iter_calc(measures, relevant, documents())
    }
    return {
        str(measure): np.array([value_of[str(measure), str(rank)] for rank in ranks])
        for measure in measures
    }


def _parse_measure(word: str) -> Measure:
    try:
        measure = ir_measures.parse_measure(word)
    except NameError as error:
        raise InputError(f"unknown measure {word!r}; {_suggestion(word)}") from error
    except ValueError as error:
        raise InputError(
            f"{word!r} is not a measure: expected NAME@CUTOFF, several of them separated by "
            "spaces, such as R@20 RR@20 nDCG@10"
        ) from error
    if "cutoff" not in measure.SUPPORTED_PARAMS:
        raise InputError(f"{word!r} takes no cutoff and is not supported; try R@20 or nDCG@10")
    if "cutoff" not in measure.params:
        raise InputError(f"the measure {word!r} needs a cutoff, such as {word}@20")
    cutoff = measure["cutoff"]
    if type(cutoff) is not int or not 1 <= cutoff <= MAX_CUTOFF:
        raise InputError(
            f"the cutoff of {word!r} must be a whole number from 1 to {MAX_CUTOFF}, "
            f"such as {word.rpartition('@')[0]}@20"
        )
    try:
        measure.validate_params()
        # Some measures, such as Accuracy, are undefined for a miss; figures need every event.
        (values,) = values_of_ranks([measure], [0, 1, cutoff + 1], cutoff + 1).values()
    except (AssertionError, TypeError, ValueError, KeyError, subprocess.SubprocessError) as error:
        raise InputError(
            f"ir-measures cannot compute {word!r} from the rank of one relevant item; "
            "try R@20, RR@20 or nDCG@10"
        ) from error
    miss, first, beyond = values
    if first == miss:
        raise InputError(
            f"{word!r} is {miss:g} wherever the target stands: a target has relevance 1 and no "
            f"item has another; try {measure.NAME}@{cutoff} without parameters, R@20 or nDCG@10"
        )
    if beyond != miss:
        raise InputError(
            f"{word!r} counts items beyond its cutoff of {cutoff}; try {measure.NAME}@{cutoff} "
            "without parameters, R@20 or nDCG@10"
        )
    return measure


def _suggestion(word: str) -> str:
    name, _, cutoff = word.partition("@")
    known = {alias.lower(): kind.NAME for alias, kind in ir_measures.measures.registry.items()}
    if name.lower().replace("_", "") in _RECALL_NAMES:
        close = "R"
    else:
        matches = difflib.get_close_matches(name.lower(), known, n=1)
        close = known[matches[0]] if matches else "R"
    return f"did you mean {close}@{cutoff or 20}?"
