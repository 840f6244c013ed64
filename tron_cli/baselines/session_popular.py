"""Most popular items of the current session, then those of all sessions (S-POP)."""

from __future__ import annotations

import numpy as np

from tron_cli.baselines.base import SparseBaseline
from tron_cli.baselines.ranking import Candidates
from tron_cli.data.histories import Histories


class SessionPopular(SparseBaseline):
    """Rank items by how often they occur in the history, the latest first among equals."""

    def work(self, histories: Histories) -> np.ndarray:
        return histories.length_E

    def candidates(self, histories: Histories) -> Candidates:
        event_P, item_P, step_P = histories.pairs()
        # Sort the last event of each item before its earlier ones.
        order = np.lexsort((step_P, item_P, event_P))
        event_P, item_P, step_P = event_P[order], item_P[order], step_P[order]
        begins = np.ones(len(order), dtype=bool)
        begins[1:] = (event_P[1:] != event_P[:-1]) | (item_P[1:] != item_P[:-1])
        first = np.flatnonzero(begins)
        times = np.diff(np.append(first, len(order)))
        # A step is at most the length of the history, so recency only breaks ties.
        event_C = event_P[first]
        score_C = times * (histories.length_E[event_C] + 1.0) - step_P[first]
        offsets = np.searchsorted(event_C, np.arange(len(histories) + 1))
        return Candidates(offsets, item_P[first], score_C)
