"""RecTools' beyond-accuracy figures: properties of the recommended lists.

Formulas: RecTools (github.com/MobileTeleSystems/RecTools), rectools/metrics. A "user" with a list
there is a predicted event here; a user of the previous interactions is a training session.

Shapes: E predicted events (e of them at a time), K places of a list, P distinct (session, item)
pairs, I items; arrays _I have I + 1 entries, of which entry 0 belongs to no item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import distinct_pairs
from tron_cli.errors import InputError
from tron_cli.evaluation.metrics import MAX_CUTOFF

_EVENTS_AT_ONCE = 1 << 22  # of the training split
_PLACES_AT_ONCE = 1 << 20  # of the lists


@dataclass(frozen=True)
class ItemCounts:
    """Counts of each item in training.

    events_I: int64 [I + 1], events of the item. sessions_I: int64 [I + 1], sessions that contain
    it. num_sessions: sessions with at least one event.
    """

    events_I: np.ndarray
    sessions_I: np.ndarray
    num_sessions: int


@dataclass(frozen=True)
class BeyondAccuracy:
    """Figures of lists of up to K items each; means are over the lists that are not empty.

    A figure is None if there is no such list, or (intersection) no reference.

    catalogue_coverage: share of the catalogue that is in some list (CatalogCoverage,
        normalized).
    average_popularity: mean over lists of the mean number of training events of their items
        (AvgRecPopularity).
    novelty: mean over lists of the mean of -log2(sessions(i) / sessions), in bits, where
        sessions(i) training sessions contain item i; an item in none counts as in one
        (MeanInvUserFreq).
    serendipity: mean over lists of sum_i max(p(i) - pu(i), 0) rel(i) / length of the list, with
        p(i) = (I + 1 - place of i) / I, pu(i) = (I + 1 - popularity rank of i) / I and rel(i) = 1
        for the target, else 0. Items with equally many training events share a popularity rank,
        ranks have no gaps, and pu is 0 for an item that never occurs in training (Serendipity).
    intersection: mean over lists of the share of their items that the reference's list for the
        same event also holds (Intersection, both at K).
    """

    catalogue_coverage: float
    average_popularity: float | None
    novelty: float | None
    serendipity: float | None
    intersection: float | None


def count_items(train: Sessions, num_items: int, *, progress: str | None = None) -> ItemCounts:
    """Count events and sessions of each item of the training split."""
    events_I = np.zeros(num_items + 1, dtype=np.int64)
    sessions_I = np.zeros(num_items + 1, dtype=np.int64)
    bar = tqdm(
        total=len(train.items),
        desc=progress,
        unit=" events",
        unit_scale=True,
        disable=None if progress else True,
    )
    first = 0
    while first < len(train):
        after = int(np.searchsorted(train.offsets, train.offsets[first] + _EVENTS_AT_ONCE, "right"))
        after = min(max(after - 1, first + 1), len(train))
        low, high = int(train.offsets[first]), int(train.offsets[after])
        item_N = train.items[low:high].astype(np.int64)
        session_N = np.repeat(np.arange(after - first), np.diff(train.offsets[first : after + 1]))
        events_I += np.bincount(item_N, minlength=num_items + 1)
        _, item_P = distinct_pairs(session_N, item_N)
        sessions_I += np.bincount(item_P, minlength=num_items + 1)
        bar.update(high - low)
        first = after
    bar.close()
    return ItemCounts(events_I, sessions_I, int(np.count_nonzero(train.lengths)))


def check_cutoff(cutoff: int) -> None:
    """Raise InputError if lists of this length are not supported."""
    if not 0 <= cutoff <= MAX_CUTOFF:
        raise InputError(f"--cutoff must be from 0 to {MAX_CUTOFF}, got {cutoff}")


def beyond_accuracy(
    top_EK: np.ndarray,
    target_E: np.ndarray,
    counts: ItemCounts,
    reference_EK: np.ndarray | None = None,
) -> BeyondAccuracy:
    """Compute the figures of lists top_EK: int [E, K] item ids, best first, 0 where none are left.

    target_E: int [E], the item that followed. reference_EK: another model's lists for the same
    events, with the same K.
    """
    num_events, depth = top_EK.shape
    num_items = len(counts.events_I) - 1
    novelty_I = -np.log2(np.maximum(counts.sessions_I, 1) / counts.num_sessions)
    novelty_I[0] = 0.0
    anybody_I = _chance_for_anybody(counts.events_I)
    chance_K = (num_items - np.arange(depth)) / num_items
    recommended_I = np.zeros(num_items + 1, dtype=bool)
    popularity = novelty = serendipity = intersection = 0.0
    lists = 0
    rows = max(1, _PLACES_AT_ONCE // depth)
    for low in range(0, num_events, rows):
        part = low + np.flatnonzero(top_EK[low : low + rows, 0])  # lists that are not empty
        top_eK = top_EK[part]
        recommended_I[top_eK] = True
        length_e = np.count_nonzero(top_eK, axis=1)
        lists += len(part)
        # Item 0 is no item and adds nothing.
        popularity += (counts.events_I[top_eK].sum(axis=1) / length_e).sum()
        novelty += (novelty_I[top_eK].sum(axis=1) / length_e).sum()
        target_e = target_E[part]
        surprise_eK = np.maximum(chance_K - anybody_I[target_e, None], 0.0)
        relevant_eK = top_eK == target_e[:, None]
        serendipity += ((surprise_eK * relevant_eK).sum(axis=1) / length_e).sum()
        if reference_EK is not None:
            intersection += (_in_common(top_eK, reference_EK[part]) / length_e).sum()

    def mean(total: float) -> float | None:
        return float(total) / lists if lists else None

    return BeyondAccuracy(
        catalogue_coverage=int(np.count_nonzero(recommended_I[1:])) / num_items,
        average_popularity=mean(popularity),
        novelty=mean(novelty),
        serendipity=mean(serendipity),
        intersection=None if reference_EK is None else mean(intersection),
    )


def _chance_for_anybody(events_I: np.ndarray) -> np.ndarray:
    """Return (I + 1 - popularity rank) / I, or 0 for items without an event, float64 [I + 1]."""
    num_items = len(events_I) - 1
    values, place_I = np.unique(events_I, return_inverse=True)
    rank_I = len(values) - place_I  # 1: the most events
    return np.where(events_I > 0, (num_items + 1 - rank_I) / num_items, 0.0)


def _in_common(left_eK: np.ndarray, right_eK: np.ndarray) -> np.ndarray:
    """Count the items in both lists, int64 [e]. A list holds an item at most once."""
    both = np.sort(np.concatenate([left_eK, right_eK], axis=1), axis=1)
    return np.count_nonzero((both[:, 1:] == both[:, :-1]) & (both[:, 1:] > 0), axis=1)
