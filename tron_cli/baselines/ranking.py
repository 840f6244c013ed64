"""Exact ranks of targets among a few scored items and all others, without a score matrix.

A baseline scores some items of an event, its candidates. Candidates are ordered by score, then by
how often they occur in training; all other items follow, ordered by occurrence alone. Items equal
in both are ties, which count against the target as everywhere in this project.

Shapes: E events, C candidates of all events, P excluded (event, item) pairs, I items, K places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """Scored items of each event: those of event e are offsets[e] to offsets[e + 1] - 1.

    offsets: int64 [E + 1]. item_C: int64, distinct items per event. score_C: float64, finite.
    """

    offsets: np.ndarray
    item_C: np.ndarray
    score_C: np.ndarray

    @property
    def event_C(self) -> np.ndarray:
        """Event of each candidate, int64 [C]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def where(self, keep_C: np.ndarray) -> Candidates:
        """Keep the candidates for which keep_C is true."""
        kept_before = np.concatenate(([0], np.cumsum(keep_C)))
        return Candidates(kept_before[self.offsets], self.item_C[keep_C], self.score_C[keep_C])


@dataclass(frozen=True)
class Excluded:
    """Items that may not be recommended: item_P of event_P, int64, each pair once, sorted."""

    event_P: np.ndarray
    item_P: np.ndarray


class Popularity:
    """Occurrences of each item in training. count: int64 [I + 1], entry 0 is no item."""

    def __init__(self, count: np.ndarray) -> None:
        self.count = count
        items_with = np.bincount(count[1:])
        # Entry c is the number of items that occur at least c times.
        self.at_least = items_with[::-1].cumsum()[::-1]
        # int64 [I]: items by popularity, equals by ascending id.
        self.order = np.argsort(-count[1:], kind="stable") + 1

    @property
    def num_items(self) -> int:
        return len(self.count) - 1


class Eligible:
    """Items to which all recommendations are restricted.

    is_eligible_I: bool [I + 1]. order: int64, these items by popularity, equals by ascending id.
    """

    def __init__(self, is_eligible_I: np.ndarray, popularity: Popularity) -> None:
        self.is_eligible_I = is_eligible_I
        self.order = popularity.order[is_eligible_I[popularity.order]]


def rank_targets(
    candidates: Candidates,
    target_E: np.ndarray,
    popularity: Popularity,
    excluded: Excluded | None = None,
) -> np.ndarray:
    """Return 1 + the number of other eligible items at least as good, int64 [E]; 0 if excluded."""
    count, event_C = popularity.count, candidates.event_C
    if excluded is not None:
        candidates = candidates.where(~_is_excluded(candidates, excluded, popularity.num_items))
        event_C = candidates.event_C
    is_target_C = candidates.item_C == target_E[event_C]
    score_E = np.full(len(target_E), -np.inf)  # stays so if the target is no candidate
    score_E[event_C[is_target_C]] = candidates.score_C[is_target_C]
    wanted_E = count[target_E]
    popular_C = count[candidates.item_C] >= wanted_E[event_C]
    lead_C = candidates.score_C - score_E[event_C]
    ahead_C = (lead_C > 0) | ((lead_C == 0) & popular_C)
    # A target among the candidates has counted itself. Otherwise all candidates are ahead, and so
    # are the other items that are at least as popular.
    rank_E = _sums(ahead_C, candidates.offsets)
    others_E = popularity.at_least[wanted_E] - _sums(popular_C, candidates.offsets)
    missed_E = np.zeros(len(target_E), dtype=bool)
    if excluded is not None:
        popular_P = count[excluded.item_P] >= wanted_E[excluded.event_P]
        others_E -= np.bincount(excluded.event_P[popular_P], minlength=len(target_E))
        missed_E[excluded.event_P[excluded.item_P == target_E[excluded.event_P]]] = True
    rank_E += np.where(np.isneginf(score_E), others_E, 0)
    rank_E[missed_E] = 0
    return rank_E


def best_items(
    candidates: Candidates,
    limit: int,
    popularity: Popularity,
    excluded: Excluded | None = None,
    eligible: Eligible | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best items and their scores: int64 and float64 [E, limit], 0 if none are left.

    In the order of `rank_targets`; ties are ordered by item id. Items that follow by popularity
    alone have a score of 0.
    """
    if excluded is not None:
        candidates = candidates.where(~_is_excluded(candidates, excluded, popularity.num_items))
    if eligible is not None:
        candidates = candidates.where(eligible.is_eligible_I[candidates.item_C])
    event_C, item_C = candidates.event_C, candidates.item_C
    order = np.lexsort((item_C, -popularity.count[item_C], -candidates.score_C, event_C))
    place_C = np.arange(len(item_C)) - candidates.offsets[event_C]
    top_EK = np.zeros((len(candidates.offsets) - 1, limit), dtype=np.int64)
    score_EK = np.zeros(top_EK.shape)
    shown = place_C < limit
    top_EK[event_C[shown], place_C[shown]] = item_C[order[shown]]
    score_EK[event_C[shown], place_C[shown]] = candidates.score_C[order[shown]]
    _fill_up(top_EK, candidates, popularity, excluded, eligible)
    return top_EK, score_EK


def best_with_targets(
    candidates: Candidates,
    target_E: np.ndarray,
    rank_E: np.ndarray,
    limit: int,
    popularity: Popularity,
    excluded: Excluded | None = None,
) -> np.ndarray:
    """Return the best items, int64 [E, limit], with the target last among its ties, at its rank."""
    width = popularity.num_items + 1
    barred = np.arange(len(target_E)) * width + target_E
    if excluded is not None:
        barred = np.union1d(barred, excluded.event_P * width + excluded.item_P)
    top_EK, _ = best_items(candidates, limit, popularity, Excluded(*np.divmod(barred, width)))
    # All other items are in order; insert the target at its rank.
    place_E1 = rank_E[:, None] - 1
    column_K = np.arange(limit)
    after = (column_K > place_E1) & (place_E1 >= 0)
    top_EK[:, 1:] = np.where(after[:, 1:], top_EK[:, :-1], top_EK[:, 1:])
    return np.where(column_K == place_E1, target_E[:, None], top_EK)


def _fill_up(
    top_EK: np.ndarray,
    candidates: Candidates,
    popularity: Popularity,
    excluded: Excluded | None,
    eligible: Eligible | None,
) -> None:
    """Append the most popular other items where there are too few candidates."""
    width, limit = len(popularity.count), top_EK.shape[1]
    taken_E = np.diff(candidates.offsets)
    event_R = np.flatnonzero(taken_E < limit)
    # Items that may not be appended: candidates and excluded items.
    keys = [candidates.event_C * width + candidates.item_C]
    most_excluded = 0
    if excluded is not None and len(excluded.event_P):
        keys.append(excluded.event_P * width + excluded.item_P)
        most_excluded = int(np.bincount(excluded.event_P).max())
    order = popularity.order if eligible is None else eligible.order
    pool = order[: limit + most_excluded]
    barred = np.sort(np.concatenate(keys))
    free_RM = ~_contains(barred, event_R[:, None] * width + pool)
    place_RM = np.cumsum(free_RM, axis=1) - 1 + taken_E[event_R, None]
    row, column = np.nonzero(free_RM & (place_RM < limit))
    top_EK[event_R[row], place_RM[row, column]] = pool[column]


def _is_excluded(candidates: Candidates, excluded: Excluded, num_items: int) -> np.ndarray:
    width = num_items + 1
    return _contains(
        excluded.event_P * width + excluded.item_P, candidates.event_C * width + candidates.item_C
    )


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return where an entry of `keys` is among the sorted keys."""
    if not len(sorted_keys):
        return np.zeros(keys.shape, dtype=bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[at] == keys


def _sums(is_so_C: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Count the candidates of each event where `is_so_C` is true, int64 [E]."""
    before = np.concatenate(([0], np.cumsum(is_so_C)))
    return before[offsets[1:]] - before[offsets[:-1]]
