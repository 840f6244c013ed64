"""Base classes of the baselines: fit on sessions, keep arrays, rank the items that followed.

Shapes: E events, I items, K places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from tron_cli.baselines.ranking import (
    Candidates,
    Eligible,
    Excluded,
    Popularity,
    best_items,
    best_with_targets,
    rank_targets,
)
from tron_cli.data.dataset import Sessions, count_events
from tron_cli.data.histories import Histories
from tron_cli.errors import InputError


class Baseline(ABC):
    """Method without gradients. Items are 1..num_items, histories up to sequence_length events.

    An instance can rank only after `fit` or `load_state_dict`.
    """

    is_baseline = True
    popularity: Popularity
    mask_item: None = None  # a network may have one; see models/base.py
    has_similar_items = False  # True if `best` after a history of one item lists similar ones

    def __init__(self, *, num_items: int, sequence_length: int) -> None:
        self.num_items = num_items
        self.sequence_length = sequence_length

    def fit(self, sessions: Sessions) -> None:
        """Fit to training sessions, which are in order of their start."""
        # `items` may hold more events than these sessions, if they are the first of a split.
        sessions = Sessions(sessions.items[: sessions.offsets[-1]], sessions.offsets)
        count_I = count_events(sessions, self.num_items)
        self.load_state_dict({"popularity": count_I, **self.learn(sessions)})

    def learn(self, sessions: Sessions) -> dict[str, np.ndarray]:
        """Return the arrays that `load_state_dict` needs besides the popularity of the items."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Load the arrays that `state_dict` returned."""
        self._state = state
        self.popularity = Popularity(state["popularity"])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything learned, by name. popularity: int64 [I + 1], events of each item."""
        return self._state

    @abstractmethod
    def work(self, histories: Histories) -> np.ndarray:
        """Estimate the array elements needed to rank each event, int64 [E], to limit memory."""

    @abstractmethod
    def rank(
        self, histories: Histories, *, excluded: Excluded | None, top_items: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the rank of each target, int64 [E], and the best items, int64 [E, top_items].

        The items are None if top_items is 0. Ties count against the target; an excluded target has
        rank 0.
        """

    def best(
        self,
        histories: Histories,
        *,
        excluded: Excluded | None,
        limit: int,
        eligible: Eligible | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the items to recommend after each history and their scores, best first.

        int64 and float64 [E, limit], 0 where none are left. In the order of `rank`, ties by
        ascending item id; targets are not read. eligible: only these items. Raises InputError for a
        baseline from outside the package that does not define it.
        """
        raise InputError(
            f"{type(self).__name__} can be evaluated, but recommends nothing: it does not define "
            "the method `best`; derive it from SparseBaseline, or add that method"
        )


class SparseBaseline(Baseline):
    """Baseline that scores only a few items per event."""

    @abstractmethod
    def candidates(self, histories: Histories) -> Candidates:
        """Return the scored items of each history; all others are ordered by popularity."""

    def rank(
        self, histories: Histories, *, excluded: Excluded | None, top_items: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        candidates, target_E = self.candidates(histories), histories.target_E
        rank_E = rank_targets(candidates, target_E, self.popularity, excluded)
        if not top_items:
            return rank_E, None
        return rank_E, best_with_targets(
            candidates, target_E, rank_E, top_items, self.popularity, excluded
        )

    def best(
        self,
        histories: Histories,
        *,
        excluded: Excluded | None,
        limit: int,
        eligible: Eligible | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        return best_items(self.candidates(histories), limit, self.popularity, excluded, eligible)
