"""First-order Markov model: the items that most often directly followed the last one."""

from __future__ import annotations

import numpy as np

from tron_cli.baselines.base import SparseBaseline
from tron_cli.baselines.ranking import Candidates
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import Histories, ranges


class Markov(SparseBaseline):
    """Rank items by how often they directly followed the last item of the history in training."""

    has_similar_items = True

    def learn(self, sessions: Sessions) -> dict[str, np.ndarray]:
        """Return the distinct successors of each item and their counts.

        offsets: int64 [I + 2], where the successors of each item begin. successors, times: int64,
        the items that followed and how often.
        """
        items = np.asarray(sessions.items, dtype=np.int64)
        follows = np.ones(len(items), dtype=bool)
        follows[sessions.offsets[:-1][sessions.lengths > 0]] = False
        target = np.flatnonzero(follows)
        width = self.num_items + 1
        pairs, times = np.unique(items[target - 1] * width + items[target], return_counts=True)
        return {
            "offsets": np.searchsorted(pairs, np.arange(width + 1) * width),
            "successors": pairs % width,
            "times": times,
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self.offsets, self.successors = state["offsets"], state["successors"]
        self.times = state["times"]

    def work(self, histories: Histories) -> np.ndarray:
        last_E = histories.last_E
        return self.offsets[last_E + 1] - self.offsets[last_E] + 1

    def candidates(self, histories: Histories) -> Candidates:
        last_E = histories.last_E
        event_C, place_C = ranges(self.offsets[last_E], self.offsets[last_E + 1])
        offsets = np.searchsorted(event_C, np.arange(len(last_E) + 1))
        return Candidates(offsets, self.successors[place_C], self.times[place_C].astype(np.float64))
