"""What all baselines have in common: fit on sessions, keep arrays, rank the items that followed.

Shapes: E events, I items, K places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from tron_cli.baselines.ranking import Candidates, Excluded, Popularity, best_items, rank_targets
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import Histories


class Baseline(ABC):
    """A method without gradients. Items are 1..num_items; histories hold sequence_length events.

    An instance knows nothing before `fit` or `load_state_dict`.
    """

    is_baseline = True
    popularity: Popularity
    mask_item: None = None  # as a network may have; see models/base.py

    def __init__(self, *, num_items: int, sequence_length: int) -> None:
        self.num_items = num_items
        self.sequence_length = sequence_length

    def fit(self, sessions: Sessions) -> None:
        """Learn from training sessions in order of their start."""
        # The items may go on where only the first sessions of a split are given.
        sessions = Sessions(sessions.items[: sessions.offsets[-1]], sessions.offsets)
        count = np.bincount(sessions.items, minlength=self.num_items + 1)
        self.load_state_dict({"popularity": count, **self.learn(sessions)})

    def learn(self, sessions: Sessions) -> dict[str, np.ndarray]:
        """Return the arrays that `load_state_dict` needs beside the items' popularity."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state_dict` returned."""
        self._state = state
        self.popularity = Popularity(state["popularity"])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything learned, by name. popularity: int64 [I + 1], events of each item."""
        return self._state

    @abstractmethod
    def work(self, histories: Histories) -> np.ndarray:
        """int64 [E]: how many numbers ranking an event takes; ranked together is what fits."""

    @abstractmethod
    def rank(
        self, histories: Histories, *, excluded: Excluded | None, top_items: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rank of each target, int64 [E], and if asked for the best items, int64 [E, top_items].

        Ties count against the target; excluded ones have rank 0.
        """


class SparseBaseline(Baseline):
    """A baseline that has something to say about a few items only."""

    @abstractmethod
    def candidates(self, histories: Histories) -> Candidates:
        """The items that the histories speak for; all others are ordered by popularity."""

    def rank(
        self, histories: Histories, *, excluded: Excluded | None, top_items: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        candidates, target_E = self.candidates(histories), histories.target_E
        rank_E = rank_targets(candidates, target_E, self.popularity, excluded)
        if not top_items:
            return rank_E, None
        return rank_E, best_items(
            candidates, target_E, rank_E, top_items, self.popularity, excluded
        )
